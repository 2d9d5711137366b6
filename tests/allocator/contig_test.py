# SPDX-License-Identifier: Apache-2.0
"""Contiguous allocation: any order and any range inside a pageblock, or a clean refusal."""
from __future__ import annotations

import errno
import random
from types import ModuleType

import pytest

from allocator import Arena, Migration
from tests.support import native
from tests.support.migration_tools import PoolScene, assert_at_rest, assert_balanced, fill
from tests.support.models import PAGEBLOCK_FRAMES

TRIES = 16  # ranges that alloc_contig() tries to empty
SIZES = (100, 700, 1500, 2500, 3300, 4096)


@pytest.fixture(scope="module")
def probe() -> ModuleType:
    return native.load("probe")


def crowded(nr_pageblocks: int = 6, keep_free: int = 600) -> PoolScene:
    """An arena that is full but for so many frames here and there, none of which is next to another."""
    scene = PoolScene(nr_pageblocks)
    rng = random.Random(nr_pageblocks)
    tag = 0
    while True:
        try:
            scene.malloc(tag, SIZES[tag % len(SIZES)])
        except MemoryError:
            break
        tag += 1
    huge = [tag for tag, size in scene.sizes.items() if size == 4096]
    places = {scene.frames(tag)[0]: tag for tag in huge}
    for frame in rng.sample(sorted(places), len(places)):
        if scene.arena.stats().frames_free < keep_free and not neighbours_free(scene, frame):
            scene.free(places[frame])
    assert scene.arena.buddyinfo()[1:9] == (0,) * 8
    return scene


def neighbours_free(scene: PoolScene, frame: int) -> bool:
    return bool(scene.memory.page(frame ^ 1).flags & 1)


# ---- by order -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("order", range(10))
def test_every_order_out_of_single_frames(order: int) -> None:
    scene = crowded()
    free = scene.arena.stats().frames_free
    assert free > PAGEBLOCK_FRAMES
    if order:
        with pytest.raises(MemoryError):
            scene.arena.alloc(order)
    frame = scene.migration.alloc_contig(order)
    n = 1 << order
    assert frame % n == 0
    assert scene.arena.stats().frames_free == free - n
    for i in range(frame, frame + n):
        scene.arena.frame(i)[:] = b"\xff" * 4096
    assert_at_rest(scene.pool, others=n)
    scene.readable()
    scene.arena.free(frame, order)
    scene.settle()


def test_the_range_that_costs_least_is_taken() -> None:
    """A free one if there is any; else the one with the fewest frames in use, and of those the first."""
    scene = PoolScene(3)
    for tag in range(3 * PAGEBLOCK_FRAMES):
        scene.malloc(tag, 4096)
    # Of the ranges of four, one has two frames in use, and two have one.
    for first, n in ((40, 2), (80, 3), (1000, 3), (600, 1), (1300, 1)):
        for frame in range(first, first + n):
            scene.free(next(tag for tag in scene.sizes if scene.frames(tag) == [frame]))
    assert scene.migration.alloc_contig(2) == 80
    assert scene.migration.stats().migrated == 1
    assert scene.migration.alloc_contig(2) == 1000
    assert scene.migration.stats().migrated == 2
    frame = scene.arena.alloc()
    scene.arena.free(frame)
    assert scene.migration.alloc_contig(0) == frame
    assert scene.migration.stats().migrated == 2
    scene.readable()


def test_others_are_tried_when_the_best_range_is_busy(probe: ModuleType) -> None:
    """Also those with as many frames in use; sixteen, and no more."""
    arena = Arena(0, 2)
    owner = probe.ScriptedOwner(arena, 2)
    frames = fill(arena)
    # Every range of four has one page in use, which does not want to move, but for the last one.
    arena.free(frames[0])
    for n in range(20):
        for frame in range(4 * n, 4 * n + 4):
            if frame:
                arena.free(frame)
        page = owner.add(n)
        assert owner.frame(page) // 4 == n
        for other in sorted(set(range(4 * n, 4 * n + 4)) - {owner.frame(page)}):
            assert arena.alloc() in range(4 * n, 4 * n + 4), other
    for n in range(20):
        for frame in range(4 * n, 4 * n + 4):
            if frame != owner.frame(n):
                arena.free(frame)
        owner.script(n, refuse=1000)
    # Places to move to, in the other pageblock.
    for frame in range(600, 640, 2):
        arena.free(frame)
    migration = Migration(arena)
    with pytest.raises(MemoryError):
        migration.alloc_contig(2)
    assert migration.stats().busy == TRIES
    assert [owner.asked(n)[0] for n in range(20)] == [1] * TRIES + [0] * (20 - TRIES)
    owner.script(TRIES - 1)
    assert migration.alloc_contig(2) == 4 * (TRIES - 1)
    assert migration.stats().busy == 2 * TRIES - 1 and migration.stats().migrated == 1
    assert owner.violations == 0


