# SPDX-License-Identifier: Apache-2.0
"""The arena against the set of frames in use: buddy lists, exhaustion, memory given back."""
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from allocator import Arena
from allocator.check import check
from tests.support import models
from tests.support.memory_file import MemoryFile, resident_set
from tests.support.scale import scaled

FRAME = 4096
PAGEBLOCK_FRAMES = 512
PAGEBLOCK = FRAME * PAGEBLOCK_FRAMES


class ArenaMachine(RuleBasedStateMachine):
    """Every step's result and every count is what the model says, and every frame keeps its pattern."""

    BLOCKS = 3

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(0, self.BLOCKS)
        self.model = models.Arena(self.BLOCKS)
        self.fail_after = 0

    def stamp(self, first: int, order: int) -> Iterator[tuple[memoryview, bytes]]:
        for frame in range(first, first + (1 << order)):
            yield self.arena.frame(frame), (first << 16 | order).to_bytes(8, "little")

    @rule(order=st.one_of(st.integers(0, 4), st.integers(0, 9)))
    def alloc(self, order: int) -> None:
        fails = self.fail_after == 1 or not self.model.has_room(order)
        self.fail_after = max(0, self.fail_after - 1)
        if fails:
            with pytest.raises(MemoryError):
                self.arena.alloc(order)
            return
        first = self.arena.alloc(order)
        self.model.alloc(first, order)
        for view, mark in self.stamp(first, order):
            view[:8] = view[-8:] = memoryview(mark)

    @precondition(lambda self: self.model.blocks)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        first = data.draw(st.sampled_from(sorted(self.model.blocks)))
        order = self.model.blocks[first]
        for view, mark in self.stamp(first, order):
            assert bytes(view[:8]) == bytes(view[-8:]) == mark
        self.arena.free(first, order)
        self.model.free(first)

    @precondition(lambda self: self.model.blocks)
    @rule(data=st.data())
    def split(self, data: st.DataObject) -> None:
        """A block may be freed in parts: from here on its halves are blocks of their own."""
        first = data.draw(st.sampled_from(sorted(self.model.blocks)))
        order = self.model.blocks[first]
        if order == 0:
            return
        self.model.blocks[first] = order - 1
        self.model.blocks[first + (1 << order - 1)] = order - 1
        for part in (first, first + (1 << order - 1)):
            for view, mark in self.stamp(part, order - 1):
                view[:8] = view[-8:] = memoryview(mark)

    @rule(after=st.integers(0, 6))
    def inject_failure(self, after: int) -> None:
        self.arena.inject_failure(after)
        self.fail_after = after

    @rule(order=st.integers(0, 9), frame=st.integers(-1, BLOCKS * PAGEBLOCK_FRAMES + 1))
    def free_what_is_not_in_use(self, order: int, frame: int) -> None:
        if frame % (1 << order) == 0 and self.model.is_used(frame, order):
            return
        with pytest.raises(ValueError):
            self.arena.free(frame, order)

    @invariant()
    def sums_hold(self) -> None:
        check(self.arena, 2)

    @invariant()
    def counts_are_the_models(self) -> None:
        stats = self.arena.stats()
        in_use = len(self.model.used)
        assert stats.frames_used == self.model.frames_used()
        assert stats.pageblocks_in_use == in_use
        assert stats.resident == in_use * PAGEBLOCK
        assert stats.frames_free == in_use * PAGEBLOCK_FRAMES - stats.frames_used
        assert (stats.pageblocks_total, stats.punch_errors) == (self.BLOCKS, 0)
        assert self.arena.buddyinfo() == self.model.buddyinfo()

    @invariant()
    def no_memory_outside_pageblocks_in_use(self) -> None:
        held = MemoryFile(self.arena.fileno()).resident()
        # Superblock and descriptors: 1536 frames of 16 bytes, and no zspage.
        assert held <= len(self.model.used) * PAGEBLOCK + 16 * FRAME


ArenaMachine.TestCase.settings = settings(max_examples=scaled(60, 25), stateful_step_count=40, deadline=None)
TestArenaMachine = ArenaMachine.TestCase


# ---- buddy blocks -----------------------------------------------------------------------------

@pytest.mark.parametrize("order", range(10))
def test_one_block_splits_a_pageblock(order: int) -> None:
    arena = Arena(0, 1)
    first = arena.alloc(order)
    assert first % (1 << order) == 0
    assert arena.buddyinfo() == tuple(1 if order <= k < 9 else 0 for k in range(10))
    arena.free(first, order)
    assert arena.buddyinfo() == (0,) * 9 + (1,)


