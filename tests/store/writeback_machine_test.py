# SPDX-License-Identifier: Apache-2.0
"""A store with a backing store against the model of one without: any order of writes, reads, discards,
write-backs (whole, cut short, without room) and compactions, with every sum checked after each step."""
from __future__ import annotations

import errno
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support import capabilities, models
from tests.support.backing_tools import PAGE, backing_file, write_back
from tests.support.memory_file import MemoryFile
from tests.support.page_kinds import KINDS, block
from tests.support.scale import scaled
from zramfs.store.backing import Backing
from zramfs.store.store import Store
from zramfs.store.writeback import WritebackRun

PAGES = 40
MODES = (None, "huge", "idle", "huge_idle", "incompressible")


class WritebackMachine(RuleBasedStateMachine):
    @initialize(room=st.sampled_from([3, 12, 200]))
    def begin(self, room: int) -> None:
        self.place = tempfile.TemporaryDirectory(prefix="zramfs_test_")
        path = backing_file(Path(self.place.name) / "file", room * PAGE)
        self.store = Store(PAGES * PAGE, backing=Backing(str(path)))
        self.model = models.Device(PAGES * PAGE)
        self.back: set[int] = set()
        self.idle: set[int] = set()

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.place.cleanup()

    def touched(self, off: int, n: int) -> set[int]:
        pages = set(range(off // PAGE, -(-(off + n) // PAGE)))
        self.idle -= pages
        return pages

    @rule(off=st.integers(0, PAGES * PAGE), n=st.integers(0, 5 * PAGE), whole=st.booleans(),
          kind=st.sampled_from(KINDS), seed=st.integers(0, 9))
    def write(self, off: int, n: int, whole: bool, kind: str, seed: int) -> None:
        if whole:
            off, n = off & -PAGE, n & -PAGE
        content = block(kind, seed, min(n, PAGES * PAGE - off))
        self.store.write(off, content)
        self.model.write(off, content)
        self.back -= self.touched(off, len(content)) if content else set()

    @rule(off=st.integers(0, PAGES * PAGE), n=st.integers(0, 9 * PAGE), whole=st.booleans())
    def zero(self, off: int, n: int, whole: bool) -> None:
        if whole:
            off, n = off & -PAGE, n & -PAGE
        n = min(n, PAGES * PAGE - off)
        self.store.zero(off, n)
        self.model.zero(off, n)
        self.back -= self.touched(off, n) if n else set()

    @rule(off=st.integers(0, PAGES * PAGE), n=st.integers(1, 9 * PAGE))
    def read(self, off: int, n: int) -> None:
        n = min(n, PAGES * PAGE - off)
        assert self.store.read(off, n) == self.model.data[off:off + n]
        self.touched(off, n)

    @rule()
    def mark_idle(self) -> None:
        self.store.mark_idle()
        self.idle = {n for n in self.model.stored - self.back if not models.kept(self.model.page(n)).same}

    @rule(low=st.integers(0, PAGES), n=st.integers(0, PAGES), mode=st.sampled_from(MODES),
          batch=st.sampled_from([1, 2, 3, 32]), budget=st.one_of(st.none(), st.integers(0, 9)))
    def write_back(self, low: int, n: int, mode: str | None, batch: int, budget: int | None) -> None:
        chosen = set()
        for page in range(low, min(PAGES, low + n)):
            if page in self.model.stored - self.back and mode != "incompressible":
                kept = models.kept(self.model.page(page))
                if not kept.same and (kept.huge or "huge" not in (mode or "")) and (
                        page in self.idle or "idle" not in (mode or "")):
                    chosen.add(page)
        before = self.store.backing.stats()
        run = write_back(self.store, (low, low + n), mode=mode, batch=batch, budget=budget)
        after = self.store.backing.stats()
        found = self.found()
        assert found - self.back <= chosen and len(found - self.back) == run.pages
        assert (run.passed, run.failed) == (0, 0)
        assert budget is None or after.writes - before.writes <= budget
        if budget is None and run.error == 0:
            assert found - self.back == chosen
        elif run.error:
            assert run.error == errno.ENOSPC
        self.back, self.idle = found, self.idle - found

    @rule(touched=st.integers(0, PAGES - 1), seed=st.integers(0, 3))
    def write_back_while_a_page_is_written(self, touched: int, seed: int) -> None:
        run = WritebackRun(self.store, 2)
        run.select(0, PAGES)
        run.write(1, 0)
        self.write(touched * PAGE, PAGE, True, "half random", seed)
        while run.left:
            run.write()
        run.finish()
        self.back = self.found()
        assert touched not in self.back
        self.idle -= self.back

    @rule()
    def compact(self) -> None:
        self.store.compact()
        self.store.migration.run()

    @rule(most=st.integers(0, 50))
    def trim(self, most: int) -> None:
        stale = self.store.backing.stats().stale
        assert self.store.backing.trim(most) == min(stale, most) or stale > most
        assert self.store.backing.stats().stale <= max(0, stale - most)

    def found(self) -> set[int]:
        file = MemoryFile(self.store.migration.arena.fileno())
        return {n for n in range(PAGES) if file.slot_word(n) >> 1 & 7 == 5}

    @invariant()
    def sums_and_content(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.check(3)
        assert self.found() == self.back
        file = MemoryFile(self.store.migration.arena.fileno())
        assert {n for n in range(PAGES) if file.slot(n).idle} == self.idle
        pages = {n: models.kept(self.model.page(n)) for n in self.model.stored}
        here = [page for n, page in pages.items() if n not in self.back]
        stats = self.store.stats()
        assert stats.orig_data_size == len(pages) * PAGE
        assert stats.compr_data_size == sum(page.compressed for page in here)
        assert stats.huge_pages == sum(page.huge for page in here)
        assert stats.huge_pages_since == self.model.huge_pages_since
        assert stats.same_pages == sum(page.same for page in here)
        assert stats.written_back == len(self.back)
        assert stats.failed_reads == stats.failed_writes == stats.corrupt == 0
        assert self.store.backing.stats().used <= 2 * len(self.back)


EXAMPLES = 20 if capabilities.missing("unsanitized") else scaled(60, 20)
WritebackMachine.TestCase.settings = settings(max_examples=EXAMPLES, stateful_step_count=30, deadline=None)
TestWritebackMachine = WritebackMachine.TestCase
