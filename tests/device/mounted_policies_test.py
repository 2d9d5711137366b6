# SPDX-License-Identifier: Apache-2.0
"""Automatic policies of a mounted device, with ages of a second or two."""
from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.page_kinds import prose
from tests.support.served import ServedDevice, served_device
from tests.support.whole import wait_until

pytestmark = pytest.mark.requires("fuse")

PAGE = 4096
PAGES = 512


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedDevice]:
    with served_device(tmp_path / "dev") as child:
        yield child
        assert child.process.poll() is not None or child.stop() == 0, child.log
        assert "Traceback" not in child.log
        assert child.mounts() == []


def set_up(served: ServedDevice, *more: str) -> list[bytes]:
    """A device with lz4 and zstd, and what was written to it."""
    for line in ("comp_algorithm=lz4", "recomp_algorithm algo=zstd", *more, "disksize=16M"):
        served.write("control", f"{line}\n")
    pages = [prose(number) for number in range(PAGES)]
    with open(served.disk, "r+b", buffering=0) as disk:
        os.pwrite(disk.fileno(), b"".join(pages), 0)
    return pages


def policies(served: ServedDevice) -> dict[str, int]:
    return {name: int(value) for name, value in map(str.split, served.read("memory/policies").splitlines())}


def flags(served: ServedDevice) -> dict[int, str]:
    lines = [line.split() for line in served.read("zram/block_state").splitlines()]
    return {int(words[0]): words[2] for words in lines}


@contextlib.contextmanager
def in_use(served: ServedDevice, page: int) -> Iterator[None]:
    """Somebody reads one page again and again."""
    end = threading.Event()

    def read() -> None:
        fd = os.open(served.disk, os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, PAGE) as buffer:
                while not end.wait(0.1):
                    os.preadv(fd, [buffer], page * PAGE)
        finally:
            os.close(fd)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def test_idle_pages_are_recompressed_and_used_ones_are_not(served: ServedDevice) -> None:
    pages = set_up(served)
    before = int(served.read("zram/mm_stat").split()[1])
    assert set(policies(served).values()) == {0}
    assert "\npolicies     none\n" in served.read("control")
    with in_use(served, 7):
        served.write("control", "policy=recompress idle=2s\n")
        others = PAGES - 1
        wait_until(lambda: policies(served)["recompress_pages_won"] >= others, "all the others are smaller")
        time.sleep(1)
        seen = flags(served)
        assert "r" not in seen.pop(7)
        assert all("r" in flag for flag in seen.values())
        done = policies(served)
        assert (done["recompress_idle_seconds"], done["recompress_pages_tried"]) == (2, others)
        after = int(served.read("zram/mm_stat").split()[1])
        assert done["recompress_bytes_saved"] == before - after > 0
        shown = re.search(r"policies     recompress idle=2s: \d+ rounds, (.*)\n", served.read("control"))
        assert shown[1].startswith(f"{others} of {others} pages smaller, ")
        metrics = served.read("metrics")
        assert f'zramfs_policy_pages_total{{device="dev",policy="recompress"}} {float(others)}' in metrics
    with open(served.disk, "rb") as disk:
        assert disk.read(PAGES * PAGE) == b"".join(pages)

    served.write("control", "policy=recompress off\n")
    rounds = policies(served)["recompress_rounds"]
    time.sleep(1.5)
    assert (policies(served)["recompress_rounds"], policies(served)["recompress_idle_seconds"]) == (rounds, 0)


def test_idle_pages_become_units_and_used_ones_stay_single(served: ServedDevice) -> None:
    pages = set_up(served)
    with in_use(served, 7):
        served.write("control", "policy=units idle=2s\n")
        others = set(range(PAGES)) - {7}
        wait_until(lambda: {page for page, flag in flags(served).items() if "r" in flag} == others,
                   "all the others are in units", 60)
        # They are counted at the end of the slice that made them.
        wait_until(lambda: policies(served)["units_pages_won"] >= PAGES - 1, "they are counted", 60)
        done = policies(served)
        assert done["units_idle_seconds"] == 2 and done["units_bytes_saved"] > 0
        assert re.search(r"policies     units idle=2s: \d+ rounds, .* saved\n", served.read("control"))
    with open(served.disk, "rb") as disk:
        assert disk.read(PAGES * PAGE) == b"".join(pages)
    served.write("control", "policy=units off\n")
    assert policies(served)["units_idle_seconds"] == 0


