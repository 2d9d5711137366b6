# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterable
from os import PathLike
from typing import Self

from typing_extensions import disjoint_base

from .stats import HeadroomStats

@disjoint_base
class Headroom:
    """Stops the growth of a pool while the host, or a memory cgroup of this process, has no memory to spare.

    keep_free: bytes of the host's available memory that are left to others, 0 = no such floor. meminfo: a
    file like /proc/meminfo. Any thread may call any method. Raises ValueError for 2^62 bytes or more.
    """

    @property
    def keep_free(self) -> int:
        """Bytes of the host's available memory that are left to others; settable."""

    @keep_free.setter
    def keep_free(self, nbytes: int) -> None: ...
    def __new__(cls, keep_free: int = 0, meminfo: str | PathLike[str] = "/proc/meminfo") -> Self: ...

    def set_groups(self, groups: Iterable[tuple[str | PathLike[str], int]]) -> None:
        """The memory cgroups that bound this process: pairs of a directory and the version of its hierarchy
        (1 or 2). Those that were set before are forgotten. Raises ValueError for more than 16."""

    def look(self, pages: int) -> None:
        """Reads what host and groups can give now. pages: how many the pool has. To be called now and then,
        because others use memory too; a pool that needs more than it was granted looks by itself."""

    def stats(self) -> HeadroomStats:
        """HeadroomStats of the last look."""
