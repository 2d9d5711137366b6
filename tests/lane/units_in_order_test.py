# SPDX-License-Identifier: Apache-2.0
"""Pages of units, read in order through the lane: each unit is unpacked once, whoever reads it."""
from __future__ import annotations

from pathlib import Path

from tests.lane.mounted_slow_test import SLOW_THREADS, read_task, slow_tasks
from tests.support.backing_tools import backing_file, write_back
from tests.support.memory_file import MemoryFile
from tests.support.page_kinds import prose
from tests.support.unit_tools import make_units
from tests.support.whole import wait_until
from tests.support.wire import MIB, PAGE, Op, Wire, lane_threads, read_in, wired
from zramfs.store.backing import Backing

SIZE = MIB
UNITS = SIZE // PAGE // 16
FUTEX_COMMAND, FUTEX_WAIT_BITSET = 127, 9
CONTENT = b"".join(map(prose, range(64)))  # of 256 KiB


def pack(wire: Wire, size: int) -> None:
    """All pages are in units, and have not been used since."""
    for offset in range(0, size, len(CONTENT)):
        wire.store.write(offset, CONTENT)
    assert make_units(wire.store).pages == size // PAGE


def unpacked(wire: Wire) -> int:
    return wire.store.stats().units_unpacked


def all_rest(tasks: list[Path], count: int) -> bool:
    """Whether so many threads wait for a condition. Nothing but a request ends that, so they need not be
    looked at in one moment. A thread that waits for a mutex stands in the same system call, with FUTEX_WAIT.
    """
    calls = [read_task(task, "syscall").split() for task in tasks]
    return len(tasks) == count and all(
        len(call) > 2 and int(call[2], 16) & FUTEX_COMMAND == FUTEX_WAIT_BITSET for call in calls)


def test_of_several_threads_that_share_a_read_one_unpacks_each_unit() -> None:
    """The thread with the first piece waits for its first page until the others have done all the rest."""
    with wired(SIZE, threads=4) as wire:
        pack(wire, SIZE)
        wait_until(lambda: all_rest(
            [task for name, task in lane_threads().items() if name != "zramfs-lane0"], 3), "all but one rest")
        file = MemoryFile(wire.store.migration.arena.fileno())
        word = file.slot_word(0)
        file.set_slot_word(0, word | 1)
        try:
            wire.send(Op.READ, read_in(0, SIZE))
            wait_until(lambda: unpacked(wire) >= UNITS - 1, "the others are done")
        finally:
            file.set_slot_word(0, word)
        assert wire.receive().data == SIZE // len(CONTENT) * CONTENT
        assert unpacked(wire) == UNITS
        assert wire.store.stats().unit_pages == SIZE // PAGE, "a pass in order leaves each as it is"
        # A read may begin and end anywhere.
        assert wire.read(17 * PAGE + 5, SIZE // 2) == (3 * CONTENT)[17 * PAGE + 5:][:SIZE // 2]
        wire.store.check(3)


def test_of_reads_one_after_the_other_one_slow_thread_unpacks_each_unit(tmp_path: Path) -> None:
    """The one that has rested for the shortest time is woken, as its cache has what is read next."""
    backing = Backing(str(backing_file(tmp_path / "file")))
    with wired(256 << 10, backing=backing) as wire:
        pack(wire, 256 << 10)
        assert write_back(wire.store).units == 4
        before = unpacked(wire)
        for number in range(64):
            wait_until(lambda: all_rest(slow_tasks(), SLOW_THREADS), "all of them rest")
            assert wire.read(number * PAGE, PAGE) == prose(number)
        assert unpacked(wire) - before == 4
        wait_until(lambda: wire.lane.stats().put_off == 64, "each was put off")
        wire.store.check(3)
