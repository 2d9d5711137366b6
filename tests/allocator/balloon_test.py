# SPDX-License-Identifier: Apache-2.0
"""The balloon: frames that the host has and the pool has not, and a second owner of movable pages."""
from __future__ import annotations

import errno
import gc
import random
import threading
from functools import partial
from types import ModuleType

import pytest

from allocator import Arena, Balloon, BalloonStats, Migration, Pool
from tests.support import native
from tests.support.memory_file import MemoryFile
from tests.support.migration_tools import assert_at_rest, assert_balanced, fill, in_threads, touch, until
from tests.support.models import PAGEBLOCK_FRAMES
from tests.support.pool_tools import pattern
from tests.support.scale import scaled

FRAME = 4096
PAGEBLOCK = PAGEBLOCK_FRAMES * FRAME
BALLOON = 2  # OWNER_BALLOON
ALL = 1 << 40


@pytest.fixture(scope="module")
def probe() -> ModuleType:
    return native.load("probe")


def to(balloon: Balloon, pages: int, **limits: int) -> int:
    balloon.set_target(pages)
    return balloon.adjust(ALL, **limits)


def frames_of(arena: Arena) -> set[int]:
    """Frames that say they are the balloon's."""
    memory = MemoryFile(arena.fileno())
    frames = range(arena.stats().pageblocks_total * PAGEBLOCK_FRAMES)
    return {n for n in frames if memory.page(n).owner == BALLOON}


# ---- in and out ---------------------------------------------------------------------------------------

def test_frames_leave_the_pool_and_come_back() -> None:
    arena = Arena(0, 2)
    balloon = Balloon(arena)
    assert balloon.stats() == BalloonStats(0, 0, 0, 0)
    assert to(balloon, 700) == 700
    assert balloon.stats() == BalloonStats(target=700, pages=700, isolated=0, migrated=0)
    assert balloon.adjust(ALL) == 0
    assert_at_rest(arena, balloon=balloon)
    assert len(frames_of(arena)) == 700
    assert arena.stats().resident == 2 * PAGEBLOCK - 700 * FRAME
    assert len(fill(arena)) == 2 * PAGEBLOCK_FRAMES - 700
    assert to(balloon, 100) == -600
    assert len(fill(arena)) == 600
    assert to(balloon, 0) == -100
    assert len(fill(arena)) == 100
    assert frames_of(arena) == set()
    assert balloon.stats() == BalloonStats(0, 0, 0, 0)


def test_the_host_gets_the_memory() -> None:
    """Of frames that were touched; each makes the memory file one page smaller."""
    arena = Arena(0, 2)
    memory, balloon = MemoryFile(arena.fileno()), Balloon(arena)
    frames = fill(arena)
    touch(arena, frames)
    for frame in frames[100:]:
        arena.free(frame)
    before, resident = memory.resident(), arena.stats().resident
    assert arena.stats().pageblocks_in_use == 1
    assert to(balloon, 300) == 300
    assert before - memory.resident() == resident - arena.stats().resident == 300 * FRAME
    # They come back without memory, and empty.
    assert to(balloon, 0) == -300
    assert memory.resident() == before - 300 * FRAME
    again = [arena.alloc() for _ in range(PAGEBLOCK_FRAMES - 100)]
    assert sum(bytes(arena.frame(frame)) == bytes(FRAME) for frame in again) == 300


def test_a_step_has_a_size() -> None:
    balloon = Balloon(Arena(0, 2))
    balloon.set_target(100)
    assert [balloon.adjust(40) for _ in range(4)] == [40, 40, 20, 0]
    balloon.set_target(10)
    assert [balloon.adjust(50) for _ in range(3)] == [-50, -40, 0]
    assert balloon.adjust(0) == 0
    for target in (20, 0):
        balloon.set_target(target)
        assert balloon.adjust(0) == balloon.adjust(-5) == 0
        assert balloon.stats().pages == 10


def test_room_holds_it_back() -> None:
    """What is already in the balloon is not given back for it."""
    balloon = Balloon(Arena(0, 2))
    balloon.set_target(100)
    assert balloon.adjust(ALL, room=30) == 30
    assert balloon.adjust(10, room=30) == 10
    assert balloon.adjust(ALL, 0) == balloon.adjust(ALL, -7) == 0
    balloon.set_target(35)
    assert balloon.adjust(ALL, room=0) == -5


def test_what_is_not_there_is_not_taken() -> None:
    arena = Arena(0, 2)
    balloon = Balloon(arena)
    held = [arena.alloc() for _ in range(1000)]
    assert to(balloon, 500) == 24
    assert balloon.adjust(ALL) == 0
    assert balloon.stats() == BalloonStats(target=500, pages=24, isolated=0, migrated=0)
    with pytest.raises(MemoryError):
        arena.alloc()
    # It goes on growing when frames come free.
    arena.free(held.pop())
    assert balloon.adjust(ALL) == 1
    arena.inject_failure(3)
    for frame in held[:10]:
        arena.free(frame)
    assert balloon.adjust(ALL) == 2
    assert balloon.adjust(ALL) == 8
    assert_at_rest(arena, balloon=balloon, others=989)