def test_no_room_is_a_memory_error_and_changes_nothing() -> None:
    scene = PoolScene(2)
    for tag in range(2 * PAGEBLOCK_FRAMES):
        scene.malloc(tag, 4096)
    before = [scene.frames(tag) for tag in scene.sizes]
    for order in range(10):
        with pytest.raises(MemoryError, match=f"range of {1 << order} frames"):
            scene.migration.alloc_contig(order)
    assert [scene.frames(tag) for tag in scene.sizes] == before
    scene.settle()


def test_orders_out_of_range() -> None:
    migration = Migration(Arena(0, 2))
    for order in (-1, 10, 1 << 20):
        with pytest.raises(ValueError, match="order 0 to 9"):
            migration.alloc_contig(order)


# ---- by range -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(8))
def test_any_range_inside_a_pageblock(seed: int) -> None:
    scene = crowded()
    rng = random.Random(seed)
    for _ in range(4):
        n = rng.choice((1, 2, 3, 17, 100, 511, 512))
        # A pageblock that was emptied as a whole is not in use any more.
        block = rng.choice([n for n in range(6) if scene.memory.pageblock(n).flags])
        first = block * PAGEBLOCK_FRAMES + rng.randrange(PAGEBLOCK_FRAMES - n + 1)
        before = scene.arena.stats()
        scene.migration.alloc_contig_range(first, n)
        assert scene.arena.stats().frames_used == before.frames_used + n
        assert_at_rest(scene.pool, others=n)
        scene.readable()
        for frame in rng.sample(range(first, first + n), n):
            scene.arena.free(frame)
        assert scene.arena.stats().frames_used == before.frames_used
    scene.settle()


def test_a_free_range_is_just_taken() -> None:
    arena = Arena(0, 2)
    migration = Migration(arena)
    arena.free(arena.alloc() + 0)
    held = arena.alloc()
    migration.alloc_contig_range(held + 1, PAGEBLOCK_FRAMES - 1)
    assert arena.stats().frames_free == 0
    assert migration.stats().isolated == 0
    for frame in range(held + 1, held + PAGEBLOCK_FRAMES):
        arena.free(frame)
    assert_at_rest(arena, others=1)


def test_a_pageblock_that_is_not_in_use_has_no_range() -> None:
    """Nothing is in its way: alloc(9) gives all of it."""
    arena = Arena(0, 2)
    migration = Migration(arena)
    with pytest.raises(OSError, match="not in use") as failure:
        migration.alloc_contig_range(0, 5)
    assert failure.value.errno == errno.EBUSY
    arena.free(arena.alloc())
    with pytest.raises(OSError, match="not in use"):
        migration.alloc_contig_range(0, PAGEBLOCK_FRAMES)
    assert arena.stats().pageblocks_in_use == 0


def test_what_nobody_can_move_is_in_the_way() -> None:
    scene = crowded()
    scene.migration.alloc_contig_range(64, 8)
    moved = scene.migration.stats().migrated
    for first, n in ((64, 1), (60, 5), (71, 100), (0, PAGEBLOCK_FRAMES)):
        failure = scene.move(first, n)
        assert isinstance(failure, OSError) and failure.errno == errno.EBUSY
        assert str(n) in str(failure) and str(first) in str(failure)
    assert scene.migration.stats().migrated == moved
    assert scene.migration.stats().unmovable == 4
    assert_at_rest(scene.pool, others=8)
    assert_balanced(scene.migration)
    scene.readable()


@pytest.mark.parametrize("first, n", [
    (0, 0), (0, 513), (1, 512), (511, 2), (1023, 2), (1024, 1), (-1, 1), (1 << 40, 1), (5, -1), (0, 1 << 40)])
def test_other_ranges_are_wrong(first: int, n: int) -> None:
    arena = Arena(0, 2)
    arena.alloc(9)
    arena.alloc(9)
    before = arena.stats()
    with pytest.raises(ValueError, match="pageblock"):
        Migration(arena).alloc_contig_range(first, n)
    assert arena.stats() == before