def test_buddies_merge_whatever_the_order_of_freeing() -> None:
    for seed in range(20):
        arena = Arena(0, 1)
        frames = [arena.alloc() for _ in range(PAGEBLOCK_FRAMES)]
        assert arena.buddyinfo() == (0,) * 10
        random.Random(seed).shuffle(frames)
        for n, frame in enumerate(frames, 1):
            assert arena.stats().pageblocks_in_use == 1
            arena.free(frame)
            if n % 64 == 0:
                check(arena, 2)
        assert arena.buddyinfo() == (0,) * 9 + (1,)


def test_two_free_neighbours_that_are_no_buddies_stay_apart() -> None:
    arena = Arena(0, 1)
    frames = sorted(arena.alloc() for _ in range(PAGEBLOCK_FRAMES))
    arena.free(frames[1])
    arena.free(frames[2])
    assert arena.buddyinfo()[:2] == (2, 0)
    arena.free(frames[3])
    assert arena.buddyinfo()[:2] == (1, 1)
    arena.free(frames[0])
    assert arena.buddyinfo()[:3] == (0, 0, 1)


def test_holes_are_filled_before_a_pageblock_is_broken() -> None:
    arena = Arena(0, 4)
    frames = [arena.alloc() for _ in range(2 * PAGEBLOCK_FRAMES)]
    holes = {frames[n] for n in (3, 77, 600, 601)}
    for frame in holes:
        arena.free(frame)
    assert {arena.alloc() for _ in holes} == holes
    assert arena.stats().pageblocks_in_use == 2


def test_small_blocks_are_used_before_large_ones() -> None:
    arena = Arena(0, 2)
    first = arena.alloc(0)  # leaves one free block of each order
    taken = [arena.alloc(0), arena.alloc(1), arena.alloc(0)]
    assert taken[0] == first ^ 1, "the free block of order 0"
    assert taken[1] == first + 2, "the free block of order 1"
    assert taken[2] == first + 4, "half of the half of order 2"
    assert arena.buddyinfo()[:9] == (1, 1, 0, 1, 1, 1, 1, 1, 1)


# ---- exhaustion ---------------------------------------------------------------------------------

@pytest.mark.parametrize("order", [0, 1, 5, 9])
def test_exhaustion_is_a_memory_error_and_leaks_nothing(order: int) -> None:
    arena = Arena(0, 3)
    blocks = [arena.alloc(order) for _ in range(3 * PAGEBLOCK_FRAMES >> order)]
    assert len(set(blocks)) == len(blocks)
    for k in range(10):
        with pytest.raises(MemoryError, match=f"order {k}"):
            arena.alloc(k)
    check(arena, 2)
    assert arena.stats().frames_free == 0
    arena.free(blocks.pop(), order)
    blocks.append(arena.alloc(order))
    for block in blocks:
        arena.free(block, order)
    check(arena, 2)
    assert arena.buddyinfo() == (0,) * 9 + (3,)
    assert arena.stats().bytes_returned >= 3 * PAGEBLOCK


def test_room_that_is_not_in_one_piece_is_no_room() -> None:
    arena = Arena(0, 1)
    frames = sorted(arena.alloc() for _ in range(PAGEBLOCK_FRAMES))
    for frame in frames[::2]:
        arena.free(frame)
    with pytest.raises(MemoryError):
        arena.alloc(1)
    assert arena.alloc(0) in frames[::2]


def test_injected_failure_hits_one_allocation() -> None:
    arena = Arena(0, 1)
    arena.inject_failure(3)
    arena.alloc()
    arena.alloc(2)
    with pytest.raises(MemoryError):
        arena.alloc()
    arena.alloc()
    assert arena.stats().frames_used == 1 + 4 + 1
    check(arena, 2)


# ---- memory -------------------------------------------------------------------------------------

def fill(arena: Arena, first: int, order: int) -> None:
    for frame in range(first, first + (1 << order)):
        arena.frame(frame)[:] = memoryview(bytes([frame & 0xFF or 1]) * FRAME)


def test_a_free_pageblock_gives_its_memory_back() -> None:
    arena = Arena(0, 8)
    file = MemoryFile(arena.fileno())
    empty = file.resident()
    blocks = [arena.alloc(6) for _ in range(4 * 8)]
    for first in blocks:
        fill(arena, first, 6)
    assert file.resident() - empty >= 4 * PAGEBLOCK
    # All but the last block of each pageblock: nothing is whole yet, and nothing goes back.
    for n, first in enumerate(blocks):
        if n % 8 != 7:
            arena.free(first, 6)
    assert file.resident() - empty >= 4 * PAGEBLOCK
    for n, first in enumerate(blocks[7::8], 1):
        arena.free(first, 6)
        assert file.resident() - empty <= (4 - n) * PAGEBLOCK + 16 * FRAME
        assert arena.stats().resident == (4 - n) * PAGEBLOCK
        assert arena.stats().bytes_returned == n * PAGEBLOCK
    assert arena.stats().pageblocks_in_use == 0