def test_targets_out_of_range() -> None:
    balloon = Balloon(Arena(0, 2))
    balloon.set_target(7)
    for pages in (-1, 2 * PAGEBLOCK_FRAMES + 1, 1 << 70):
        with pytest.raises(ValueError, match="target of 0 to 1024 pages"):
            balloon.set_target(pages)
    with pytest.raises(TypeError):
        balloon.set_target("7")
    assert balloon.target == balloon.stats().target == 7
    balloon.set_target(2 * PAGEBLOCK_FRAMES)
    assert balloon.adjust(ALL) == 2 * PAGEBLOCK_FRAMES


# ---- as an owner of movable pages -----------------------------------------------------------------------

def test_compaction_moves_it() -> None:
    """Without any change in the core. The frames it had, and those it has now, hold no memory."""
    arena = Arena(0, 3)
    memory, balloon, migration = MemoryFile(arena.fileno()), Balloon(arena), Migration(arena)
    frames = [arena.alloc() for _ in range(2 * PAGEBLOCK_FRAMES)]
    touch(arena, frames)
    for frame in frames[:400]:
        arena.free(frame)
    assert to(balloon, 50) == 50
    here = frames_of(arena)
    assert here < set(range(PAGEBLOCK_FRAMES))
    for frame in frames[400:512] + frames[900:]:
        arena.free(frame)
    resident, before = memory.resident(), arena.stats()
    assert migration.run() == 1
    assert balloon.stats() == BalloonStats(target=50, pages=50, isolated=0, migrated=50)
    there = frames_of(arena)
    assert len(there) == 50 and min(there) >= PAGEBLOCK_FRAMES
    assert arena.stats().bytes_returned == before.bytes_returned + PAGEBLOCK
    # 462 frames with memory went with the pageblock; 50 that the balloon moved to were punched.
    assert resident - memory.resident() == PAGEBLOCK == before.resident - arena.stats().resident
    assert_at_rest(arena, balloon=balloon, others=388)
    assert to(balloon, 0) == -50
    assert frames_of(arena) == set()


