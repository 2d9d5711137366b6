# SPDX-License-Identifier: Apache-2.0
from typing import Self

from typing_extensions import disjoint_base

from .arena import Arena
from .stats import CompactionStats, PageblockStats

@disjoint_base
class Migration:
    """Page migration on an arena: compaction runs and contiguous allocation.

    A Migration has one run at a time, which any thread may drive; the pages' users go on meanwhile. step()
    empties one pageblock in about a millisecond, and a call from another thread waits for that. Every
    method raises ValueError once the arena is closed.
    """

    @property
    def arena(self) -> Arena: ...
    def __new__(cls, arena: Arena) -> Self: ...

    def begin(self, all_blocks: bool = False) -> None:
        """Starts a run over the pageblocks in use, the sparsest first, and drops a run that was not finished.
        all_blocks: also those that are passed by for a while because they failed. Raises MemoryError."""

    def step(self) -> bool:
        """Empties the next pageblock. False when the scanners have met and the run is over."""

    def run(self) -> int:
        """A whole run over all pageblocks. The number of pageblocks that were emptied and given back."""

    def alloc_contig(self, order: int) -> int:
        """The first of 2^order neighbouring frames, order 0 to 9, which are emptied where need be.
        Arena.free() takes them back. Raises MemoryError; then no page is lost, though some may have moved."""

    def alloc_contig_range(self, first: int, n: int) -> None:
        """Takes frames [first, first + n), which have to lie in one pageblock in use. Raises ValueError for
        another range, OSError(EBUSY) if something in it can't be moved, MemoryError if there is nowhere to
        move it."""

    def stats(self) -> CompactionStats:
        """CompactionStats since the arena was made."""

    def pageblocks(self) -> list[PageblockStats]:
        """PageblockStats of every pageblock that was ever used, in order. 16 bytes are read for each, and 512
        flags for each that is in use."""
