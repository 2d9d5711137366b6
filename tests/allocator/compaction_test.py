# SPDX-License-Identifier: Apache-2.0
"""Compaction runs and contiguous allocation: which pageblocks are emptied, in which order, when it is
given up, and how much memory that gives back."""
from __future__ import annotations

import random
from types import ModuleType

import pytest

from allocator import Arena, Balloon, Migration, PageblockStats
from tests.support import native
from tests.support.memory_file import MemoryFile
from tests.support.migration_tools import assert_at_rest, assert_balanced, fill, in_threads, touch
from tests.support.models import PAGEBLOCK_FRAMES

PAGEBLOCK = PAGEBLOCK_FRAMES * 4096
BATCH = 32
MAX_DEFER = 64


@pytest.fixture(scope="module")
def probe() -> ModuleType:
    return native.load("probe")


class Blocks:
    """Pageblocks with so many movable pages each, at random places; every frame has been touched."""

    def __init__(self, probe: ModuleType, *used: int, spare: int = 0, seed: int = 1) -> None:
        self.arena = Arena(0, len(used) + spare)
        self.migration = Migration(self.arena)
        self.memory = MemoryFile(self.arena.fileno())
        self.owner = probe.ScriptedOwner(self.arena, 2)
        rng = random.Random(seed)
        frames = [self.arena.alloc() for _ in range(len(used) * PAGEBLOCK_FRAMES)]
        touch(self.arena, frames)
        free = set(frames)
        for block, n in enumerate(used):
            mine = range(block * PAGEBLOCK_FRAMES, (block + 1) * PAGEBLOCK_FRAMES)
            for frame in sorted(rng.sample(mine, n)):
                self.arena.free(frame)
                free.discard(frame)
                assert self.owner.frame(self.owner.add(frame)) == frame
        for frame in free:
            self.arena.free(frame)
        assert self.used() == list(used) + [0] * spare

    def used(self) -> list[int]:
        """Frames in use in each pageblock there can be."""
        found = [block.used for block in self.migration.pageblocks()]
        return found + [0] * (self.arena.stats().pageblocks_total - len(found))

    def settle(self, others: int = 0) -> None:
        assert self.owner.violations == 0
        assert_balanced(self.migration)
        assert_at_rest(self.arena, others=len(self.owner) + others)
        assert all(self.owner.intact(i) for i in range(len(self.owner)))


