# SPDX-License-Identifier: Apache-2.0
from typing import Self

from typing_extensions import Buffer, disjoint_base

from .arena import Arena
from .headroom import Headroom
from .stats import ClassStats, PoolStats

@disjoint_base
class Pool:
    """Objects of 1 to 4096 bytes in the frames of an arena, packed by size class (zsmalloc).

    An object has a name, its tag: an integer from 0 to 2^48 - 1 that no other live object has. compact() and
    migration move objects, so an object is always found by its tag. chain_max: frames of the longest zspage,
    1 to 8. An arena takes one pool at a time; once the arena is closed, so is the pool.
    Raises ValueError for a bad chain_max or an arena that has a pool, and MemoryError.
    """

    @property
    def arena(self) -> Arena: ...
    def __new__(cls, arena: Arena, chain_max: int = 8) -> Self: ...

    def malloc(self, tag: int, data: Buffer) -> None:
        """Stores 1 to 4096 bytes under a new tag.

        Raises ValueError for another size, a tag out of range or in use, OSError(ENOSPC) at the limit, and
        MemoryError when the arena is full or the system refuses memory. Then nothing is changed.
        """

    def read(self, tag: int) -> bytes:
        """The object's bytes. Raises KeyError, or OSError(EIO) for a damaged pool."""

    def free(self, tag: int) -> int:
        """Frees the object: its size in bytes. Raises KeyError, or OSError(EIO) for a damaged pool."""

    def location(self, tag: int) -> tuple[int, int]:
        """Where the object lies at this moment: (zspage number, object index). Raises KeyError."""

    def compact(self) -> int:
        """Moves objects out of sparse zspages into full ones, until no more zspages can be freed. The number
        of pages freed."""

    def set_limit(self, pages: int) -> None:
        """Pages of 4096 bytes that the pool may use, 0 = no limit. What is stored stays."""

    def set_headroom(self, headroom: Headroom) -> None:
        """Asked before the pool takes pages, from here on; to be called before the first object."""

    @property
    def huge_size(self) -> int:
        """Objects of this many bytes and more take a page of their own."""

    def classes(self) -> list[ClassStats]:
        """ClassStats of every class that was not merged into a larger one, smallest first."""

    def stats(self) -> PoolStats:
        """PoolStats of this moment."""
