# SPDX-License-Identifier: Apache-2.0
"""Memory that the system refuses is a failed allocation, and not a SIGBUS.

Two ways make the kernel refuse a page for real: the memory file is cut short, so that its pages beyond the
cut can't come into being, and a file in a tmpfs that is too small takes the place of the memory file.
"""
from __future__ import annotations

import errno
import os
import random
import time
from pathlib import Path

import pytest

from allocator import Arena, Balloon, Migration, Pool, Reserve
from allocator.check import check
from tests.support import native
from tests.support.memory_file import MemoryFile
from tests.support.models import PAGEBLOCK_FRAMES
from tests.support.pool_tools import pattern
from tests.support.scale import scaled
from tests.support.small_tmpfs import on_a_small_tmpfs

FRAME = 4096
UNIT = 16
BLOCK = PAGEBLOCK_FRAMES * FRAME


class Shortage:
    """While it lasts, the memory file of an arena can't grow beyond `off` bytes."""

    def __init__(self, arena: Arena, off: int) -> None:
        self.fd, self.off, self.size = arena.fileno(), off, os.fstat(arena.fileno()).st_size

    def __enter__(self) -> None:
        assert MemoryFile(self.fd).resident() <= self.off
        os.ftruncate(self.fd, self.off)

    def __exit__(self, *_: object) -> None:
        os.ftruncate(self.fd, self.size)


def frames_from(arena: Arena, frame: int) -> Shortage:
    return Shortage(arena, MemoryFile(arena.fileno()).frame_off(frame))


def holds_memory(arena: Arena, frame: int) -> bool:
    """Without touching it: a look at the file for a hole."""
    off = MemoryFile(arena.fileno()).frame_off(frame)
    try:
        if os.lseek(arena.fileno(), off, os.SEEK_DATA) != off:
            return False
    except OSError as error:
        assert error.errno == errno.ENXIO
        return False
    return os.lseek(arena.fileno(), off, os.SEEK_HOLE) >= off + FRAME


def test_a_frame_has_its_memory_when_it_is_handed_out() -> None:
    arena = Arena(0, 4)
    for n in range(PAGEBLOCK_FRAMES + 40):
        frame = arena.alloc()
        assert holds_memory(arena, frame), f"allocation {n}"
    for order in range(10):
        first = arena.alloc(order)
        assert all(holds_memory(arena, first + n) for n in range(1 << order)), f"order {order}"


def test_a_few_frames_take_little_memory() -> None:
    arena = Arena(0, 64)
    file = MemoryFile(arena.fileno())
    empty = file.resident()
    arena.alloc()
    # A unit of 16 frames, two pages of page descriptors, one of pageblock descriptors.
    assert file.resident() - empty == (UNIT + 3) * FRAME
    for _ in range(UNIT - 1):
        arena.alloc()
    assert file.resident() - empty == (UNIT + 3) * FRAME
    arena.alloc()
    assert file.resident() - empty == (2 * UNIT + 3) * FRAME


@pytest.mark.parametrize("order", [0, 3, 4, 9])
def test_a_refused_frame_is_a_memory_error_and_changes_nothing(order: int) -> None:
    arena = Arena(0, 3)
    kept = [arena.alloc() for _ in range(UNIT)]
    for frame in kept:
        arena.frame(frame)[:8] = memoryview(frame.to_bytes(8, "little"))
    before = arena.stats(), arena.buddyinfo()
    with frames_from(arena, UNIT):
        for _ in range(3):
            with pytest.raises(MemoryError, match="refuse"):
                arena.alloc(order)
            check(arena, 2)
        assert arena.stats().refused == 3
        # But for a pageblock that was never used until then.
        assert (arena.stats().frames_used, arena.buddyinfo()[:9]) == (before[0].frames_used, before[1][:9])
    first = arena.alloc(order)
    assert all(holds_memory(arena, first + n) for n in range(1 << order))
    assert all(bytes(arena.frame(frame)[:8]) == frame.to_bytes(8, "little") for frame in kept)
    check(arena, 2)


