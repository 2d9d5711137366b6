# SPDX-License-Identifier: Apache-2.0
"""The store against a bytearray: any sequence of calls on any ranges, with a full pool in between."""
import errno
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support import capabilities, models
from tests.support.page_kinds import KINDS, block
from tests.support.scale import scaled
from zramfs.store.resize import STEP, resize, room_to_grow
from zramfs.store.store import Store

PAGE = 4096
PAGEBLOCK = 512 * PAGE
GROWS_TO = 9 << 20  # bytes; no multiple of a step


class StoreMachine(RuleBasedStateMachine):
    """Content, holes and every statistic that follows from them are the model's after each step."""

    @initialize(disksize=st.sampled_from([1, 65_537, 513 * PAGE - 7, 6 << 20]))
    def begin(self, disksize: int) -> None:
        self.store = Store(disksize, grows_to=GROWS_TO)
        # Access times have a table of their own, which grows too.
        self.store.access_times = disksize % 2 == 0
        self.model = models.Device(disksize)
        self.failed_writes = 0
        self.limit = 0
        self.compacted = 0

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()

    def range(self, data: st.DataObject) -> tuple[int, int]:
        """Any bytes of the device, whole pages more often than chance would have it."""
        size = self.model.size
        off = data.draw(st.integers(0, size), "off")
        n = data.draw(st.one_of(st.integers(0, 3 * PAGE), st.integers(0, 500 * PAGE)), "n")
        if data.draw(st.booleans(), "whole pages"):
            off, n = off & -PAGE, n + PAGE & -PAGE
        return off, min(n, size - off)

    @rule(data=st.data(), kind=st.sampled_from(KINDS), seed=st.integers(0, 5))
    def write(self, data: st.DataObject, kind: str, seed: int) -> None:
        off, n = self.range(data)
        content = block(kind, seed, n)
        try:
            assert self.store.write(off, content) == n
            written = n
        except OSError as error:
            assert self.limit and error.errno == errno.ENOSPC
            written = error.written
            # Pages are committed one after the other.
            assert 0 <= written < n and (off + written) % PAGE == 0 or written == 0
            self.failed_writes += 1
        self.model.write(off, content[:written])

    @rule(kind=st.sampled_from(["half random", "random", "mixed"]), seed=st.integers(0, 5))
    def fill(self, kind: str, seed: int) -> None:
        for off in range(0, self.model.size, 64 * PAGE):
            content = block(kind, seed + off, min(64 * PAGE, self.model.size - off))
            try:
                self.store.write(off, content)
            except OSError as error:
                assert self.limit and error.errno == errno.ENOSPC
                self.failed_writes += 1
                self.model.write(off, content[:error.written])
                return
            self.model.write(off, content)

    @rule(share=st.floats(0.1, 0.95), seed=st.integers(0, 1 << 16))
    def thin_out(self, share: float, seed: int) -> None:
        """Discards pages here and there, which leaves sparse zspages."""
        pages = sorted(self.model.stored)
        for index in random.Random(seed).sample(pages, round(share * len(pages))):
            self.store.zero(index * PAGE, PAGE)
            self.model.zero(index * PAGE, PAGE)

    @rule(data=st.data())
    def zero(self, data: st.DataObject) -> None:
        off, n = self.range(data)
        try:
            self.store.zero(off, n)
            self.model.zero(off, n)
        except OSError as error:
            assert self.limit and error.errno == errno.ENOSPC
            self.failed_writes += 1
            self.zero_what_was_zeroed(off, off + n)

    def zero_what_was_zeroed(self, off: int, end: int) -> None:
        """Whole pages are freed whatever happens; of a partial one all is zeroed or nothing."""
        first, last = -(-off // PAGE) * PAGE, end // PAGE * PAGE
        if first < last:
            self.model.zero(first, last - first)
        parts = [(off, min(first, end)), (max(last, off), end)] if first <= last else [(off, end)]
        old = 0
        for start, stop in parts:
            found = self.store.read(start, stop - start)
            if found == bytes(stop - start) != self.model.data[start:stop]:
                self.model.zero(start, stop - start)
            else:  # also where there were zeros already
                old += 1
        assert old, "a call that fails has left something undone"

    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        off, n = self.range(data)
        assert self.store.read(off, n) == self.model.data[off:off + n]

    @rule(data=st.data(), hole=st.booleans())
    def seek(self, data: st.DataObject, hole: bool) -> None:
        off = data.draw(st.integers(-2, self.model.size + 2))
        expected = self.model.seek(off, hole) if off >= 0 else None
        if expected is None:
            with pytest.raises(OSError) as failure:
                self.store.seek(off, hole)
            assert failure.value.errno == errno.ENXIO
        else:
            assert self.store.seek(off, hole) == expected

    @rule()
    def compact(self) -> None:
        promised = sum(c.freeable for c in self.store.classes())
        assert self.store.compact() == promised
        self.compacted += promised
        assert self.store.stats().mem_used_total == models.fewest_pages(self.model.objects()) * PAGE

    @rule()
    def migrate(self) -> None:
        self.store.migration.run()
        stats = self.store.stats()
        assert stats.pageblocks_in_use == -(-stats.frames_used // 512)

    @rule(pages=st.one_of(st.just(0), st.integers(1, 400)))
    def set_mem_limit(self, pages: int) -> None:
        self.store.set_mem_limit(pages * PAGE - (pages and 100))
        self.limit = pages

    @precondition(lambda self: hasattr(self, "store"))
    @rule(data=st.data(), discard=st.booleans())
    def resize(self, data: st.DataObject, discard: bool) -> None:
        most = room_to_grow(self.store)
        assert most == GROWS_TO
        size = data.draw(st.integers(1, most), "size")
        if -(-size // PAGE) * PAGE == self.model.size:
            expected = self.model.size
        else:
            expected = min(-(-size // STEP) * STEP, most)
        behind = any(index >= expected // PAGE for index in self.model.stored)
        if behind and not discard:
            with pytest.raises(OSError, match="pages are stored behind") as failure:
                resize(self.store, size)
            assert failure.value.errno == errno.ENOTEMPTY
        else:
            assert resize(self.store, size, discard=discard) == expected == self.store.disksize
            self.model.resize(expected)

    @precondition(lambda self: hasattr(self, "store"))
    @rule()
    def reset_peak(self) -> None:
        self.store.reset_mem_used_max()
        assert self.store.stats().mem_used_max == self.store.stats().mem_used_total

    @invariant()
    def sums_hold(self) -> None:
        if hasattr(self, "store"):
            self.store.check(3)

    @invariant()
    def content_and_statistics_are_the_models(self) -> None:
        if not hasattr(self, "store"):
            return
        assert self.store.read(0, self.model.size) == self.model.data
        stats = self.store.stats()
        for name, value in self.model.stats().items():
            assert getattr(stats, name) == value, name
        assert (stats.failed_reads, stats.failed_writes, stats.corrupt) == (0, self.failed_writes, 0)
        assert stats.mem_limit == self.limit * PAGE
        assert stats.pages_compacted == self.compacted
        assert stats.mem_used_max >= stats.mem_used_total
        assert stats.mem_used_total >= models.fewest_pages(self.model.objects()) * PAGE
        assert stats.mem_used_total == stats.frames_used * PAGE
        assert stats.resident == stats.pageblocks_in_use * PAGEBLOCK
        assert stats.resident == (stats.frames_used + stats.frames_free) * PAGE
        used = [c for c in self.store.classes() if c.obj_used]
        assert sum(c.obj_used for c in used) == len(self.model.objects())
        assert sum(c.pages_used for c in used) * PAGE == stats.mem_used_total


# A sanitizer makes the model, not the store, ten times as slow.
EXAMPLES = 25 if capabilities.missing("unsanitized") else scaled(80, 25)
StoreMachine.TestCase.settings = settings(max_examples=EXAMPLES, stateful_step_count=25, deadline=None)
TestStoreMachine = StoreMachine.TestCase