def test_pages_of_both_owners_share_a_pageblock() -> None:
    arena = Arena(0, 4)
    balloon, migration, pool = Balloon(arena), Migration(arena), Pool(arena)
    for tag in range(0, 600, 3):
        for other in range(3):
            pool.malloc(tag + other, pattern(tag + other, FRAME))
        to(balloon, tag // 3 + 1)
    for tag in range(1, 600, 2):
        pool.free(tag)
    assert arena.stats().pageblocks_in_use == 2
    assert migration.run() == 1
    assert arena.stats().frames_used == 500 and arena.stats().pageblocks_in_use == 1
    assert balloon.stats().migrated > 0
    assert_at_rest(pool, balloon=balloon)
    assert all(pool.read(tag) == pattern(tag, FRAME) for tag in range(0, 600, 2))
    assert to(balloon, 0) == -200


def test_a_page_that_could_not_move_is_put_back(probe: ModuleType) -> None:
    arena = Arena(0, 3)
    balloon, migration = Balloon(arena), Migration(arena)
    to(balloon, 5)
    owner = probe.ScriptedOwner(arena, 1)
    owner.script(owner.add(1), refuse=1)
    with pytest.raises(OSError) as failure:
        migration.alloc_contig_range(0, 6)
    assert failure.value.errno == errno.EBUSY
    assert migration.stats().put_back == 5
    assert balloon.stats() == BalloonStats(5, 5, 0, 0)
    assert_at_rest(arena, balloon=balloon, others=1)
    arena.inject_failure(3)
    with pytest.raises(MemoryError):
        migration.alloc_contig_range(0, 6)
    assert balloon.stats() == BalloonStats(5, 5, 0, 4)
    assert len(frames_of(arena)) == 5
    assert_at_rest(arena, balloon=balloon, others=1)
    assert to(balloon, 0) == -5


@pytest.mark.parametrize("step", ["on_isolate", "on_migrate"])
def test_deflated_during_a_migration(probe: ModuleType, step: str) -> None:
    """Pages under migration stay until it has ended."""
    arena = Arena(0, 3)
    balloon, migration = Balloon(arena), Migration(arena)
    to(balloon, 10)
    owner = probe.ScriptedOwner(arena, 1)
    page = owner.add(1)
    assert owner.frame(page) == 10
    shrunk: list[tuple[int, BalloonStats]] = []
    owner.script(page, **{step: lambda: shrunk.append((to(balloon, 2), balloon.stats()))})
    migration.alloc_contig_range(5, 6)
    if step == "on_isolate":
        # The first five are not in the range, the others isolated.
        assert shrunk == [(-5, BalloonStats(target=2, pages=5, isolated=5, migrated=0))]
        assert balloon.adjust(ALL) == -3
    else:
        assert shrunk == [(-8, BalloonStats(target=2, pages=2, isolated=0, migrated=5))]
    assert balloon.stats().pages == 2
    assert_at_rest(arena, balloon=balloon, others=1 + 6)


def test_inflated_during_a_migration(probe: ModuleType) -> None:
    """Its new pages come from other pageblocks."""
    arena = Arena(0, 3)
    balloon, migration = Balloon(arena), Migration(arena)
    to(balloon, 10)
    owner = probe.ScriptedOwner(arena, 1)
    owner.script(owner.add(1), on_isolate=lambda: to(balloon, 30))
    migration.alloc_contig_range(0, 11)
    assert balloon.stats() == BalloonStats(target=30, pages=30, isolated=0, migrated=10)
    assert min(frames_of(arena)) >= PAGEBLOCK_FRAMES
    assert_at_rest(arena, balloon=balloon, others=1 + 11)
    assert owner.violations == 0


# ---- its end -----------------------------------------------------------------------------------------------

def test_a_balloon_that_goes_gives_its_frames_back() -> None:
    arena = Arena(0, 2)
    balloon = Balloon(arena)
    to(balloon, 300)
    del balloon
    assert arena.stats().pageblocks_in_use == 0 and arena.stats().resident == 0
    assert len(fill(arena)) == 2 * PAGEBLOCK_FRAMES


def test_a_balloon_ends_with_its_arena() -> None:
    arena = Arena(0, 2)
    balloon = Balloon(arena)
    to(balloon, 300)
    arena.close()
    calls = [balloon.stats, partial(balloon.adjust, 1), partial(balloon.set_target, 1),
             partial(Balloon, arena)]
    del balloon, arena
    while calls:
        with pytest.raises(ValueError, match="closed"):
            calls.pop()()
    gc.collect()


# ---- threads -------------------------------------------------------------------------------------------

def test_it_changes_while_its_pages_are_moved() -> None:
    arena = Arena(0, 6)
    balloon, migrations = Balloon(arena), [Migration(arena), Migration(arena)]
    over = threading.Event()
    highest = 6 * PAGEBLOCK

    def change(seed: int) -> None:
        rng = random.Random(seed)
        for _ in until(scaled(120, 40), lambda: balloon.stats().migrated > 500):
            balloon.set_target(rng.randrange(1500))
            balloon.adjust(rng.randrange(400))
        over.set()

    def compact() -> None:
        while not over.is_set():
            migrations[0].run()

    def contiguous() -> None:
        rng = random.Random(3)
        while not over.is_set():
            try:
                frame = migrations[1].alloc_contig(order := rng.randrange(10))
            except MemoryError:
                continue
            arena.free(frame, order)

    def look() -> None:
        while not over.is_set():
            # Below zero it would be near 2^64.
            assert 0 <= arena.stats().resident <= highest
            stats = balloon.stats()
            assert 0 <= stats.isolated <= stats.pages <= 6 * PAGEBLOCK_FRAMES
            assert sum(block.balloon for block in migrations[0].pageblocks()) <= 6 * PAGEBLOCK_FRAMES

    in_threads(lambda: change(1), lambda: change(2), compact, contiguous, look, over=over)
    for migration in migrations:
        assert_balanced(migration)
    assert_at_rest(arena, balloon=balloon)
    # What migration has done is counted in the arena, for all that drive it.
    assert balloon.stats().migrated == migrations[0].stats().migrated == migrations[1].stats().migrated
    to(balloon, 0)
    assert arena.stats().pageblocks_in_use == 0


def test_balloons_come_and_go_while_their_pages_are_moved() -> None:
    arena = Arena(0, 4)
    migration = Migration(arena)
    over = threading.Event()

    def owner() -> None:
        for n in until(scaled(60, 20), lambda: migration.stats().migrated > 500):
            balloon = Balloon(arena)
            to(balloon, 900)
            to(balloon, 20 * n % 300 + 1)
            to(balloon, 500)
            del balloon
        over.set()

    def mover() -> None:
        rng = random.Random(2)
        while not over.is_set():
            first = rng.randrange(0, 2 * PAGEBLOCK_FRAMES, 64)
            try:
                migration.alloc_contig_range(first, 64)
            except (OSError, MemoryError):
                continue
            for frame in range(first, first + 64):
                arena.free(frame)

    in_threads(owner, mover, over=over)
    assert_balanced(migration)
    assert_at_rest(arena)
    assert arena.stats().pageblocks_in_use == 0
