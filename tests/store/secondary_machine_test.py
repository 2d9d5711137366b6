# SPDX-License-Identifier: Apache-2.0
"""Any order of writes, discards, recompressions, makings of units, and of dictionaries that are taken and
dropped, in one process and the next: each page keeps its bytes and moves only to what came later, and no
algorithm goes that a page or a unit needs."""
from __future__ import annotations

import os

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.kill_points import copy_of
from tests.support.memory_file import MemoryFile
from tests.support.page_kinds import noise, prose, record
from tests.support.recompress_tools import recompress
from tests.support.scale import scaled
from tests.support.unit_tools import make_units, unit_of
from zramfs.codecs.codec import Codec
from zramfs.store.secondary import count_priorities, drop_secondary, set_secondary
from zramfs.store.store import Store

PAGE = 4096
PAGES = 16
MAKERS = (record, prose, noise)


class SecondaryMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.store = Store(PAGES * PAGE, secondary=[Codec("zstd", 1)])
        self.pages = [bytes(PAGE)] * PAGES
        self.generations = [0, 0, 0, 0]

    def rank(self, priority: int) -> tuple[int, int]:
        return self.generations[priority], priority

    def priorities(self) -> list[int]:
        file = MemoryFile(self.store.migration.arena.fileno())
        return [file.slot(number).prio for number in range(PAGES)]

    @rule(number=st.integers(0, PAGES - 1), kind=st.sampled_from(MAKERS), seed=st.integers(0, 5))
    def write(self, number: int, kind, seed: int) -> None:
        self.pages[number] = kind(seed)
        self.store.write(number * PAGE, self.pages[number])

    @rule(number=st.integers(0, PAGES - 1))
    def discard(self, number: int) -> None:
        self.pages[number] = bytes(PAGE)
        self.store.zero(number * PAGE, PAGE)

    @rule(priority=st.integers(2, 3), level=st.sampled_from((1, 5)), seed=st.integers(6, 9))
    def take(self, priority: int, level: int, seed: int) -> None:
        try:
            set_secondary(self.store, priority, Codec("zstd", level, record(seed)))
        except OSError:
            assert self.generations[priority]
        else:
            assert not self.generations[priority]
            self.generations[priority] = max(self.generations) + 1

    @precondition(lambda self: any(self.generations))
    @rule()
    def drop(self) -> None:
        for priority, generation in enumerate(self.generations):
            if generation:
                needed = priority in self.priorities() or priority == self.unit_priority()
                assert drop_secondary(self.store, priority) is not needed
                self.generations[priority] *= needed

    def unit_priority(self) -> int | None:
        file = MemoryFile(self.store.migration.arena.fileno())
        return unit_of(file, 0).prio if self.store.stats().units else None

    @rule(level=st.sampled_from((1, 5)), thorough=st.booleans(), joins=st.booleans())
    def make_units(self, level: int, thorough: bool, joins: bool) -> None:
        done = make_units(self.store, level=level, thorough=thorough, joins=joins)
        if done.made:
            newest = max(range(4), key=self.generations.__getitem__)
            assert self.unit_priority() == (newest if self.generations[newest] else 0)

    @rule(number=st.integers(0, PAGES - 1))
    def read_twice(self, number: int) -> None:
        """A page of a unit becomes a single one."""
        for _ in range(2):
            assert self.store.read(number * PAGE, PAGE) == self.pages[number]

    @rule(priority=st.integers(1, 3), again=st.booleans(), most=st.sampled_from((2, None)))
    def recompress(self, priority: int, again: bool, most: int | None) -> None:
        if self.store.codecs[priority] is None:
            return
        before = self.priorities()
        done = recompress(self.store, priority, again=again, max_pages=most)
        moved = [old for old, new in zip(before, self.priorities(), strict=True) if old != new]
        assert len(moved) == done.won and all(self.rank(old) < self.rank(priority) for old in moved)

    @rule()
    def another_process(self) -> None:
        copy = copy_of(self.store.migration.arena.fileno())
        self.store.close()
        self.store = Store.adopt(copy)
        os.close(copy)
        assert self.store.recovered.lost == 0

    @invariant()
    def holds(self) -> None:
        assert list(self.store.generations) == self.generations
        assert [self.store.peek(number) for number in range(PAGES)] == self.pages
        counts = [0] * 4
        file = MemoryFile(self.store.migration.arena.fileno())
        for number, (priority, page) in enumerate(zip(self.priorities(), self.pages, strict=True)):
            counts[priority] += (page != bytes(PAGE) and page not in map(noise, range(6))
                                 and file.slot(number).type != "unit")
        # What is stored raw has no algorithm.
        assert list(count_priorities(self.store)) == counts
        self.store.check(3)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()


SecondaryMachine.TestCase.settings = settings(
    max_examples=scaled(40, 8), stateful_step_count=25, deadline=None)
TestSecondaryMachine = SecondaryMachine.TestCase
