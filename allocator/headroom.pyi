# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterable
from os import PathLike
from typing import Self

from typing_extensions import disjoint_base

from .stats import HeadroomStats

@disjoint_base
class Headroom:
    """Room for the growth of one pool. Every method may be called from any thread.

    keep_free: bytes of the host's memory that stay available to others, 0 = no floor. meminfo: a file like
    /proc/meminfo.
    """

    @property
    def keep_free(self) -> int:
        """Bytes of MemAvailable that are left to the host; settable."""

    @keep_free.setter
    def keep_free(self, nbytes: int) -> None: ...
    def __new__(cls, keep_free: int = 0, meminfo: str | PathLike[str] = "/proc/meminfo") -> Self: ...

    def set_groups(self, groups: Iterable[tuple[str | PathLike[str], int]]) -> None:
        """The memory cgroups that bound this process: at most 16 pairs of directory and version (1 or 2).
        Those that were set before are forgotten. Their files are opened anew."""

    def look(self, pages: int) -> None:
        """Reads the files at once, and grants anew. pages: how many pool pages are in use."""

    def stats(self) -> HeadroomStats:
        """As the last look found it."""
