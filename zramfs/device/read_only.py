# SPDX-License-Identifier: Apache-2.0
"""The read-only tables of a device, which the tree shows beside the statistics. No look counts as a use."""
from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from zramfs.errors import ZramfsError
from zramfs.model.device_stats import MemoryStats
from zramfs.store import block_state

if TYPE_CHECKING:
    from allocator.stats import ClassStats, PageblockStats
    from zramfs.store.store import Store

    from .compactor import Compactor
    from .long_work import LongWork


class ReadOnlyTables:
    """The part of Device that changes nothing."""

    _store: Store | None
    compactor: Compactor
    long_work: LongWork

    def expect_store(self, otherwise: str) -> Store:
        """The store of a device that is set up. ZramfsError(EINVAL), beginning with `otherwise`."""
        if self._store is None:
            raise ZramfsError(
                errno.EINVAL, f"{otherwise}: the device is not set up; write disksize first")
        return self._store

    def peek(self, off: int, room: int) -> bytes:
        """Bytes of the device up to the end of a page, none beyond its end, without using the page.
        Raises ZramfsError: EINVAL, ENODATA (the page is written back)."""
        store = self.expect_store("no pages to look at")
        if off >= store.disksize:
            return b""
        page = store.peek(off // 4096)
        if page is None:
            raise ZramfsError(errno.ENODATA, f"page {off // 4096} is written back; reading disk brings it")
        return page[off % 4096:][:room]

    def block_state(self, slot: int, room: int) -> tuple[bytes, int]:
        """Whole lines of zram/block_state from a slot on, in at most room bytes, and the slot where the
        next ones begin. Raises ZramfsError(EINVAL)."""
        return block_state.lines(self.expect_store("no pages to list"), slot, room)

    def classes(self) -> list[ClassStats]:
        return self._store.classes() if self._store else []

    def buddyinfo(self) -> tuple[int, ...] | None:
        """Free blocks of order 0 to 9, or None while the device is not set up."""
        return self._store.buddyinfo() if self._store else None

    def memory(self) -> MemoryStats | None:
        """Compaction and balloon, or None while the device is not set up."""
        if (store := self._store) is None:
            return None
        return MemoryStats(self.compactor.stats(), store.migration.stats(), store.balloon.stats(),
                           store.buddyinfo(), store.stats(), self.long_work.won)

    def pageblocks(self) -> list[PageblockStats]:
        return self._store.migration.pageblocks() if self._store else []
