# SPDX-License-Identifier: Apache-2.0
"""Units of a mounted device, made while `disk` is in use."""
from __future__ import annotations

import mmap
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.page_kinds import hard, noise, prose
from tests.support.served import ServedDevice, served_device

pytestmark = pytest.mark.requires("fuse")

PAGE = 4096
PAGES = 1024
SECONDS = 3


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedDevice]:
    with served_device(tmp_path / "dev", size=16 << 20) as child:
        yield child
        assert child.process.poll() is not None or child.stop() == 0, child.log
        assert "Traceback" not in child.log
        assert child.mounts() == []


def metric(served: ServedDevice, name: str, label: str = "") -> int:
    [value] = re.findall(rf"^zramfs_{name}\{{[^}}]*{label}[^}}]*\}} ([\d.]+)$", served.read("metrics"), re.M)
    return int(float(value))


def test_what_is_read_again_comes_out_of_its_unit_and_the_rest_stays_there(served: ServedDevice) -> None:
    whole = b"".join(prose(number % 90) for number in range(PAGES))
    with open(served.disk, "r+b", buffering=0) as disk:
        assert os.pwrite(disk.fileno(), whole, 0) == len(whole)
        served.write("control", "units idle=all\n")
        assert metric(served, "units") == PAGES // 16
        assert metric(served, "unit_places", 'state="live"') == PAGES
        for _ in range(2):
            assert os.pread(disk.fileno(), 20 * PAGE, 5 * PAGE) == whole[5 * PAGE:25 * PAGE]
        assert metric(served, "unit_places", 'state="dead"') == 20
        # Into whole pages: the kernel cuts other buffers inside a page, which is read twice then.
        with mmap.mmap(-1, len(whole)) as buffer:
            assert os.preadv(disk.fileno(), [buffer], 0) == len(whole)
            assert buffer[:] == whole
        said = [line for line in served.read("control").splitlines() if line.startswith("units")]
        assert said[0].startswith(f"units        64 of {PAGES - 20} pages in "), said
    flags = [line.split()[-1] for line in served.read("zram/block_state").splitlines()]
    assert len(flags) == PAGES and flags[5:25] == ["......"] * 20 and flags[100] == "....r."


def test_units_come_and_go_beside_readers_and_writers(served: ServedDevice) -> None:
    kinds = [prose(n) for n in range(20)] + [hard(1), noise(1), bytes(PAGE)]
    stop = time.monotonic() + SECONDS
    failures: list[BaseException] = []
    counts: list[int] = []

    def user(first: int) -> None:
        """Every third page is this one's."""
        rng, mine, done = random.Random(first), {n: bytes(PAGE) for n in range(first, PAGES, 3)}, 0
        fd = os.open(served.disk, os.O_RDWR)
        try:
            while time.monotonic() < stop or done <= 50:
                number = rng.choice(list(mine))
                if rng.random() < 0.4:
                    mine[number] = rng.choice(kinds)
                    os.pwrite(fd, mine[number], number * PAGE)
                assert os.pread(fd, PAGE, number * PAGE) == mine[number]
                done += 1
            for number, page in mine.items():
                assert os.pread(fd, PAGE, number * PAGE) == page
        except BaseException as error:
            failures.append(error)
        finally:
            os.close(fd)
        counts.append(done)

    threads = [threading.Thread(target=user, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    rounds = 0
    while any(thread.is_alive() for thread in threads) or rounds < 2:
        served.write("control", "units idle=all level=1\ncompact\n")
        rounds += 1
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    assert min(counts) > 50
    assert metric(served, "unit_making_total", 'result="made"') > 10
    assert [int(number) for number in served.read("zram/io_stat").split()][:2] == [0, 0]
