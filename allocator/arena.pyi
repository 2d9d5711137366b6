# SPDX-License-Identifier: Apache-2.0
from typing import Final, Self

from typing_extensions import disjoint_base

from .stats import ArenaStats

# Of 2 MiB each: 16 TiB less one pageblock.
MAX_PAGEBLOCKS: Final[int]

@disjoint_base
class Arena:
    """Page frames of 4096 bytes in one memory file.

    user_size: bytes of the user region, 0 to 2^46 - 1, which the arena keeps for its user and does not
    look at. nr_pageblocks: blocks of 2 MiB that it may hand out at most, 1 to MAX_PAGEBLOCKS. A large arena
    costs nothing until it is used. As a context manager it is closed at the end.
    fd: an empty memory file to lie in, of which the arena keeps a duplicate; -1 = one of its own. In a file
    that another process holds open too, the arena outlives this process: see adopt().
    Raises ValueError for sizes out of range or a file that is not empty, and MemoryError when the system
    gives no address space.
    """

    def __new__(cls, user_size: int, nr_pageblocks: int, fd: int = -1) -> Self: ...
    @staticmethod
    def adopt(fd: int) -> Arena:
        """The arena that another process has left in a memory file, of which a duplicate is kept. Until
        recovery (allocator/recovery.pyx) nothing in it may be used but the notes. Raises ValueError for
        another file or layout."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: object) -> None: ...

    def close(self) -> None:
        """Gives all memory back. No other call may be under way on the arena or on what was made on it;
        later calls raise ValueError. A second close() does nothing. Raises ValueError for an arena whose
        reserve is not closed. A memory file that was given to the arena is empty afterwards."""

    @property
    def current(self) -> bool:
        """Whether the memory file still has the arena that was adopted, or another one of the same shape."""

    def map_resident(self) -> int:
        """Makes page tables for what the memory file holds, so that recovery has no page faults, and answers
        how many bytes that are. For a process that waits to adopt the arena, again and again. It changes
        nothing and touches nothing, so another process may be at work. Raises OSError when the memory is
        refused."""

    def leave(self) -> None:
        """As close(), but the memory file stays as it is, for whoever holds it and adopts the arena."""

    def alloc(self, order: int = 0) -> int:
        """The number of the first frame of a free block of 2^order frames, order 0 to 9. The block is aligned
        to its size. Raises MemoryError when no block is left, or the system refuses its memory."""

    def free(self, frame: int, order: int = 0) -> None:
        """Takes back what alloc(order) gave; a block may also be given back in aligned parts. Raises
        ValueError for anything else, and changes nothing then."""

    def frame(self, frame: int) -> memoryview:
        """The 4096 bytes of a frame in use, as a writable memoryview. It must not be used after free() or
        close(). Raises ValueError for a frame that is not in use."""

    def inject_failure(self, after: int) -> None:
        """Fault injection: the after-th frame allocation from here on fails as if memory were short. 0: none
        does."""

    def fileno(self) -> int:
        """The descriptor of the memory file, which stays the arena's."""

    def note(self, number: int) -> bytes:
        """The bytes of a note, 0 to NR_NOTES - 1; b"" before it is set."""

    def set_note(self, number: int, content: bytes) -> None:
        """Replaces a note by at most NOTE_HALF bytes (5 MiB), in one step: whoever adopts the arena finds the
        old one or the new one. One thread at a time. Raises ValueError, and MemoryError when the system
        refuses the memory."""

    def buddyinfo(self) -> tuple[int, ...]:
        """The number of free blocks of each order, 0 to 9. Order 9 counts whole pageblocks: given back to
        the system, or in the reserve."""

    def stats(self) -> ArenaStats:
        """ArenaStats of this moment."""
