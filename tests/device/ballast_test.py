# SPDX-License-Identifier: Apache-2.0
"""The ballast of a server of swap: given away when no request comes while memory is short, and only then."""
from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.paths import python_environment
from tests.support.whole import wait_until
from tests.support.wire import PAGE, Wire, wired
from zramfs.device.ballast import Ballast
from zramfs.model.stats import BallastStats

PIECE = 2 << 20
FULL = BallastStats(held=4 * PIECE, target=4 * PIECE)
# Two zones as Linux 6.1 shows them, with what stands around the lines that count.
ZONES = """\
Node 0, zone      DMA
  per-node stats
      nr_inactive_anon 45868
      nr_active_file 3
  pages free     {dma}
        boost    0
        min      192
        low      240
        high     288
        spanned  4095
        present  3998
        managed  3840
        cma      0
        protection: (0, 294, 294, 294, 294)
      nr_free_pages {dma}
Node 0, zone    DMA32
  pages free     {dma32}
        boost    0
        min      3903
        low      4878
        high     5853
        spanned  88028
        present  88028
        managed  77766
        protection: (0, 0, 0, 0, 0)
  pagesets
    cpu: 0
              count: 122
              high:  252
              batch: 63
  vm stats threshold: 16
Node 0, zone   Normal
  pages free     0
        boost    0
        min      0
        low      0
        high     0
        managed  0
"""


class Memory:
    """A file as /proc/zoneinfo. What is read while it is written is the old text or the new one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.free(20000)

    def free(self, dma32: int, dma: int = 980) -> None:
        self.write(ZONES.format(dma=dma, dma32=f"{dma32:<8}"))

    def write(self, text: str) -> None:
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT)
        with os.fdopen(fd, "wb") as file:
            file.write(text.encode().ljust(4000))


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    return Memory(tmp_path / "zoneinfo")


@pytest.fixture
def wire() -> Iterator[Wire]:
    with wired() as made:
        made.init()
        yield made


@contextlib.contextmanager
def ballast(wire: Wire, zoneinfo: Path) -> Iterator[Ballast]:
    made = Ballast(wire.lane, zoneinfo)
    try:
        yield made
    finally:
        made.close()


def resident() -> int:
    """Bytes of this process's ballast that are in memory, by the kernel's account."""
    text = Path("/proc/self/smaps").read_text()
    _, _, mapping = text.partition("memfd:zramfs-ballast")
    return int(mapping.partition("\nRss:")[2].split()[0]) * 1024 if mapping else 0


def test_it_is_given_away_piece_by_piece_and_taken_again(wire: Wire, memory: Memory) -> None:
    with ballast(wire, memory.path) as made:
        assert made.stats == FULL
        assert resident() == 4 * PIECE
        memory.free(3844)  # as in the machine that stood still: 59 below min
        wait_until(lambda: made.stats.released > 0, "a piece is given away")
        wait_until(lambda: made.stats.held == 0, "all are given away")
        assert resident() == 0
        time.sleep(0.5)
        assert made.stats == replace(FULL, held=0, released=4)
        memory.free(4878 + 768 - 1)
        time.sleep(0.5)
        assert made.stats.held == 0  # not yet: what it took would be missing again
        memory.free(4878 + 768)
        wait_until(lambda: made.stats.held == 4 * PIECE, "all are held again")
        assert resident() == 4 * PIECE
        assert made.stats == replace(FULL, released=4)
    assert made.stats == BallastStats(0, 4 * PIECE, 4)
    assert resident() == 0


def test_a_kernel_that_sends_requests_is_not_stuck(wire: Wire, memory: Memory) -> None:
    for _ in range(20):
        memory.free(20000)
        with ballast(wire, memory.path) as made:
            memory.free(3844)
            longest, last = 0.0, time.monotonic()
            end = last + 1.5
            while last < end:
                wire.write(0, os.urandom(PAGE))
                time.sleep(0.02)
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
            if made.stats == FULL:
                wait_until(lambda made=made: made.stats.released > 0, "no request comes any more")
                return
            # Three looks, a tenth of a second apart, have seen none: a busy machine let this thread wait.
            assert longest > 0.25, made.stats
    pytest.fail("this thread has had to wait again and again")


@pytest.mark.parametrize(("dma32", "dma"), [(4878, 0), (20000, 0), (4878, 980)])
def test_small_zones_and_enough_memory_do_not_count(
        wire: Wire, memory: Memory, dma32: int, dma: int) -> None:
    with ballast(wire, memory.path) as made:
        memory.free(dma32, dma)
        time.sleep(0.8)
        assert made.stats == FULL


NONE = [
    "", "pages free", "  pages free     1\n", "managed 5\nlow 3\n", "  pages free 1\n low\n managed x\n",
    "\0" * 100, "  pages free     1\n        managed  0\n", "x" * 3999,
]


def test_an_account_that_is_none_changes_nothing(wire: Wire, memory: Memory) -> None:
    with ballast(wire, memory.path) as made:
        for text in NONE:
            wire.write(0, bytes(PAGE))  # so that looks are frequent
            memory.write(text)
            time.sleep(0.5)
            assert made.stats == FULL, text


def test_more_zones_than_any_machine_has(wire: Wire, memory: Memory) -> None:
    """Those that are looked at decide."""
    with ballast(wire, memory.path) as made:
        one = "  pages free 1\n low 2\n managed 100\n"
        memory.path.write_text(one * 5000)
        wait_until(lambda: made.stats.released == 4, "memory is short everywhere")


def test_the_machine_s_own_account_is_understood(wire: Wire) -> None:
    """It has memory enough, or the test would not get here; but while another test raises the kernel's own
    reserve, it may be short of that for a moment."""
    for _ in range(30):
        with ballast(wire, Path("/proc/zoneinfo")) as made:
            time.sleep(1)
            if made.stats == FULL:
                return
    pytest.fail(f"{made.stats}, with {Path('/proc/zoneinfo').read_text()}")


def test_an_account_that_cannot_be_read(wire: Wire, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="ballast"):
        Ballast(wire.lane, tmp_path / "none")
    with pytest.raises(TypeError):
        Ballast(wire.lane, 5)
    os.fstat(0)  # its descriptors are no others
    assert resident() == 0


def test_it_goes_with_its_lane(memory: Memory) -> None:
    """One that nobody has closed ends with the process, or when nobody knows it any more."""
    with wired() as wire:
        made = Ballast(wire.lane, memory.path)
        del made
        assert resident() == 0
    code = """if True:
        import zramfs.device.ballast as b
        from tests.support import wire
        with wire.wired() as w:
            kept = b.Ballast(w.lane)
    """
    done = subprocess.run([sys.executable, "-c", code], env=python_environment(), timeout=60, check=False,
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