def test_reset_ends_a_policy_and_the_device_can_be_set_up_again(served: ServedDevice) -> None:
    set_up(served, "policy=recompress idle=1s")
    wait_until(lambda: policies(served)["recompress_rounds"] >= 1, "a round has begun")
    served.write("control", "reset\n")
    assert set(policies(served).values()) == {0}
    set_up(served)
    time.sleep(1.5)
    assert set(policies(served).values()) == {0}


@pytest.mark.parametrize("line", [
    "policy", "policy=", "policy=compact idle=1", "policy=recompress", "policy=recompress idle=x",
    "policy=recompress idle=1 algo=lz4hc",
])
def test_what_is_no_policy_is_refused(served: ServedDevice, line: str) -> None:
    set_up(served)
    with pytest.raises(OSError) as caught:
        served.write("control", f"{line}\n")
    assert caught.value.errno == errno.EINVAL
    assert f" {line.rstrip('=')}" in served.read("control").split("last error")[1].split("\n")[0]
    assert set(policies(served).values()) == {0}


def test_idle_pages_are_written_back_within_the_limit(served: ServedDevice, tmp_path: Path) -> None:
    """And come back as they were; what is written is counted in blocks of 4 KiB."""
    backing = tmp_path / "backing"
    backing.touch(mode=0o600)
    os.truncate(backing, 32 << 20)
    pages = set_up(served, f"backing_dev={backing}")
    limit = 16 * PAGE
    with in_use(served, 7):
        served.write("control", f"policy=writeback idle=2s limit={limit}\n")
        wait_until(lambda: policies(served)["writeback_bytes_in_24_hours"] == limit, "the limit is used up")
        rounds = policies(served)["writeback_rounds"]
        wait_until(lambda: policies(served)["writeback_rounds"] > rounds + 1, "two more looks")
        done = policies(served)
        assert done["writeback_bytes_written"] == done["writeback_bytes_in_24_hours"] == limit
        assert int(served.read("zram/bd_stat").split()[2]) == limit // PAGE
        first = done["writeback_pages_written"]
        assert 16 <= first < PAGES - 1
        assert sum("w" in flag for flag in flags(served).values()) == first
        served.write("control", "policy=writeback idle=2s\n")
        wait_until(lambda: policies(served)["writeback_pages_written"] >= PAGES - 1, "all the others are out")
        seen = flags(served)
        assert "w" not in seen.pop(7)
        assert all("w" in flag for flag in seen.values())
        assert "policies     writeback idle=2s: " in served.read("control")
    with open(served.disk, "rb") as disk:
        assert disk.read(PAGES * PAGE) == b"".join(pages)


def test_both_at_once_and_everything_is_read_back(served: ServedDevice, tmp_path: Path) -> None:
    backing = tmp_path / "backing"
    backing.touch(mode=0o600)
    os.truncate(backing, 32 << 20)
    pages = set_up(served, f"backing_dev={backing}", "policy=recompress idle=1s", "policy=writeback idle=3s")
    wait_until(lambda: policies(served)["writeback_pages_written"] == PAGES, "all are out", 30)
    assert policies(served)["recompress_pages_won"] > 0
    with open(served.disk, "rb") as disk:
        assert disk.read(PAGES * PAGE) == b"".join(pages)
    served.write("control", "reset\n")
    assert policies(served)["writeback_idle_seconds"] == 0


def test_a_policy_without_what_it_needs_is_refused(served: ServedDevice) -> None:
    set_up(served)
    with pytest.raises(OSError) as caught:
        served.write("control", "policy=writeback idle=1s\n")
    assert caught.value.errno == errno.EINVAL
    assert "there is no backing store to write back to" in served.read("control")
