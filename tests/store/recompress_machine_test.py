# SPDX-License-Identifier: Apache-2.0
"""A store of three algorithms against a model of the rules: any order of writes, reads, discards, idle
marks and recompressions leaves every slot's type, priority and flags as the rules say."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support import capabilities, models
from tests.support.memory_file import MemoryFile
from tests.support.page_kinds import KINDS, block, hard, noise, prose
from tests.support.scale import scaled
from zramfs.codecs.codec import Codec
from zramfs.model.stats import RecompressionStats
from zramfs.store.recompress import Recompression
from zramfs.store.store import Store

PAGE = 4096
PAGES = 24
MAKERS: dict[str, Callable[[int], bytes]] = {
    "prose": prose, "hard": hard, "noise": noise,
    **{kind: (lambda seed, kind=kind: block(kind, seed, PAGE)) for kind in KINDS},
}
CODECS = (Codec("lz4"), Codec("lz4hc", 4), Codec("zstd", 3))
packed_sizes: dict[tuple[int, bytes], int] = {}


def packed(priority: int, page: bytes) -> int:
    """Bytes of the object of a page; 4096 where it is kept raw."""
    key = priority, page
    if key not in packed_sizes:
        done = CODECS[priority].compress(page, models.HUGE - 1)
        packed_sizes[key] = PAGE if done is None else len(done)
    return packed_sizes[key]


@dataclass
class Page:
    data: bytes
    priority: int = 0
    idle: bool = False
    incompressible: bool = False

    @property
    def same(self) -> bool:
        return models.kept(self.data).same

    @property
    def size(self) -> int:
        return packed(self.priority, self.data)


class RecompressMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.store = Store(PAGES * PAGE, secondary=CODECS[1:])
        self.pages: dict[int, Page] = {}

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()

    @rule(slots=st.sets(st.integers(0, PAGES - 1), min_size=1, max_size=8),
          kind=st.sampled_from(sorted(MAKERS)), seed=st.integers(0, 3))
    def write(self, slots: set[int], kind: str, seed: int) -> None:
        for slot in slots:
            self.pages[slot] = Page(MAKERS[kind](seed + slot % 3))
            self.store.write(slot * PAGE, self.pages[slot].data)

    @rule(slot=st.integers(0, PAGES - 1), off=st.integers(0, PAGE - 9))
    def write_a_part(self, slot: int, off: int) -> None:
        old = self.pages[slot].data if slot in self.pages else bytes(PAGE)
        self.pages[slot] = Page(old[:off] + b"changed!" + old[off + 8:])
        self.store.write(slot * PAGE + off, b"changed!")

    @rule(slots=st.sets(st.integers(0, PAGES - 1), min_size=1, max_size=8))
    def read(self, slots: set[int]) -> None:
        for slot in slots:
            page = self.pages.get(slot)
            assert self.store.read(slot * PAGE, PAGE) == (page.data if page else bytes(PAGE))
            if page:
                page.idle = False

    @rule(slot=st.integers(0, PAGES - 1))
    def discard(self, slot: int) -> None:
        self.store.zero(slot * PAGE, PAGE)
        self.pages.pop(slot, None)

    @rule()
    def mark_idle(self) -> None:
        self.store.mark_idle()
        for page in self.pages.values():
            page.idle = not page.same

    @rule()
    def compact(self) -> None:
        self.store.compact()

    @rule(priority=st.integers(1, 2), idle=st.booleans(), huge=st.booleans(),
          threshold=st.one_of(st.just(0), st.integers(1, models.HUGE - 1)), cut=st.integers(0, 40))
    def recompress(self, priority: int, idle: bool, huge: bool, threshold: int, cut: int) -> None:
        """cut: steps of one page after which it is left; what was done shows in the slots."""
        job = Recompression(self.store, priority, idle=idle, huge=huge, threshold=threshold)
        while job.select(1):
            pass
        chosen = {
            slot: page for slot, page in self.pages.items()
            if not page.same and not page.incompressible and page.priority < priority
            and (page.idle or not idle) and (page.size == PAGE or not huge) and page.size >= threshold
        }
        steps = 0
        while steps < cut and job.step(1):
            steps += 1
        whole = steps < cut
        stats = job.finish()
        file = MemoryFile(self.store.migration.arena.fileno())
        if whole:
            assert stats.tried == len(chosen)
        won = kept = marked = 0
        smallest_done, largest_left = PAGE, 0
        for slot, page in chosen.items():
            old, new = page.size, packed(priority, page.data)
            smaller = models.size_class(new).size < models.size_class(old).size
            wins = smaller and (not threshold or new < threshold)
            found = file.slot(slot)
            if not whole and found.prio == page.priority and found.idle == page.idle and (
                    not found.incompressible) and (page.idle or wins or priority == 2):
                largest_left = max(largest_left, old)
                continue
            page.idle = False
            if wins:
                won += 1
                page.priority = priority
                smallest_done = min(smallest_done, old)
            else:
                kept += 1
                if priority == 2:
                    page.incompressible = True
                    marked += 1
        assert largest_left < smallest_done + 64
        assert stats.won == won and stats.incompressible == marked
        assert stats.no_room == stats.busy == 0
        assert not whole or stats == RecompressionStats(
            tried=len(chosen), won=won, kept=kept, incompressible=marked, bytes_saved=stats.bytes_saved)

    @invariant()
    def slots_are_the_models(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.check(3)
        file = MemoryFile(self.store.migration.arena.fileno())
        for slot in range(PAGES):
            found, page = file.slot(slot), self.pages.get(slot)
            if page is None:
                assert found.type == "empty"
                continue
            kind = "same" if page.same else "huge" if page.size == PAGE else "obj"
            assert found.type.removesuffix("_obj") == kind
            assert (found.prio, found.idle, found.incompressible, found.post) == (
                page.priority, page.idle, page.incompressible, False), slot
        sizes = [page.size for page in self.pages.values() if not page.same]
        stats = self.store.stats()
        assert stats.compr_data_size == sum(sizes)
        assert stats.huge_pages == sizes.count(PAGE)
        assert stats.failed_reads == stats.corrupt == 0


EXAMPLES = 20 if capabilities.missing("unsanitized") else scaled(60, 20)
RecompressMachine.TestCase.settings = settings(max_examples=EXAMPLES, stateful_step_count=30, deadline=None)
TestRecompressMachine = RecompressMachine.TestCase