def test_a_pageblock_that_comes_back_is_empty() -> None:
    arena = Arena(0, 1)
    for _ in range(3):
        first = arena.alloc(9)
        assert not any(bytes(arena.frame(first + n)) != bytes(FRAME) for n in range(0, 512, 37))
        fill(arena, first, 9)
        arena.free(first, 9)


def test_frames_do_not_overlap() -> None:
    arena = Arena(4096 * 3 + 1, 2)
    frames = [arena.alloc() for _ in range(2 * PAGEBLOCK_FRAMES)]
    for frame in frames:
        arena.frame(frame)[:] = memoryview(frame.to_bytes(2, "little") * 2048)
    for frame in frames:
        assert bytes(arena.frame(frame)) == frame.to_bytes(2, "little") * 2048
    check(arena, 2)


@pytest.mark.requires("unsanitized")
def test_a_huge_arena_costs_nothing() -> None:
    before = resident_set()
    arena = Arena((1 << 46) - 1, (1 << 22))  # 64 TiB of user region, 8 TiB of frames
    file = MemoryFile(arena.fileno())
    assert file.resident() <= 2 * FRAME
    first = arena.alloc()
    arena.frame(first)[0] = 1
    check(arena, 2)
    # 16 frames get their memory together; the rest of the pageblock takes none.
    assert file.resident() <= 32 * FRAME
    assert resident_set() - before < 1 << 20
    arena.free(first)


def test_only_frames_ask_for_huge_pages_and_no_core_dump_has_them() -> None:
    """Advice that the machine follows if its shmem_enabled says so."""
    arena = Arena(64 << 20, 4)
    file = os.fstat(arena.fileno())
    flags: dict[tuple[int, int], set[str]] = {}
    place = (0, 0)
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+)", line):
            mine = int(match[3]) == file.st_ino
            place = (int(match[1], 16), int(match[2], 16)) if mine else (0, 0)
        elif line.startswith("VmFlags:") and place[0]:
            flags[place] = set(line.split()[1:])
    huge = [(start, end) for (start, end), words in flags.items() if "hg" in words]
    assert [end - start for start, end in huge] == [4 * PAGEBLOCK]
    assert sum(end - start for start, end in flags) == file.st_size
    assert all("dd" in words for words in flags.values())


def test_close_gives_everything_back_and_is_final() -> None:
    arena = Arena(0, 4)
    first = arena.alloc(9)
    fill(arena, first, 9)
    before = resident_set()
    arena.close()
    assert before - resident_set() >= PAGEBLOCK // 2
    arena.close()
    for call in (arena.alloc, arena.stats, arena.buddyinfo, arena.fileno, lambda: arena.free(first, 9),
                 lambda: arena.frame(first), lambda: check(arena), lambda: arena.inject_failure(1)):
        with pytest.raises(ValueError, match="closed"):
            call()


# ---- bad arguments ------------------------------------------------------------------------------

@pytest.mark.parametrize("user_size, nr_pageblocks", [(-1, 1), (1 << 46, 1), (0, 0), (0, -1), (0, 1 << 23)])
def test_sizes_out_of_range(user_size: int, nr_pageblocks: int) -> None:
    with pytest.raises(ValueError, match="expected, got"):
        Arena(user_size, nr_pageblocks)


@pytest.mark.parametrize("order", [-1, 10, 64])
def test_orders_out_of_range(order: int) -> None:
    arena = Arena(0, 1)
    with pytest.raises(ValueError):
        arena.alloc(order)
    with pytest.raises(ValueError):
        arena.free(0, order)


def test_a_bad_call_changes_nothing() -> None:
    """Also not the lock: the next call still gets it."""
    arena = Arena(0, 1)
    first = arena.alloc(3)
    with pytest.raises(OverflowError):
        arena.inject_failure(-1)
    for bad in (lambda: arena.free(first + 1, 3), lambda: arena.free(first + 8), lambda: arena.free(first, 4),
                lambda: arena.free(-8, 3), lambda: arena.free(1 << 40), lambda: arena.frame(first + 8),
                lambda: arena.frame(-1), lambda: arena.frame(1 << 40)):
        with pytest.raises(ValueError):
            bad()
    assert arena.stats().frames_used == 8
    arena.free(first, 3)
    with pytest.raises(ValueError):
        arena.free(first, 3)
    check(arena, 2)
