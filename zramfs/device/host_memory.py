# SPDX-License-Identifier: Apache-2.0
"""A trio task that watches how much memory the host and the memory cgroups can still give.

The limit itself is kept by the pool, whose writers ask a Headroom (allocator/headroom.pyx). This task does
what a writer can't do. It looks while nobody writes, because others use memory too. It has the pool made
smaller before the room ends. It notices that the process is in another cgroup, and takes it out of one that
was given a limit. It says in the log when writes are refused.
"""
from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from allocator.headroom import Headroom
from zramfs.host import memcg, safety
from zramfs.host.pressure import available_share, memory_stall
from zramfs.model.config import DeviceConfig
from zramfs.text.sizes import format_size, total_ram

if TYPE_CHECKING:
    from zramfs.store.store import Store

log = logging.getLogger(__name__)

MIB = 1 << 20
# Seconds between two looks: while there is room, and while it is short. A look takes about 0.1 ms.
FAR, NEAR = 1.0, 0.1
# Seconds between two looks for a change of groups or limits, which reads a dozen files: 1 ms.
GROUPS = 5.0
# Room below which the pool is made smaller, if the floor is not more: as far as a pool grows in 0.1 to 0.5 s.
LEAST_NEAR = 64 * MIB
# Of supply: the part of its limit from which on a pool is near it, the share of time (%) in which some task
# waits for memory, and the part of the memory that is available where there is plenty. Where there is, tasks
# wait for the limit of their own cgroup.
NEAR_LIMIT, STALLED, PLENTY = 0.9, 1.0, 0.5
# What a Headroom takes.
MOST_KEEP_FREE = (1 << 62) - 1
MOST_GROUPS = 16


def default_keep_free(total: int) -> int:
    """Bytes of memory that a device leaves to a host with `total` bytes of RAM: 64 MiB or 3 %, whichever is
    more, but at most a quarter.

    A kernel needs about 1 % for itself (vm.min_free_kbytes and the watermarks above it), and programs need
    some to start, and to end, in.
    """
    return min(max(64 * MIB, total * 3 // 100), total // 4)


class HostMemory:
    """store: the device's store at the moment, or None. shrink: what has the pool made smaller."""

    def __init__(
        self, config: DeviceConfig, store: Callable[[], Store | None],
        shrink: Sequence[Callable[[], None]] = (), meminfo: Path = Path("/proc/meminfo"),
    ) -> None:
        self._store = store
        self._shrink = shrink
        self._meminfo = meminfo
        # Swap frees more of the host's memory than it takes.
        default = 0 if config.reserve else default_keep_free(total_ram(meminfo))
        self._first_keep_free = default if config.keep_free is None else config.keep_free
        self.headroom = Headroom(self._first_keep_free, meminfo)
        self._refused = 0
        self._is_full = False
        if found := memcg.hierarchy():
            self._watch(found)

    async def set_keep_free(self, nbytes: int) -> None:
        """A floor above all memory keeps the pool from growing at all."""
        self.headroom.keep_free = min(nbytes, MOST_KEEP_FREE)
        self._look()

    def close(self) -> None:
        """Closes the files of the groups. The pool must be gone."""
        self.headroom.set_groups(())

    def forget(self) -> None:
        """Back to what the device was started with, for a pool that is empty."""
        self.headroom.keep_free = self._first_keep_free

    def room(self) -> int | None:
        """Bytes that the pool may take before writes get ENOSPC: the least of what mem_limit, the host and
        the memory cgroups leave. None = not bounded."""
        store = self._store()
        pages = store.room() if store else None
        each = (self.headroom.stats().room, None if pages is None else pages << 12)
        return min((room for room in each if room is not None), default=None)

    @property
    def is_near(self) -> bool:
        """Whether the room was short at the last look."""
        stats = self.headroom.stats()
        return stats.room is not None and stats.room < max(stats.keep_free, LEAST_NEAR)

    @property
    def supply(self) -> str:
        """How much memory there is for now: "short", "fair" or "plenty". Reads two files of /proc."""
        store, head = self._store(), self.headroom.stats()
        now = store.stats() if store else None
        limit = now.mem_limit if now else 0
        if self.is_near or now and limit and now.mem_used_total > NEAR_LIMIT * limit:
            return "short"
        if available_share(self._meminfo) > PLENTY:
            return "fair" if limit or head.group_room is not None else "plenty"
        return "short" if memory_stall() >= STALLED else "fair"

    async def run(self) -> None:
        followed = time.monotonic()
        while True:
            if time.monotonic() - followed >= GROUPS:
                self._follow_groups()
                followed = time.monotonic()
            self._look()
            if self.is_near:
                for each in self._shrink:
                    each()
            self._say()
            await trio.sleep(NEAR if self.is_near else FAR)

    def _look(self) -> None:
        store = self._store()
        self.headroom.look(store.stats().mem_used_total >> 12 if store else 0)

    def _follow_groups(self) -> None:
        """Leaves a group that was given a limit, where that is allowed, and watches the others."""
        found = memcg.hierarchy()
        if found and found.limited() is not None and found.may_leave():
            refusal, note = safety.leave_group()
            log.warning("%s", refusal or note)
            found = memcg.hierarchy()
        if found:
            self._watch(found)

    def _watch(self, found: memcg.Hierarchy) -> None:
        """Has the files opened anew, since a group may have been removed and made again under its name."""
        self.headroom.set_groups([(group, found.version) for group in found.bounding()[:MOST_GROUPS]])

    def _say(self) -> None:
        """Once when writes are refused, and once when there is room again."""
        stats = self.headroom.stats()
        if stats.refused != self._refused and not self._is_full:
            self._is_full = True
            why = f"less than {format_size(stats.keep_free)} of the host's memory are available (keep_free)"
            if stats.room == stats.group_room:
                why = "the limit of a memory cgroup is near"
            log.warning("no memory for new data: %s; writes get ENOSPC until there is more, and old data "
                        "stays", why)
        elif self._is_full and stats.refused == self._refused and not self.is_near:
            self._is_full = False
            log.warning("there is memory for new data again")
        self._refused = stats.refused
