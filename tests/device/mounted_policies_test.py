# SPDX-License-Identifier: Apache-2.0
"""Automatic policies of a mounted device, with ages of a second or two."""
from __future__ import annotations

import errno
import mmap
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
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


IDLE = 2  # seconds, of a page that is idle
USED = 7  # the page that somebody reads again and again


class User:
    """late: the longest time in seconds between two of its reads."""

    def __init__(self, disk: Path) -> None:
        self.late = 0.0
        self._disk = disk
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def _read(self) -> None:
        fd = os.open(self._disk, os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, PAGE) as buffer:
                last = time.monotonic()
                while not self._end.wait(0.1):
                    os.preadv(fd, [buffer], USED * PAGE)
                    self.late, last = max(self.late, time.monotonic() - last), time.monotonic()
        finally:
            os.close(fd)

    def __enter__(self) -> User:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def judge_with_user(served: ServedDevice, judge: Callable[[], None], *more: str) -> list[bytes]:
    """judge() while somebody uses one page of a device that was set up: what was written there. Once more, on
    a device that was reset, where a busy machine has let that one wait for so long that the page was idle."""
    for _ in range(10):
        pages = set_up(served, *more)
        try:
            with User(served.disk) as user:
                judge()
            return pages
        except AssertionError:
            if user.late < IDLE / 2:
                raise
        served.write("control", "reset\n")
    pytest.fail("whoever used the page has had to wait again and again")


def test_idle_pages_are_recompressed_and_used_ones_are_not(served: ServedDevice) -> None:
    others = PAGES - 1

    def judge() -> None:
        before = int(served.read("zram/mm_stat").split()[1])
        assert set(policies(served).values()) == {0}
        assert "\npolicies     none\n" in served.read("control")
        served.write("control", f"policy=recompress idle={IDLE}s\n")
        wait_until(lambda: policies(served)["recompress_pages_won"] >= others, "all the others are smaller")
        time.sleep(1)
        seen = flags(served)
        assert "r" not in seen.pop(USED)
        assert all("r" in flag for flag in seen.values())
        done = policies(served)
        assert (done["recompress_idle_seconds"], done["recompress_pages_tried"]) == (IDLE, others)
        after = int(served.read("zram/mm_stat").split()[1])
        assert done["recompress_bytes_saved"] == before - after > 0
        shown = re.search(r"policies     recompress idle=2s: \d+ rounds, (.*)\n", served.read("control"))
        assert shown[1].startswith(f"{others} of {others} pages smaller, ")
        metrics = served.read("metrics")
        assert f'zramfs_policy_pages_total{{device="dev",policy="recompress"}} {float(others)}' in metrics

    pages = judge_with_user(served, judge)
    with open(served.disk, "rb") as disk:
        assert disk.read(PAGES * PAGE) == b"".join(pages)

    served.write("control", "policy=recompress off\n")
    rounds = policies(served)["recompress_rounds"]
    time.sleep(1.5)
    assert (policies(served)["recompress_rounds"], policies(served)["recompress_idle_seconds"]) == (rounds, 0)


def test_idle_pages_become_units_and_used_ones_stay_single(served: ServedDevice) -> None:
    def judge() -> None:
        served.write("control", f"policy=units idle={IDLE}s\n")
        others = set(range(PAGES)) - {USED}

        def in_units() -> set[int]:
            return {page for page, flag in flags(served).items() if "r" in flag}

        wait_until(lambda: in_units() >= others, "all the others are in units", 60)
        # They are counted at the end of the slice that made them.
        wait_until(lambda: policies(served)["units_pages_won"] >= PAGES - 1, "they are counted", 60)
        done = policies(served)
        assert done["units_idle_seconds"] == IDLE and done["units_bytes_saved"] > 0
        assert re.search(r"policies     units idle=2s: \d+ rounds, .* saved\n", served.read("control"))
        assert in_units() == others

    pages = judge_with_user(served, judge)
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
    limit = 16 * PAGE

    def judge() -> None:
        served.write("control", f"policy=writeback idle={IDLE}s limit={limit}\n")
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
        assert "w" not in seen.pop(USED)
        assert all("w" in flag for flag in seen.values())
        assert "policies     writeback idle=2s: " in served.read("control")

    pages = judge_with_user(served, judge, f"backing_dev={backing}")
    with open(served.disk, "rb") as disk:
        assert disk.read(PAGES * PAGE) == b"".join(pages)


def test_both_at_once_and_everything_is_read_back(served: ServedDevice, tmp_path: Path) -> None:
    backing = tmp_path / "backing"
    backing.touch(mode=0o600)
    os.truncate(backing, 32 << 20)
    pages = set_up(served, f"backing_dev={backing}", "policy=recompress idle=1s")
    # Here, and not above: a device that stands still for three seconds has pages that are due for both.
    wait_until(lambda: policies(served)["recompress_pages_won"] > 0, "some are smaller", 30)
    served.write("control", "policy=writeback idle=3s\n")
    wait_until(lambda: policies(served)["writeback_pages_written"] == PAGES, "all are out", 30)
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