def test_refused_descriptors_are_a_memory_error_and_change_nothing() -> None:
    arena = Arena(0, 600)
    file = MemoryFile(arena.fileno())
    for off in (file.pageblock_off(0), file.page_off(0)):
        with Shortage(arena, off), pytest.raises(MemoryError, match="refuse"):
            arena.alloc()
        assert (arena.stats().frames_used, arena.stats().pageblocks_in_use) == (0, 0)
        check(arena, 2)
    pool = Pool(arena)
    with Shortage(arena, file.zspage_off(0)), pytest.raises(MemoryError, match="refuse"):
        pool.malloc(1, b"an object")
    assert (pool.stats().pages, pool.stats().zspages, arena.stats().frames_used) == (0, 0, 0)
    check(pool, 2)
    assert arena.stats().refused == 3
    pool.malloc(1, b"an object")
    check(pool, 2)


def end_of_data(file: MemoryFile) -> int:
    off = end = 0
    while True:
        try:
            off = os.lseek(file.fd, end, os.SEEK_DATA)
        except OSError as error:
            assert error.errno == errno.ENXIO
            return end
        end = os.lseek(file.fd, off, os.SEEK_HOLE)


def test_a_refused_object_is_a_memory_error_and_changes_nothing() -> None:
    arena = Arena(0, 16)
    pool, file = Pool(arena), MemoryFile(arena.fileno())
    dice = random.Random(3)
    sizes = {}
    refused = 0
    for tag in range(5000):
        if tag % 97 == 0:
            before = pool.stats(), arena.stats().refused
            stored = []
            with Shortage(arena, end_of_data(file)):
                with pytest.raises(MemoryError, match="refuse"):
                    for extra in range(1 << 30, (1 << 30) + 5000):
                        pool.malloc(extra, pattern(extra, 4096))
                        stored.append(extra)
                for extra in stored:
                    assert pool.read(extra) == pattern(extra, 4096)
                    pool.free(extra)
                check(pool, 2)
            refused += arena.stats().refused - before[1]
            assert (pool.stats().pages, pool.stats().objects) == (before[0].pages, before[0].objects)
        sizes[tag] = dice.randrange(1, 4097)
        pool.malloc(tag, pattern(tag, sizes[tag]))
    assert refused >= 5000 // 97
    for tag, size in sizes.items():
        assert pool.read(tag) == pattern(tag, size)
    check(pool, 2)


def test_the_balloon_keeps_its_holes_when_memory_is_asked_for_around_them() -> None:
    arena = Arena(0, 4)
    balloon, file = Balloon(arena), MemoryFile(arena.fileno())
    frames = [arena.alloc() for _ in range(PAGEBLOCK_FRAMES)]
    for frame in frames[::2]:
        arena.free(frame)
    balloon.set_target(200)
    balloon.adjust(1 << 20)
    before = file.resident()
    # Of those that it gives back, each brings its unit to be populated again, but for the others.
    balloon.set_target(100)
    balloon.adjust(1 << 20)
    assert file.resident() == before, "what leaves it has no memory yet"
    taken = [arena.alloc() for _ in range(156)]
    assert all(holds_memory(arena, frame) for frame in taken)
    assert file.resident() == before + 100 * FRAME
    assert balloon.stats().pages == 100
    check(arena, 2)


def test_what_the_balloon_gave_back_can_be_refused() -> None:
    arena = Arena(0, 2)
    balloon = Balloon(arena)
    frames = [arena.alloc() for _ in range(PAGEBLOCK_FRAMES)]
    for frame in frames[-UNIT:]:
        arena.free(frame)
    balloon.set_target(UNIT)
    balloon.adjust(UNIT)
    balloon.set_target(0)
    balloon.adjust(UNIT)
    with frames_from(arena, PAGEBLOCK_FRAMES - UNIT):
        with pytest.raises(MemoryError, match="refuse"):
            arena.alloc()
        check(arena, 2)
    assert arena.alloc() in frames[-UNIT:]


