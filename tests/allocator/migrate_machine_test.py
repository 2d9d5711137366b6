# SPDX-License-Identifier: Apache-2.0
"""Any sequence of calls of a pool, migration and a balloon on one arena, against a dictionary."""
from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from allocator import Arena, Balloon, Migration, Pool
from tests.support import capabilities
from tests.support.memory_file import MemoryFile
from tests.support.migration_tools import assert_at_rest, assert_balanced
from tests.support.models import PAGEBLOCK_FRAMES
from tests.support.pool_tools import pattern
from tests.support.scale import scaled

PAGEBLOCK = PAGEBLOCK_FRAMES * 4096
UNIT_FRAMES = 16  # allocator/layout.h
NR_PAGEBLOCKS = 6
NR_FRAMES = NR_PAGEBLOCKS * PAGEBLOCK_FRAMES
SIZES = st.one_of(st.sampled_from([24, 500, 2500, 4096, 4096]), st.integers(1, 4096))
COUNTS = st.integers(0, 1500)


class MigrationMachine(RuleBasedStateMachine):
    @initialize()
    def begin_all(self) -> None:
        self.arena = Arena(0, NR_PAGEBLOCKS)
        self.memory = MemoryFile(self.arena.fileno())
        self.pool = Pool(self.arena)
        self.migration = Migration(self.arena)
        self.balloon = Balloon(self.arena)
        self.objects: dict[int, bytes] = {}
        self.blocks: dict[int, int] = {}  # first frame: number of frames, all stamped with the first
        self.next_tag = 0
        self.limit = 0
        self.injected = False

    # ---- objects ------------------------------------------------------------------------------------

    @rule(size=SIZES, count=st.integers(1, 250))
    def malloc(self, size: int, count: int) -> None:
        for _ in range(count):
            tag, data = self.next_tag, pattern(self.next_tag, size)
            self.next_tag += 1
            try:
                self.pool.malloc(tag, data)
            except MemoryError:
                assert self.injected or self.arena.stats().frames_used > NR_FRAMES - 8
                self.injected = False
                return
            except OSError:
                taken = self.pool.stats().pages + self.balloon.stats().pages
                assert self.limit and taken + 8 > self.limit
                return
            self.objects[tag] = data

    @precondition(lambda self: self.objects)
    @rule(seed=st.integers(0, 1 << 16), share=st.floats(0, 1))
    def free(self, seed: int, share: float) -> None:
        tags = sorted(self.objects)
        for tag in random.Random(seed).sample(tags, max(1, round(share * len(tags)))):
            assert self.pool.free(tag) == len(self.objects.pop(tag))

    @rule()
    def compact(self) -> None:
        promised = sum(c.freeable for c in self.pool.classes())
        assert self.pool.compact() == promised

    @rule(limit=st.one_of(st.just(0), st.integers(1, 2000)))
    def set_limit(self, limit: int) -> None:
        self.pool.set_limit(limit)
        self.limit = limit

    # ---- migration ----------------------------------------------------------------------------------------

    @rule()
    def run(self) -> None:
        before, resident = self.arena.stats(), self.memory.resident()
        freed = self.migration.run()
        after = self.arena.stats()
        assert after.frames_used == before.frames_used
        assert before.pageblocks_in_use - after.pageblocks_in_use == freed
        assert after.bytes_returned - before.bytes_returned == freed * PAGEBLOCK
        if not self.injected:
            # What moved went with its pageblock, and took no more memory elsewhere, but for the rest of a
            # unit in each pageblock: the free frames beside a target are populated with it.
            assert self.memory.resident() <= resident + NR_PAGEBLOCKS * (UNIT_FRAMES - 1) * 4096
        if not self.injected and not self.blocks:
            assert after.pageblocks_in_use == -(-after.frames_used // PAGEBLOCK_FRAMES)
        self.injected = False
        self.arena.inject_failure(0)

    @rule(all_blocks=st.booleans())
    def begin(self, all_blocks: bool) -> None:
        self.migration.begin(all_blocks)

    @rule(times=st.integers(1, 3))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.migration.step()

    def keep(self, first: int, n: int) -> None:
        self.blocks[first] = n
        for frame in range(first, first + n):
            self.arena.frame(frame)[:] = bytes([first & 0xFF, first >> 8 & 0xFF] * 2048)

    @precondition(lambda self: sum(self.blocks.values()) < 1500)
    @rule(order=st.integers(0, 9))
    def contiguous(self, order: int) -> None:
        before = self.arena.stats().frames_used
        try:
            first = self.migration.alloc_contig(order)
        except MemoryError:
            assert self.arena.stats().frames_used == before
            return
        assert first % (1 << order) == 0
        self.keep(first, 1 << order)

    @precondition(lambda self: sum(self.blocks.values()) < 1500)
    @rule(first=st.integers(0, NR_FRAMES - 1), n=st.integers(1, PAGEBLOCK_FRAMES))
    def contiguous_range(self, first: int, n: int) -> None:
        before = self.arena.stats().frames_used
        n = min(n, PAGEBLOCK_FRAMES - first % PAGEBLOCK_FRAMES)
        try:
            self.migration.alloc_contig_range(first, n)
        except (MemoryError, OSError):
            assert self.arena.stats().frames_used == before
            return
        self.keep(first, n)

    @precondition(lambda self: self.blocks)
    @rule(seed=st.integers(0, 1 << 16))
    def free_block(self, seed: int) -> None:
        first = random.Random(seed).choice(sorted(self.blocks))
        n = self.blocks.pop(first)
        for frame in range(first, first + n):
            assert bytes(self.arena.frame(frame)) == bytes([first & 0xFF, first >> 8 & 0xFF] * 2048)
            self.arena.free(frame)

    # ---- balloon ----------------------------------------------------------------------------------------

    @rule(wanted=COUNTS, most=COUNTS, room=st.one_of(st.none(), COUNTS))
    def change_balloon(self, wanted: int, most: int, room: int | None) -> None:
        before = self.balloon.stats().pages
        self.balloon.set_target(wanted)
        change = self.balloon.adjust(most, room)
        assert self.balloon.stats().pages == before + change
        limits = [abs(wanted - before), most] + ([room] if wanted > before and room is not None else [])
        assert abs(change) <= min(limits) and change * (wanted - before) >= 0
        if abs(change) < min(limits):
            # It lacks frames only where there are none.
            assert change >= 0 and (self.injected or self.arena.stats().frames_used == NR_FRAMES)
            self.injected = False

    @rule(after=st.integers(1, 60))
    def inject_failure(self, after: int) -> None:
        self.arena.inject_failure(after)
        self.injected = True

    # ---- what holds after each call -----------------------------------------------------------------

    @invariant()
    def nothing_is_lost(self) -> None:
        assert_at_rest(self.pool, balloon=self.balloon, others=sum(self.blocks.values()))
        assert_balanced(self.migration)
        assert self.pool.stats().objects == len(self.objects)
        in_use = [block for block in self.migration.pageblocks() if block.resident]
        assert sum(block.used for block in in_use) == self.arena.stats().frames_used
        assert sum(block.balloon for block in in_use) == self.balloon.stats().pages

    @invariant()
    def every_object_is_whole(self) -> None:
        for tag, data in self.objects.items():
            assert self.pool.read(tag) == data

    def teardown(self) -> None:
        if not hasattr(self, "arena"):
            return
        self.arena.inject_failure(0)
        self.balloon.set_target(0)
        self.balloon.adjust(1 << 30)
        for first, n in self.blocks.items():
            for frame in range(first, first + n):
                self.arena.free(frame)
        for tag in self.objects:
            self.pool.free(tag)
        assert self.arena.stats().pageblocks_in_use == 0
        with pytest.raises(MemoryError):
            while True:
                self.arena.alloc(9)
        assert self.arena.stats().pageblocks_in_use == NR_PAGEBLOCKS


# A sanitizer makes the checks ten times as slow.
EXAMPLES = 8 if capabilities.missing("unsanitized") else scaled(30, 12)
MigrationMachine.TestCase.settings = settings(max_examples=EXAMPLES, stateful_step_count=25, deadline=None)
TestMigrationMachine = MigrationMachine.TestCase
