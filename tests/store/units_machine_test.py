# SPDX-License-Identifier: Apache-2.0
"""Units against a bytearray: any order of writes, reads, discards, idle marks, making of units,
recompression, write-back, compaction, other sizes and adoptions keeps every page, and every sum."""
from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support.backing_tools import backing_file
from tests.support.page_kinds import block, hard, noise, prose
from zramfs.codecs.codec import Codec
from zramfs.store.backing import Backing
from zramfs.store.recompress import Recompression
from zramfs.store.resize import resize
from zramfs.store.store import Store
from zramfs.store.unit_making import UnitMaking
from zramfs.store.writeback import WritebackRun

PAGE = 4096
CHUNK = 512  # pages
FIRST, END = 470, 555  # the pages that are used; a smaller size ends among them
MAKERS = {"prose": prose, "hard": hard, "noise": noise, "text": lambda seed: block("text", seed, PAGE),
          "zeros": lambda seed: bytes(PAGE), "odd word": lambda seed: block("odd word", seed, PAGE)}
SLOT = st.integers(FIRST, END - 1)
SLOTS = st.sets(SLOT, min_size=1, max_size=24)


class UnitsMachine(RuleBasedStateMachine):
    """Pages that may be idle: read or written pages are not, whatever else is done to them."""

    @initialize(limited=st.booleans())
    def begin(self, limited: bool) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="units-"))
        backing = backing_file(self.place / "backing")
        self.fd = os.memfd_create("units")
        self.store = Store(2 * CHUNK * PAGE, fd=self.fd, secondary=[Codec("zstd", 3)],
                           backing=Backing(str(backing)))
        self.model = bytearray(2 * CHUNK * PAGE)
        if limited:
            self.store.set_mem_limit(40 * PAGE)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            os.close(self.fd)
            (self.place / "backing").unlink()
            self.place.rmdir()

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

    @rule(slots=SLOTS, times=st.integers(1, 2))
    def read(self, slots: set[int], times: int) -> None:
        for slot in self.inside(slots) * times:
            assert self.store.read(slot * PAGE, PAGE) == self.model[slot * PAGE:(slot + 1) * PAGE]

    @rule(slot=SLOT)
    def peek(self, slot: int) -> None:
        assert self.store.peek(slot) in (None, self.model[slot * PAGE:(slot + 1) * PAGE])

    @rule()
    def mark_idle(self) -> None:
        self.store.mark_idle()

    @rule(idle=st.booleans(), level=st.sampled_from([None, 1, 9]), steps=st.sampled_from([1, 3, 1000]),
          joins=st.booleans(), thorough=st.booleans())
    def make_units(self, idle: bool, level: int | None, steps: int, joins: bool, thorough: bool) -> None:
        before = self.store.stats()
        making = UnitMaking(self.store, idle=idle, level=level, joins=joins, thorough=thorough)
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
            making = UnitMaking(self.store, joins=False, thorough=False)
            while making.step(1 << 30):
                pass
            done = making.finish()
        assert done.groups == done.no_room
        making = UnitMaking(self.store, joins=False)
        while making.step(1 << 30):
            pass
        done = making.finish()
        assert done.groups == done.kept + done.no_room

    @rule()
    def recompress(self) -> None:
        job = Recompression(self.store, 1)
        while job.select(1 << 30) or job.step(1 << 30):
            pass
        job.finish()

    @rule(low=SLOT, n=st.integers(1, 40), mode=st.sampled_from(["idle", None]))
    def write_back(self, low: int, n: int, mode: str | None) -> None:
        run = WritebackRun(self.store, 4)
        run.select(low, low + n, mode)
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
        assert self.store.recovered.lost == 0
        after = self.store.stats()
        for name in ("units", "unit_pages", "unit_dead", "unit_bytes", "compr_data_size", "orig_data_size"):
            assert getattr(after, name) == getattr(before, name), name

    @invariant()
    def everything_holds(self) -> None:
        if hasattr(self, "store"):
            self.store.check(3)
            for slot in range(FIRST, END):
                found = self.store.peek(slot)
                assert found is None or found == self.model[slot * PAGE:(slot + 1) * PAGE], slot


TestUnits = UnitsMachine.TestCase
TestUnits.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
