# SPDX-License-Identifier: Apache-2.0
"""The reserve: free pageblocks that are resident, so that whoever takes one waits for nothing."""
from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import pytest

from allocator import Arena, Balloon, Migration, Pool, Reserve
from allocator.check import check
from tests.support.memory_file import MemoryFile
from tests.support.models import PAGEBLOCK_FRAMES
from tests.support.pool_tools import pattern

FRAME = 4096
BLOCK = PAGEBLOCK_FRAMES * FRAME
T = TypeVar("T")


def until(what, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.001)


def patient(allocate: Callable[[], T]) -> T:
    """Of an arena with enough memory: it refuses when the keeper gets no CPU for 0.1 s, on a busy machine."""
    end = time.monotonic() + 60
    while True:
        try:
            return allocate()
        except MemoryError:
            assert time.monotonic() < end


def full(arena: Arena, blocks: int) -> bool:
    return arena.stats().reserve == blocks * BLOCK


def resident(arena: Arena) -> int:
    """Whole pageblocks in the memory file."""
    return MemoryFile(arena.fileno()).resident() // BLOCK


def test_it_is_full_when_made_and_gone_when_closed() -> None:
    arena = Arena(0, 16)
    reserve = Reserve(arena, 3 * BLOCK - 1)
    stats = arena.stats()
    assert (stats.reserve, stats.reserve_target, stats.resident) == (3 * BLOCK, 3 * BLOCK, 3 * BLOCK)
    assert (stats.pageblocks_in_use, stats.frames_free, stats.reserve_misses) == (0, 0, 0)
    assert resident(arena) == 3
    assert arena.buddyinfo()[9] == 3
    reserve.close()
    assert (arena.stats().reserve, arena.stats().reserve_target, arena.stats().resident) == (0, 0, 0)
    assert resident(arena) == 0
    reserve.close()


def test_what_is_taken_is_replaced() -> None:
    arena = Arena(0, 16)
    reserve = Reserve(arena, 2 * BLOCK)
    for taken in range(1, 10):
        arena.alloc(9)
        until(lambda: full(arena, 2))
        assert resident(arena) == taken + 2
    assert arena.stats().reserve_misses == 0
    reserve.close()
    assert resident(arena) == 9


def test_an_arena_gives_its_last_pageblock_from_the_reserve() -> None:
    arena = Arena(0, 4)
    reserve = Reserve(arena, 2 * BLOCK)
    frames = [patient(partial(arena.alloc, 9)) for _ in range(4)]
    with pytest.raises(MemoryError):
        arena.alloc()
    assert arena.stats().reserve == 0
    for frame in frames:
        arena.free(frame, 9)
    until(lambda: arena.stats().reserve <= 3 * BLOCK)
    assert arena.stats().reserve >= 2 * BLOCK
    reserve.close()
    assert resident(arena) == 0


def test_whoever_finds_it_empty_waits_for_the_keeper() -> None:
    """Faster than it can be filled: everything that is handed out is resident all the same."""
    arena = Arena(0, 256)
    reserve = Reserve(arena, 2 * BLOCK)
    for _ in range(200):
        patient(partial(arena.alloc, 9))
    assert arena.stats().reserve_misses > 0
    assert resident(arena) >= 200
    reserve.close()


def test_freed_pageblocks_go_to_it_first_and_what_is_too_much_to_the_os() -> None:
    arena = Arena(0, 64)
    reserve = Reserve(arena, 4 * BLOCK)
    frames = []
    for _ in range(20):
        frames.append(arena.alloc(9))
        until(lambda: full(arena, 4))
    before = arena.stats().bytes_returned
    arena.free(frames.pop(), 9)
    arena.free(frames.pop(), 9)
    time.sleep(0.05)
    assert full(arena, 6) and arena.stats().bytes_returned == before, "one and a half times is kept"
    arena.free(frames.pop(), 9)
    until(lambda: arena.stats().bytes_returned == before + 3 * BLOCK)
    assert full(arena, 4)
    assert resident(arena) == len(frames) + 4
    reserve.close()


def test_bad_reserves_are_refused() -> None:
    arena = Arena(0, 4)
    for nbytes in (0, -1, 4 * BLOCK + 1):
        with pytest.raises(ValueError, match="a reserve of 1 to 8388608 bytes expected"):
            Reserve(arena, nbytes)
    reserve = Reserve(arena, BLOCK)
    with pytest.raises(ValueError, match="has a reserve already"):
        Reserve(arena, BLOCK)
    reserve.close()
    Reserve(arena, BLOCK).close()
    arena.close()
    with pytest.raises(ValueError, match="closed"):
        Reserve(arena, BLOCK)


def test_the_balloon_leaves_no_holes_behind() -> None:
    """A frame that it gives back is resident again ([A5]), also one that it was moved away from."""
    arena = Arena(0, 32)
    reserve = Reserve(arena, BLOCK)
    balloon, migration = Balloon(arena), Migration(arena)
    frames = []
    for _ in range(4 * PAGEBLOCK_FRAMES):
        frames.append(arena.alloc())
        until(lambda: full(arena, 1))
    for frame in frames[::2]:
        arena.free(frame)
    balloon.set_target(PAGEBLOCK_FRAMES)
    balloon.adjust(1 << 30)
    assert balloon.stats().pages == PAGEBLOCK_FRAMES
    until(lambda: full(arena, 1))
    file = MemoryFile(arena.fileno())
    for _ in range(3):
        migration.run()
    balloon.set_target(0)
    balloon.adjust(1 << 30)
    stats = arena.stats()
    # What the file holds beyond pageblocks are its superblock and descriptors.
    assert file.resident() // BLOCK == (stats.pageblocks_in_use * BLOCK + stats.reserve) // BLOCK
    reserve.close()


def test_a_pool_on_it_at_work() -> None:
    """Random allocations and frees with compaction: sums hold, nothing is lost, the reserve is full again."""
    arena = Arena(0, 64)
    reserve = Reserve(arena, 4 * BLOCK)
    pool, migration = Pool(arena), Migration(arena)
    dice = random.Random(7)
    sizes: dict[int, int] = {}
    for step in range(30_000):
        if len(sizes) < 6000 and dice.random() < 0.6:
            sizes[step] = dice.randrange(64, 4097)
            patient(partial(pool.malloc, step, pattern(step, sizes[step])))
        elif sizes:
            tag = dice.choice(list(sizes)) if step % 50 == 0 else next(iter(sizes))
            pool.free(tag)
            del sizes[tag]
        if step % 5000 == 0:
            pool.compact()
            migration.run()
            check(pool, level=2)
    for tag, size in sizes.items():
        assert pool.read(tag) == pattern(tag, size)
        pool.free(tag)
    until(lambda: arena.stats().reserve <= 6 * BLOCK)
    check(pool, level=2)
    assert arena.stats().pageblocks_in_use == 0
    reserve.close()
    assert arena.stats().resident == 0