def test_migration_without_memory_for_its_targets_moves_nothing() -> None:
    arena = Arena(0, 4)
    balloon, migration, pool = Balloon(arena), Migration(arena), Pool(arena)
    for tag in range(2 * PAGEBLOCK_FRAMES):
        pool.malloc(tag, pattern(tag, 4096))
    # The upper pageblock is sparser and is emptied into the lower one, whose free frames were punched out.
    kept = [*range(PAGEBLOCK_FRAMES - 100), *range(PAGEBLOCK_FRAMES, PAGEBLOCK_FRAMES + 50)]
    for tag in range(PAGEBLOCK_FRAMES - 100, PAGEBLOCK_FRAMES):
        pool.free(tag)
    balloon.set_target(100)
    balloon.adjust(100)
    for tag in range(PAGEBLOCK_FRAMES + 50, 2 * PAGEBLOCK_FRAMES):
        pool.free(tag)
    balloon.set_target(0)
    balloon.adjust(100)
    assert arena.stats().refused == 0
    assert migration.run() == 1
    assert all(pool.read(tag) == pattern(tag, 4096) for tag in kept)
    check(pool, 2)


def test_the_user_region_is_populated_as_far_as_it_goes_and_refused_with_an_errno() -> None:
    probe = native.load("probe")
    size = 1 << 33
    arena = Arena(size, 1)
    file = MemoryFile(arena.fileno())
    empty = file.resident()
    assert probe.populate_user(arena, (5 << 30) + 100, 1) == 0
    assert probe.populate_user(arena, size - 1, 1) == probe.populate_user(arena, size, 0) == 0
    assert file.resident() == empty + 2 * FRAME
    assert probe.populate_user(arena, (5 << 30) + FRAME - 1, 2) == 0
    assert file.resident() == empty + 3 * FRAME
    for offset, n in ((size, 1), (size + 1, 0), (size - 1, 2), (1, size), (1, (1 << 64) - 1)):
        assert probe.populate_user(arena, offset, n) == errno.EINVAL
    with Shortage(arena, file.superblock.user_off + (6 << 30)):
        assert probe.populate_user(arena, (6 << 30) - 1, 2) == errno.ENOMEM
        assert probe.populate_user(arena, (6 << 30) - 1, 1) == 0
    assert arena.stats().refused == 1


def test_a_reserve_that_is_refused_is_a_memory_error_and_leaves_nothing() -> None:
    arena = Arena(0, 8)
    with frames_from(arena, 3 * PAGEBLOCK_FRAMES), pytest.raises(MemoryError, match="ask for less"):
        Reserve(arena, 4 * BLOCK)
    assert arena.stats().reserve == arena.stats().reserve_target == 0
    assert MemoryFile(arena.fileno()).resident() < BLOCK
    check(arena, 2)
    reserve = Reserve(arena, 4 * BLOCK)
    assert arena.stats().reserve == 4 * BLOCK
    reserve.close()


def test_the_reserves_thread_survives_a_refusal_and_fills_it_when_there_is_memory_again() -> None:
    arena = Arena(0, 16)
    reserve = Reserve(arena, 2 * BLOCK)
    first = [arena.alloc(9)]
    while arena.stats().reserve < 2 * BLOCK:
        time.sleep(0.001)
    with frames_from(arena, 3 * PAGEBLOCK_FRAMES):
        first += [arena.alloc(9) for _ in range(2)]
        with pytest.raises(MemoryError):
            arena.alloc(9)
        assert arena.stats().reserve_misses > 0 and arena.stats().refused > 0
        check(arena, 2)
        assert arena.stats().reserve == 0
    end = time.monotonic() + 60
    while arena.stats().reserve < 2 * BLOCK:
        assert time.monotonic() < end, "nobody has to call it"
        time.sleep(0.01)
    returned = arena.stats().bytes_returned
    assert returned == 0, "a pageblock that never was ready was not given back"
    assert all(holds_memory(arena, frame) for frame in first)
    check(arena, 2)
    reserve.close()


