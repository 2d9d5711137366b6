# SPDX-License-Identifier: Apache-2.0
"""What a dictionary would win in units: some groups of 16 pages are compressed with it and without it."""
from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from zramfs.codecs.stream import Packer
from zramfs.text.sizes import PAGE

if TYPE_CHECKING:
    from zramfs.codecs.codec import Codec
    from zramfs.store.store import Store

UNIT_PAGES = 16
# Of each device. A group takes 1.5 ms with each dictionary, by zstd 9.
JUDGED_GROUPS = 32


class UnitJudge:
    """level: of zstd; newest: the dictionary that there is; trained: numbers of the pages that the new one
    was trained on, which are left out.

    pages, without, with_it: pages that were judged, and bytes that they take in units, with the better one of
    no dictionary and the newest one, and with the new one where that is better.
    """

    def __init__(self, store: Store, made: Codec, newest: Codec | None, level: int,
                 trained: Iterable[int]) -> None:
        self._store = store
        self._rivals = [Packer(level)] + ([Packer(level, newest)] if newest else [])
        self._made = Packer(level, made)
        self._trained = frozenset(trained)
        self.pages = self.without = self.with_it = 0

    def look(self, group: int) -> None:
        """At the pages of a group, as they are at this moment; no access."""
        first = group * UNIT_PAGES
        data = b"".join(map(self._page, range(first, first + UNIT_PAGES)))
        if not data:
            return
        rival = min(packer.size(data) for packer in self._rivals)
        self.pages += len(data) // PAGE
        self.without += rival
        self.with_it += min(rival, self._made.size(data))

    def _page(self, number: int) -> bytes:
        """Nothing for one that no unit takes."""
        if number in self._trained:
            return b""
        try:
            page = self._store.peek(number)
        except OSError:  # damaged: whoever needs it hears of it
            return b""
        return b"" if page is None or page == page[:8] * (PAGE // 8) else page

    @property
    def won_each(self) -> float:
        """Bytes a page."""
        return (self.without - self.with_it) / self.pages if self.pages else 0.0
