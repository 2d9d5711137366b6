# SPDX-License-Identifier: Apache-2.0
from typing import Self

from typing_extensions import disjoint_base

from .arena import Arena

@disjoint_base
class Reserve:
    """Keeps nbytes of the arena, rounded up to 2 MiB, resident and free, so that an allocation never has to
    wait for memory.

    It is full when the constructor returns, and a thread keeps it so until close(). It must be made before
    anything else uses the arena, and closed before the arena is. As a context manager it is closed at the
    end. Raises ValueError for nbytes outside the arena's size or an arena that has a reserve, MemoryError
    when the system refuses the memory, and OSError if there can be no thread.
    """

    @property
    def arena(self) -> Arena: ...
    def __new__(cls, arena: Arena, nbytes: int) -> Self: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: object) -> None: ...

    def close(self) -> None:
        """Ends the thread and gives the reserve back to the system. A second close() does nothing."""
