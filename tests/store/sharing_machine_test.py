# SPDX-License-Identifier: Apache-2.0
"""Shared pages against a bytearray: any order of writes, reads, discards, idle marks, sharing, units,
recompression, write-back, compaction, other sizes and adoptions keeps every page, and every sum."""
from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support.backing_tools import backing_file
from tests.support.memory_file import MemoryFile
from tests.support.page_kinds import block, hard, noise, prose
from tests.support.share_tools import cell_of, shared_cell
from tests.support.unit_tools import make_units
from zramfs.codecs.codec import Codec
from zramfs.store.backing import Backing
from zramfs.store.recompress import Recompression
from zramfs.store.resize import resize
from zramfs.store.sharing import Sharing
from zramfs.store.store import Store
from zramfs.store.writeback import WritebackRun

PAGE = 4096
CHUNK = 512  # pages
FIRST, END = 490, 530  # the pages that are used; a smaller size ends among them
MAKERS = {"prose": prose, "hard": hard, "noise": noise, "zeros": lambda seed: bytes(PAGE),
          "odd word": lambda seed: block("odd word", seed, PAGE)}
SLOT = st.integers(FIRST, END - 1)
SLOTS = st.sets(SLOT, min_size=1, max_size=12)


class SharingMachine(RuleBasedStateMachine):
    """Few contents, so that most pages have an equal one. After a whole sharing each page that may share has
    the cell of all its equals."""

    @initialize(limited=st.booleans())
    def begin(self, limited: bool) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="sharing-"))
        backing = backing_file(self.place / "backing")
        self.fd = os.memfd_create("sharing")
        self.store = Store(2 * CHUNK * PAGE, fd=self.fd, secondary=[Codec("zstd", 3)],
                           backing=Backing(str(backing)))
        self.model = bytearray(2 * CHUNK * PAGE)
        self.limited = limited
        if limited:
            self.store.set_mem_limit(20 * PAGE)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            os.close(self.fd)
            (self.place / "backing").unlink()
            self.place.rmdir()

    @rule(slots=SLOTS, kind=st.sampled_from(sorted(MAKERS)), seed=st.integers(0, 2))
    def write(self, slots: set[int], kind: str, seed: int) -> None:
        for slot in slots:
            self.put(slot * PAGE, MAKERS[kind](seed + slot % 2))

    @rule(slot=SLOT, off=st.integers(0, PAGE - 9))
    def write_a_part(self, slot: int, off: int) -> None:
        self.put(slot * PAGE + off, b"changed!")

    def put(self, off: int, data: bytes) -> None:
        try:
            self.store.write(off, data)
        except OSError:
            return
        self.model[off:off + len(data)] = data

    @rule(slots=SLOTS)
    def discard(self, slots: set[int]) -> None:
        for slot in self.inside(slots):
            self.store.zero(slot * PAGE, PAGE)
            self.model[slot * PAGE:(slot + 1) * PAGE] = bytes(PAGE)

    def inside(self, slots: set[int]) -> list[int]:
        return sorted(slot for slot in slots if slot * PAGE < self.store.disksize)

    @rule(chunks=st.sampled_from([1, 2]))
    def resize(self, chunks: int) -> None:
        resize(self.store, chunks * CHUNK * PAGE, discard=True)
        self.model[chunks * CHUNK * PAGE:] = bytes((2 - chunks) * CHUNK * PAGE)

    @rule(slots=SLOTS)
    def read(self, slots: set[int]) -> None:
        for slot in self.inside(slots):
            assert self.store.read(slot * PAGE, PAGE) == self.page(slot)

    def page(self, slot: int) -> bytes:
        return bytes(self.model[slot * PAGE:(slot + 1) * PAGE])

    @rule()
    def mark_idle(self) -> None:
        self.store.mark_idle()

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

    @rule()
    def recompress(self) -> None:
        job = Recompression(self.store, 1)
        while job.select(1 << 30) or job.step(1 << 30):
            pass
        job.finish()

    @rule(low=SLOT, n=st.integers(1, 20))
    def write_back(self, low: int, n: int) -> None:
        run = WritebackRun(self.store, 4)
        run.select(low, low + n, None)
        while run.left:
            run.write()
        run.finish()

    @rule()
    def compact(self) -> None:
        self.store.compact()
        self.store.migration.run()

    @rule()
    def adopt(self) -> None:
        before = self.store.stats()
        self.store.leave()
        kept = os.open(self.place / "backing", os.O_RDWR)
        self.store = Store.adopt(self.fd, backing=Backing(str(self.place / "backing"), kept=kept))
        os.close(kept)
        assert self.store.recovered.lost == self.store.recovered.objects_freed == 0
        after = self.store.stats()
        for name in ("shared_pages", "shared_objects", "shared_bytes", "compr_data_size", "orig_data_size"):
            assert getattr(after, name) == getattr(before, name), name

    @invariant()
    def everything_holds(self) -> None:
        if hasattr(self, "store"):
            self.store.check(3)
            for slot in range(FIRST, END):
                found = self.store.peek(slot)
                assert found is None or found == self.page(slot), slot


TestSharing = SharingMachine.TestCase
TestSharing.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
