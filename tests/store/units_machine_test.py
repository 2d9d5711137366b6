# SPDX-License-Identifier: Apache-2.0
"""Units against a bytearray: any order of writes, reads, discards, idle marks, making of units,
recompression, write-back, compaction, other sizes and adoptions keeps every page, and every sum."""
from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from tests.support.backing_tools import extents
from tests.support.page_kinds import block, hard, noise, prose
from tests.support.store_machine import PAGE, StoreMachine
from zramfs.store.back_upkeep import BackUpkeep
from zramfs.store.unit_making import UnitMaking

FIRST, END = 470, 555  # the pages that are used; a smaller size ends among them
MAKERS = {"prose": prose, "hard": hard, "noise": noise, "text": lambda seed: block("text", seed, PAGE),
          "zeros": lambda seed: bytes(PAGE), "odd word": lambda seed: block("odd word", seed, PAGE)}
SLOT = st.integers(FIRST, END - 1)
SLOTS = st.sets(SLOT, min_size=1, max_size=24)


class UnitsMachine(StoreMachine):
    """Pages that may be idle: read or written pages are not, whatever else is done to them."""

    USED, LIMIT = range(FIRST, END), 40
    KEPT = ("units", "unit_pages", "unit_dead", "unit_bytes", "written_back")
    ROOM = [16, 40, 4096]  # noqa: RUF012 - as in the base class

    @rule(slots=SLOTS, kind=st.sampled_from(sorted(MAKERS)), seed=st.integers(0, 3))
    def write(self, slots: set[int], kind: str, seed: int) -> None:
        for slot in slots:
            self.put(slot * PAGE, MAKERS[kind](seed + slot % 3))

    @rule(first=st.integers(FIRST // 16, END // 16 - 1))
    def fill_a_group(self, first: int) -> None:
        for slot in range(first * 16, first * 16 + 16):
            self.put(slot * PAGE, prose(slot))

    @rule(slot=SLOT, off=st.integers(0, PAGE - 9))
    def write_a_part(self, slot: int, off: int) -> None:
        self.put(slot * PAGE + off, b"changed!")

    @rule(slots=SLOTS)
    def discard(self, slots: set[int]) -> None:
        self.discard_pages(slots)

    @rule(slots=SLOTS, times=st.integers(1, 2))
    def read(self, slots: set[int], times: int) -> None:
        self.read_pages(self.inside(slots) * times)

    @rule(slot=SLOT)
    def peek(self, slot: int) -> None:
        assert self.store.peek(slot) in (None, self.page(slot))

    @initialize(level=st.sampled_from([None, 1, 9]))
    def choose_a_level(self, level: int | None) -> None:
        """One for all: what was tried in vain with one level is not tried again with another."""
        self.level = level

    @rule(idle=st.booleans(), steps=st.sampled_from([1, 3, 1000]), joins=st.booleans(),
          thorough=st.booleans())
    def make_units(self, idle: bool, steps: int, joins: bool, thorough: bool) -> None:
        before = self.store.stats()
        making = UnitMaking(self.store, idle=idle, level=self.level, joins=joins, thorough=thorough)
        for _ in range(steps):
            if not making.step(1):
                break
        done = making.finish()
        after = self.store.stats()
        assert after.unit_pages + done.dissolved == before.unit_pages + done.pages
        assert not done.busy and (joins or not done.pages)

    @rule()
    def come_to_rest(self) -> None:
        """When nobody uses the device, two passes leave nothing to do: a dead place that is left is in a unit
        that would become no smaller."""
        for _ in range(3):
            making = UnitMaking(self.store, joins=False, thorough=False, level=self.level)
            while making.step(1 << 30):
                pass
            done = making.finish()
        assert done.groups == done.no_room
        making = UnitMaking(self.store, joins=False, level=self.level)
        while making.step(1 << 30):
            pass
        done = making.finish()
        assert done.groups == done.kept + done.no_room

    @rule(low=SLOT, n=st.integers(1, 40), mode=st.sampled_from(["idle", None]),
          batch=st.sampled_from([2, 8, 32]), budget=st.sampled_from([1 << 30, 9, 2]))
    def write_back(self, low: int, n: int, mode: str | None, batch: int, budget: int) -> None:
        before, blocks = self.store.stats(), self.store.backing.stats()
        run = self.write_pages_back(low, low + n, mode, batch=batch, budget=budget)
        after = self.store.stats()
        assert after.written_back - before.written_back == run.pages
        assert (run.passed, run.failed) == (0, 0) and run.units * 2 <= run.pages
        assert self.store.backing.stats().writes - blocks.writes <= budget

    @rule(steps=st.sampled_from([1, 3, 1000]))
    def return_worn_units(self, steps: int) -> None:
        before, blocks = self.store.stats(), self.store.backing.stats()
        upkeep = BackUpkeep(self.store)
        for _ in range(steps):
            if not upkeep.step(1):
                break
        done = upkeep.finish()
        after = self.store.stats()
        assert before.written_back - after.written_back == done.pages >= done.units
        assert (done.busy, done.failed) == (0, 0)
        assert self.store.backing.stats().writes == blocks.writes
        if steps == 1000 and not done.no_room:
            left = Counter(extents(self.store).values())
            assert all(pages * PAGE > extent for (_, extent), pages in left.items() if extent > PAGE)

    @rule(most=st.integers(0, 50))
    def trim(self, most: int) -> None:
        self.store.backing.trim(most)


TestUnits = UnitsMachine.TestCase
TestUnits.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