# ---- a limit of tmpfs ---------------------------------------------------------------------------------

# In a mount namespace of its own, where the tmpfs is gone with the process.
FILL = r"""
import os, sys
sys.path[:0] = sys.argv[1:2]
from tests.support.pool_tools import pattern
from allocator import Arena, Pool
from allocator.check import check
arena = Arena(0, 64)
pool = Pool(arena)
tag = 0
for life in range(3):
    try:
        while True:
            pool.malloc(tag, pattern(tag, 1 + tag % 4096))
            tag += 1
    except MemoryError:
        pass
    check(pool, 2)
    held = os.fstat(arena.fileno()).st_blocks * 512
    for n in range(tag):
        assert pool.read(n) == pattern(n, 1 + n % 4096), n
    full = tag
    while tag > full // 2:
        tag -= 1
        pool.free(tag)
    check(pool, 2)
print(full, held, arena.stats().refused)
"""


# Threads without the GIL, and a balloon that punches holes among them.
CROWD = r"""
import os, random, sys, threading
sys.path[:0] = sys.argv[1:2]
from allocator import Arena, Balloon
from allocator.check import check
arena = Arena(0, 64)
balloon = Balloon(arena)
failures, wrong = [0] * 4, []
def work(number):
    dice = random.Random(number)
    mine = []
    for _ in range(STEPS):
        if dice.random() < 0.62:
            order = dice.choice((0, 0, 0, 1, 3, 5, 9))
            try:
                first = arena.alloc(order)
            except MemoryError:
                failures[number] += 1
                for _ in range(len(mine) // 2):
                    arena.free(*mine.pop(dice.randrange(len(mine))))
                continue
            mine.append((first, order))
            for frame in (first, first + (1 << order) - 1):
                arena.frame(frame)[:8] = memoryview((number << 32 | frame).to_bytes(8, "little"))
        elif mine:
            first, order = mine.pop(dice.randrange(len(mine)))
            for frame in (first, first + (1 << order) - 1):
                if bytes(arena.frame(frame)[:8]) != (number << 32 | frame).to_bytes(8, "little"):
                    wrong.append(frame)
            arena.free(first, order)
    for block in mine:
        arena.free(*block)
def blow():
    dice = random.Random(9)
    while threads[0].is_alive():
        balloon.set_target(dice.randrange(300))
        balloon.adjust(64)
threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
threads.append(threading.Thread(target=blow))
[thread.start() for thread in threads]
[thread.join() for thread in threads]
check(arena, 2)
balloon.set_target(0)
balloon.adjust(1 << 20)
assert not wrong and arena.stats().frames_used == 0, (wrong, arena)
print(min(failures), arena.stats().refused, os.fstat(arena.fileno()).st_blocks * 512)
"""


@pytest.mark.requires("root", "unshare", "cc", "unsanitized")
def test_a_pool_fills_a_tmpfs_to_its_last_page_and_lives(tmp_path: Path) -> None:
    objects, held, refused = on_a_small_tmpfs(tmp_path, FILL)
    assert refused >= 3
    # Objects of 2 KiB on average; the last unit that did not fit is 64 KiB.
    assert held > (20 << 20) - 128 * 1024
    assert objects * 2048 > 0.9 * held


@pytest.mark.requires("root", "unshare", "cc", "unsanitized")
def test_threads_that_fill_a_tmpfs_together_lose_nothing(tmp_path: Path) -> None:
    failures, refused, held = on_a_small_tmpfs(tmp_path, f"STEPS = {scaled(6000, 2000)}\n{CROWD}")
    assert failures > 0 and refused > 0, "it never was full"
    assert held < 1 << 20, "descriptors stay, frames do not"
