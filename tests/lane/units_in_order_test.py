# SPDX-License-Identifier: Apache-2.0
"""Pages of units, read in order through the lane: each unit is unpacked once, whoever reads it."""
from __future__ import annotations

import time
from pathlib import Path

from tests.lane.mounted_slow_test import SLOW_THREADS, slow_calls
from tests.support.backing_tools import backing_file, write_back
from tests.support.page_kinds import prose
from tests.support.unit_tools import make_units
from tests.support.whole import wait_until
from tests.support.wire import MIB, PAGE, Wire, wired
from zramfs.store.backing import Backing

SIZE = 4 * MIB
UNITS = SIZE // PAGE // 16
CONTENT = b"".join(map(prose, range(64)))  # of 256 KiB


def pack(wire: Wire, size: int) -> None:
    """All pages are in units, and have not been used since."""
    for offset in range(0, size, len(CONTENT)):
        wire.store.write(offset, CONTENT)
    assert make_units(wire.store).pages == size // PAGE


def unpacked(wire: Wire) -> int:
    return wire.store.stats().units_unpacked


def test_of_several_threads_that_share_a_read_one_unpacks_each_unit() -> None:
    with wired(SIZE, threads=4) as wire:
        pack(wire, SIZE)
        end, turn = time.monotonic() + 60, 0
        # A thread keeps four units of the pass before.
        while wire.lane.stats().helped_pieces < UNITS:
            assert time.monotonic() < end, "too few have helped"
            wire.store.mark_idle()
            before, turn = unpacked(wire), turn + 1
            for offset in range(0, SIZE, MIB):
                assert wire.read(offset, MIB) == 4 * CONTENT
            assert unpacked(wire) - before <= UNITS, turn
            assert turn > 1 or unpacked(wire) - before == UNITS
        assert wire.store.stats().unit_pages == SIZE // PAGE, "a pass in order leaves each unit as it is"
        # A read may begin and end anywhere.
        wire.store.mark_idle()
        assert wire.read(17 * PAGE + 5, MIB) == (5 * CONTENT)[17 * PAGE + 5:][:MIB]
        wire.store.check(3)


def test_of_reads_one_after_the_other_one_slow_thread_unpacks_each_unit(tmp_path: Path) -> None:
    """The one that has rested for the shortest time is woken, as its cache has what is read next."""

    def all_rest() -> bool:
        return len(slow_calls()) == SLOW_THREADS and len(set(slow_calls())) == 1

    backing = Backing(str(backing_file(tmp_path / "file")))
    with wired(256 << 10, backing=backing) as wire:
        pack(wire, 256 << 10)
        assert write_back(wire.store).units == 4
        before = unpacked(wire)
        for number in range(64):
            wait_until(all_rest, "all of them rest")
            assert wire.read(number * PAGE, PAGE) == prose(number)
        assert unpacked(wire) - before == 4
        assert wire.lane.stats().put_off == 64
        wire.store.check(3)
