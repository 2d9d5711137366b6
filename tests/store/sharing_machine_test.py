# SPDX-License-Identifier: Apache-2.0
"""Shared pages against a bytearray: any order of writes, reads, discards, idle marks, sharing, units,
recompression, write-back, compaction, other sizes and adoptions keeps every page, and every sum."""
from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from tests.support.memory_file import MemoryFile
from tests.support.page_kinds import block, hard, noise, prose
from tests.support.share_tools import cell_of, shared_cell
from tests.support.store_machine import PAGE, StoreMachine
from tests.support.unit_tools import make_units
from zramfs.store.sharing import Sharing

FIRST, END = 490, 530  # the pages that are used; a smaller size ends among them
MAKERS = {"prose": prose, "hard": hard, "noise": noise, "zeros": lambda seed: bytes(PAGE),
          "odd word": lambda seed: block("odd word", seed, PAGE)}
SLOT = st.integers(FIRST, END - 1)
SLOTS = st.sets(SLOT, min_size=1, max_size=12)


class SharingMachine(StoreMachine):
    """Few contents, so that most pages have an equal one. After a whole sharing each page that may share has
    the cell of all its equals."""

    USED, LIMIT, KEPT = range(FIRST, END), 20, ("shared_pages", "shared_objects", "shared_bytes")

    @rule(slots=SLOTS, kind=st.sampled_from(sorted(MAKERS)), seed=st.integers(0, 2))
    def write(self, slots: set[int], kind: str, seed: int) -> None:
        for slot in slots:
            self.put(slot * PAGE, MAKERS[kind](seed + slot % 2))

    @rule(slot=SLOT, off=st.integers(0, PAGE - 9))
    def write_a_part(self, slot: int, off: int) -> None:
        self.put(slot * PAGE + off, b"changed!")

    @rule(slots=SLOTS)
    def discard(self, slots: set[int]) -> None:
        self.discard_pages(slots)

    @rule(slots=SLOTS)
    def read(self, slots: set[int]) -> None:
        self.read_pages(self.inside(slots))

    @rule(idle=st.booleans(), steps=st.integers(1, 60))
    def share_some(self, idle: bool, steps: int) -> None:
        sharing = Sharing(self.store, idle=idle)
        for _ in range(steps):
            if not sharing.step(0):
                break
        assert sharing.finish().busy == 0

    @rule()
    def share(self) -> None:
        sharing = Sharing(self.store)
        while sharing.step(1 << 30):
            pass
        done = sharing.finish()
        assert done.busy == 0
        if done.no_room:
            assert self.limited
            return
        file = MemoryFile(self.fd)
        cells: dict[bytes, int] = {}
        for slot in self.inside(set(range(FIRST, END))):
            kind, page = file.slot(slot).type, self.page(slot)
            if kind == "shared":
                cell = shared_cell(file, slot)
                assert cells.setdefault(page, cell) == cell and cell_of(file, cell).users > 1
            elif kind in ("obj", "huge"):
                assert page not in cells
                cells[page] = -1
        assert len({cell for cell in cells.values() if cell >= 0}) == self.store.stats().shared_objects

    @rule()
    def make_units(self) -> None:
        make_units(self.store)

    @rule(low=SLOT, n=st.integers(1, 20))
    def write_back(self, low: int, n: int) -> None:
        self.write_pages_back(low, low + n, None)

    def expect_recovered(self) -> None:
        assert self.store.recovered.lost == self.store.recovered.objects_freed == 0


TestSharing = SharingMachine.TestCase
TestSharing.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
