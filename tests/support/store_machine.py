# SPDX-License-Identifier: Apache-2.0
"""A store against a bytearray: what the state machines of units and of shared pages have in common."""
from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support.backing_tools import backing_file
from zramfs.codecs.codec import Codec
from zramfs.store.backing import Backing
from zramfs.store.recompress import Recompression
from zramfs.store.resize import resize
from zramfs.store.store import Store
from zramfs.store.writeback import WritebackRun

PAGE = 4096
CHUNK = 512  # pages


class StoreMachine(RuleBasedStateMachine):
    """USED: the pages that are used; a smaller size ends among them. LIMIT: pages of the pool, where it is
    limited. ROOM: blocks of the backing store. KEPT: the sums that an adoption leaves as they are."""

    USED: ClassVar[range]
    LIMIT: ClassVar[int]
    ROOM: ClassVar[list[int]] = [4096]
    KEPT: ClassVar[tuple[str, ...]]

    @initialize(limited=st.booleans(), data=st.data())
    def begin(self, limited: bool, data: st.DataObject) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="machine-"))
        room = data.draw(st.sampled_from(self.ROOM), label="room")
        backing = backing_file(self.place / "backing", room * PAGE)
        self.fd = os.memfd_create("machine")
        self.store = Store(2 * CHUNK * PAGE, fd=self.fd, secondary=[Codec("zstd", 3)],
                           backing=Backing(str(backing)))
        self.model = bytearray(2 * CHUNK * PAGE)
        self.limited = limited
        if limited:
            self.store.set_mem_limit(self.LIMIT * PAGE)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            os.close(self.fd)
            (self.place / "backing").unlink()
            self.place.rmdir()

    def page(self, slot: int) -> bytes:
        return bytes(self.model[slot * PAGE:(slot + 1) * PAGE])

    def inside(self, slots: set[int]) -> list[int]:
        return sorted(slot for slot in slots if slot * PAGE < self.store.disksize)

    def put(self, off: int, data: bytes) -> None:
        try:
            self.store.write(off, data)
        except OSError:
            return
        self.model[off:off + len(data)] = data

    def discard_pages(self, slots: set[int]) -> None:
        for slot in self.inside(slots):
            self.store.zero(slot * PAGE, PAGE)
            self.model[slot * PAGE:(slot + 1) * PAGE] = bytes(PAGE)

    def read_pages(self, slots: list[int]) -> None:
        for slot in slots:
            assert self.store.read(slot * PAGE, PAGE) == self.page(slot)

    def write_pages_back(
        self, low: int, high: int, mode: str | None, *, batch: int = 4, budget: int = 1 << 30,
    ) -> WritebackRun:
        run = WritebackRun(self.store, batch)
        run.select(low, high, mode)
        while run.left and budget:
            budget -= run.write(budget)
        run.finish()
        return run

    @rule(chunks=st.sampled_from([1, 2]))
    def resize(self, chunks: int) -> None:
        resize(self.store, chunks * CHUNK * PAGE, discard=True)
        self.model[chunks * CHUNK * PAGE:] = bytes((2 - chunks) * CHUNK * PAGE)

    @rule()
    def mark_idle(self) -> None:
        self.store.mark_idle()

    @rule()
    def recompress(self) -> None:
        job = Recompression(self.store, 1)
        while job.select(1 << 30) or job.step(1 << 30):
            pass
        job.finish()

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
        self.expect_recovered()
        after = self.store.stats()
        for name in (*self.KEPT, "compr_data_size", "orig_data_size"):
            assert getattr(after, name) == getattr(before, name), name

    def expect_recovered(self) -> None:
        assert self.store.recovered.lost == 0

    @invariant()
    def everything_holds(self) -> None:
        if hasattr(self, "store"):
            self.store.check(3)
            for slot in self.inside(set(self.USED)):
                found = self.store.peek(slot)
                if found is None:
                    # On the backing store, where a read leaves it.
                    found = self.store.read(slot * PAGE, PAGE)
                assert found == self.page(slot), slot