# ---- what a run wins -----------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(12))
def test_a_run_leaves_as_few_pageblocks_as_arithmetic_allows(probe: ModuleType, seed: int) -> None:
    rng = random.Random(seed)
    used = [rng.randrange(1, (PAGEBLOCK_FRAMES, 60, 300)[seed % 3]) for _ in range(rng.randrange(2, 10))]
    blocks = Blocks(probe, *used, seed=seed)
    before, resident = blocks.arena.stats(), blocks.memory.resident()
    least = -(-sum(used) // PAGEBLOCK_FRAMES)
    assert blocks.migration.run() == len(used) - least
    after = blocks.arena.stats()
    won = (before.pageblocks_in_use - after.pageblocks_in_use) * PAGEBLOCK
    assert after.pageblocks_in_use == least
    # The memory file is smaller by these pageblocks, and by nothing else.
    assert resident - blocks.memory.resident() == won == before.resident - after.resident
    assert after.bytes_returned - before.bytes_returned == won
    stats = blocks.migration.stats()
    assert stats.blocks_freed == len(used) - least and stats.runs == 1
    assert stats.put_back == stats.no_target == stats.busy == stats.again == 0
    blocks.settle()
    # A second one has nothing to win.
    assert blocks.migration.run() == 0
    assert blocks.migration.stats().isolated == stats.isolated


def test_the_sparsest_go_first_into_the_fullest(probe: ModuleType) -> None:
    blocks = Blocks(probe, 200, 10, 430, 50, 512, 300)
    blocks.migration.begin()
    assert blocks.migration.step()
    assert blocks.used() == [200, 0, 440, 50, 512, 300]
    assert blocks.migration.step()
    assert blocks.used() == [200, 0, 490, 0, 512, 300]
    # 200 pages fit into the 22 and 212 places that are left.
    assert blocks.migration.step()
    assert blocks.used() == [0, 0, 512, 0, 512, 478]
    assert not blocks.migration.step()
    assert blocks.migration.stats().migrated == 260
    blocks.settle()


@pytest.mark.parametrize("used", [(), (5,), (512, 512), (300, 300), (400, 200, 512), (512, 1)], ids=str)
def test_nothing_to_win_moves_nothing(probe: ModuleType, used: tuple[int, ...]) -> None:
    blocks = Blocks(probe, *used, spare=1)
    assert blocks.migration.run() == 0
    stats = blocks.migration.stats()
    assert stats.isolated == stats.scanned == stats.migrated == 0
    assert blocks.used() == [*used, 0]


def test_a_step_without_a_run() -> None:
    migration = Migration(Arena(0, 4))
    assert not migration.step()
    migration.begin()
    assert not migration.step() and not migration.step()
    assert migration.stats().runs == 1 and migration.stats().ns >= 0


def test_a_run_that_is_begun_again_starts_anew(probe: ModuleType) -> None:
    blocks = Blocks(probe, 10, 20, 30)
    blocks.migration.begin()
    assert blocks.migration.step()
    blocks.migration.begin()
    assert blocks.migration.step() and not blocks.migration.step()
    assert blocks.used() == [0, 0, 60]
    assert blocks.migration.stats().runs == 2
    blocks.settle()


def test_a_closed_arena_is_not_compacted() -> None:
    arena = Arena(0, 2)
    migration = Migration(arena)
    migration.begin()
    arena.close()
    calls = (migration.begin, migration.step, migration.run, migration.stats, migration.pageblocks,
             lambda: migration.alloc_contig(0), lambda: migration.alloc_contig_range(0, 1))
    for call in calls:
        with pytest.raises(ValueError, match="closed"):
            call()


# ---- what changes during a run -----------------------------------------------------------------------------

def test_busy_pages_cost_no_targets(probe: ModuleType) -> None:
    """As many places as pages: each must serve, however often the pages say not now."""
    blocks = Blocks(probe, 100, 412)
    for i in range(100):
        blocks.owner.script(i, again=i % 4)
    assert blocks.migration.run() == 1
    assert blocks.used() == [0, 512]
    assert blocks.migration.stats().again == 0
    blocks.settle()


def test_frames_freed_behind_the_free_scanner(probe: ModuleType) -> None:
    """They merge with the free block in front of it: its head is behind the scanner then."""
    arena = Arena(0, 2)
    owner = probe.ScriptedOwner(arena, 2)
    for i in range(200):
        assert owner.frame(owner.add(i)) == i
    anchor = arena.alloc(8)
    assert anchor == 256
    second = arena.alloc(9)
    arena.free(anchor, 8)
    arena.free(second + 256, 8)
    migration = Migration(arena)
    # The first batch is moved to the frames from second + 256 on, and freed before the next one moves.
    owner.script(BATCH, on_isolate=lambda: [owner.free(i) for i in range(BATCH)])
    assert migration.run() == 1
    assert migration.stats().no_target == 0
    assert arena.stats().pageblocks_in_use == 1
    assert owner.violations == 0 and all(owner.intact(i) for i in range(BATCH, 200))
    assert_at_rest(arena, others=200 - BATCH + 256)


def test_a_target_given_back_during_the_run_is_no_room(probe: ModuleType) -> None:
    blocks = Blocks(probe, 10, 20)
    blocks.migration.begin()
    for i in range(10, 30):
        blocks.owner.free(i)
    assert blocks.used() == [10, 0]
    assert not blocks.migration.step()
    assert blocks.migration.stats().isolated == 0


def test_a_source_given_back_during_the_run_is_passed_by(probe: ModuleType) -> None:
    blocks = Blocks(probe, 10, 20, 30)
    blocks.migration.begin()
    for i in range(10):
        blocks.owner.free(i)
    assert blocks.migration.step()
    assert blocks.migration.stats().isolated == 0
    assert blocks.migration.step()
    assert blocks.used() == [0, 0, 50]


def test_the_run_ends_when_the_targets_are_used_up(probe: ModuleType) -> None:
    """Others were faster. What has moved stays moved, the rest stays where it is."""
    blocks = Blocks(probe, 100, 412)
    taken: list[int] = []

    def take() -> None:
        taken.extend(blocks.arena.alloc() for _ in range(20))

    blocks.owner.script(50, on_migrate=take)
    assert blocks.migration.run() == 0
    assert blocks.used() == [20, 512]
    stats = blocks.migration.stats()
    assert (stats.migrated, stats.refused, stats.blocks_freed) == (80, 0, 0)
    assert stats.no_target == stats.put_back > 0
    blocks.settle(others=20)


def test_threads_drive_one_run(probe: ModuleType) -> None:
    """They take turns; nothing is freed under anybody's feet."""
    blocks = Blocks(probe, *[30] * 10, *[400] * 6)
    over = []

    def drive() -> None:
        for _ in range(300):
            blocks.migration.begin(True)
            while blocks.migration.step():
                blocks.migration.stats()
                blocks.migration.pageblocks()
        over.append(True)

    def use() -> None:
        rng = random.Random(8)
        while len(over) < 2:
            order = rng.randrange(10)
            try:
                frame = blocks.arena.alloc(order)
            except MemoryError:
                continue
            blocks.arena.free(frame, order)

    in_threads(drive, drive, use)
    assert blocks.arena.stats().pageblocks_in_use == 6
    blocks.settle()


# ---- pageblocks that can't win ----------------------------------------------------------------------------

def test_an_unmovable_frame_keeps_its_pageblock(probe: ModuleType) -> None:
    blocks = Blocks(probe, 10, 20, 40, 300)
    blocks.arena.alloc()
    (stuck,) = (n for n, now in enumerate(blocks.used()) if now not in (10, 20, 40, 300))
    blocks.migration.run()
    used = blocks.used()
    assert used[stuck] > 0 and used.count(0) == (2 if stuck != 3 else 3)
    stats = blocks.migration.stats()
    assert stats.put_back == 0
    assert stats.unmovable == (stuck != 3)
    blocks.settle(others=1)


def attempts(runs: int) -> list[int]:
    """Runs that try a pageblock that always fails: passed by for 1, 2, 4 ... 64 runs, then 64 each time."""
    found, run, defer = [], 0, 0
    while run < runs:
        found.append(run)
        defer = min(MAX_DEFER, defer * 2 or 1)
        run += defer + 1
    return found


def test_failing_pageblocks_are_deferred_ever_longer(probe: ModuleType) -> None:
    blocks = Blocks(probe, 10, 100)
    for i in range(10):
        blocks.owner.script(i, refuse=1000)
    tried = []
    for run in range(340):
        before = blocks.migration.stats()
        blocks.migration.begin()
        while blocks.migration.step():
            pass
        after = blocks.migration.stats()
        # Either it was tried, and its first page refused, or it was passed by.
        assert (after.busy - before.busy) + (after.deferred - before.deferred) == 1
        if after.busy != before.busy:
            tried.append(run)
    assert tried == attempts(340) == [0, 2, 5, 10, 19, 36, 69, 134, 199, 264, 329]
    assert blocks.memory.pageblock(0).defer == MAX_DEFER
    # Somebody who asks for a whole run does not want to hear of that.
    before = blocks.migration.stats()
    assert blocks.migration.run() == 0
    assert blocks.migration.stats().busy == before.busy + 1
    for i in range(10):
        blocks.owner.script(i)
    assert blocks.migration.run() == 1
    blocks.settle()
    # Its next life begins without the failures of this one.
    frames = fill(blocks.arena)
    assert (blocks.memory.pageblock(0).skip, blocks.memory.pageblock(0).defer) == (0, 0)
    for frame in frames:
        blocks.arena.free(frame)


# ---- what people see ------------------------------------------------------------------------------------

def test_pageblocks_are_told_as_they_are(probe: ModuleType) -> None:
    arena = Arena(0, 4)
    migration, balloon = Migration(arena), Balloon(arena)
    assert migration.pageblocks() == []
    balloon.set_target(5)
    balloon.adjust(5)
    owner = probe.ScriptedOwner(arena, 1)
    for i in range(7):
        owner.add(i)
    unmovable = arena.alloc()
    whole = arena.alloc(9)
    arena.free(whole, 9)
    seen: list[list[PageblockStats]] = []
    owner.script(6, on_isolate=lambda: seen.append(migration.pageblocks()))
    expected = [PageblockStats(499, 13, 12, 0, 5, True), PageblockStats(512, 0, 0, 0, 0, False)]
    assert migration.pageblocks() == expected
    assert migration.alloc_contig_range(0, 12) is None
    assert seen == [[PageblockStats(499, 13, 12, 11, 5, True), expected[1]]]
    arena.free(unmovable)
