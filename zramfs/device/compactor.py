# SPDX-License-Identifier: Apache-2.0
"""The compactor: a trio task that makes a sparse pool dense and gives its memory back.

Object compaction first (fewer zspages), then page migration (fewer pageblocks), in slices of about a
millisecond with the loop going on between them. Checkpoints are the sleeps; what one slice did is
complete in itself, so the task may be cancelled at any of them.
"""
from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import trio

from zramfs.host.readable import wait_until_readable
from zramfs.model.config import DEFAULT_PROACTIVENESS
from zramfs.model.stats import CompactorStats

from .jobs import InThread

if TYPE_CHECKING:
    from zramfs.store.store import Store

log = logging.getLogger(__name__)

SLICE_NS = 1_000_000
# Of a compaction by command, which runs in a worker thread: its length is how long `reset` waits for it.
JOB_SLICE_NS = 10_000_000
# An object that a thread holds is tried again on the next pass. One pass more than zs_compact() makes,
# because the compactor may have left one half-way, which the first pass only ends.
JOB_PASSES = 4
# Share of the time that slices may take: while nobody uses the device, while somebody does, and when
# the pool comes near its limit and writers would soon see ENOSPC.
IDLE_DUTY, BUSY_DUTY, HURRY_DUTY = 0.5, 0.1, 0.9
NEAR_LIMIT = 0.9
BALLOON_SLICE = 256  # frames a slice: one system call each, about 1 ms
SETTLE = 0.25  # seconds between two looks while objects are being freed
WAKE_FREES = 64  # objects: 256 KiB of the device, the least worth a look
MAX_DEFER = 64  # looks that are left out after runs without a gain, doubling from 1


def threshold(proactiveness: int) -> float:
    """Share of the pageblocks in use that must be winnable: 1 (never) for 0, then from 5 % down to 0.
    The default of 20 gives 4 %."""
    return 1.0 if proactiveness == 0 else (100 - proactiveness) / 2000


class Compactor:
    """store: the device's store at the moment, or None. requests: how many I/O requests it has had.
    in_thread: for compaction by command."""

    def __init__(
        self, store: Callable[[], Store | None], requests: Callable[[], int], in_thread: InThread
    ) -> None:
        self._store = store
        self._requests = requests
        self._in_thread = in_thread
        self.proactiveness = DEFAULT_PROACTIVENESS
        # Which a store signals when objects were freed. It outlives a run() that failed: a store keeps a
        # duplicate of the first one that it is given.
        self._wake_fd = -1
        self.is_short: Callable[[], bool] = lambda: False  # whether the host is about to refuse memory
        # Held by whoever drives the store's migration and balloon: slices here, `compact`, `reset`.
        self.lock = trio.Lock()
        self._poke = trio.Event()
        # Written to when something is freed. A store keeps a duplicate of the first one that it is given, so
        # there is one for the compactor's whole life, also when run() is started again.
        self._wake_fd = -1
        self._runs = self._slices = self._ns = 0

    def __del__(self) -> None:
        # run() refers to this object, so nobody waits for the descriptor any more.
        if self._wake_fd >= 0:
            os.close(self._wake_fd)

    def resume(self) -> None:
        """As Device.resume()."""
        self.lock = trio.Lock()
        self._poke = trio.Event()

    def stats(self) -> CompactorStats:
        store = self._store()
        won, blocks = store.winnable() if store else (0, 0)
        return CompactorStats(
            self.proactiveness, threshold(self.proactiveness), won / blocks if blocks else 0.0,
            self._runs, self._slices, self._ns,
        )

    def poke(self) -> None:
        """Something has changed that frees do not show: the store, the limit, a target."""
        self._poke.set()

    async def run(self) -> None:
        """The task. May be started again after any exception."""
        if self._wake_fd < 0:
            self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        while True:
            await self._work_until_dense()
            await self._wait_for_frees(self._wake_fd)

    def close(self) -> None:
        """After run() has ended for good."""
        fd, self._wake_fd = self._wake_fd, -1
        if fd >= 0:
            os.close(fd)

    async def compact(self, store: Store, what: str) -> tuple[int, int]:
        """All that compaction can win at once: "objects" (fewer zspages), "pages" (fewer pageblocks) or
        "all". Returns the pool pages and the pageblocks won. May be cancelled between two slices of 10 ms.
        Raises MemoryError."""
        before = store.stats().pages_compacted, store.migration.stats().blocks_freed
        async with self.lock:
            if what != "pages":
                for _ in range(JOB_PASSES):
                    while await self._in_thread(partial(store.compact_slice, JOB_SLICE_NS)):
                        pass
            if what != "objects":
                await self._in_thread(partial(store.migration.begin, True))
                while await self._in_thread(partial(_migrate_slice, store)):
                    pass
        return store.stats().pages_compacted - before[0], store.migration.stats().blocks_freed - before[1]

    async def _wait_for_frees(self, wake_fd: int) -> None:
        """Costs nothing while nothing is freed."""
        self._poke = trio.Event()
        if store := self._store():
            store.wake_after(WAKE_FREES, wake_fd)
        async with trio.open_nursery() as nursery:
            async def woken(wait: Callable, *arguments: object) -> None:
                await wait(*arguments)
                nursery.cancel_scope.cancel()
            nursery.start_soon(woken, self._poke.wait)
            nursery.start_soon(woken, wait_until_readable, wake_fd)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(wake_fd)

    async def _work_until_dense(self) -> None:
        """Looks, and works where it pays, until nothing is freed any more and nothing can be won."""
        defer = skip = 0
        frees = -1
        while (store := self._store()) is not None and (store.frees != frees or self._wants(store)):
            frees = store.frees
            if skip:
                skip -= 1
            elif self._wants(store):
                if await self._round(store):
                    defer = 0
                else:
                    defer = min(MAX_DEFER, defer * 2 or 1)
                    skip = defer
            await trio.sleep(SETTLE)

    def _wants(self, store: Store) -> bool:
        if self._balloon_step(store, 0):
            return True
        won, blocks = store.winnable()
        if not won or not self.proactiveness:
            return False
        return won / blocks > (0 if self._near_limit(store) else threshold(self.proactiveness))

    def _near_limit(self, store: Store) -> bool:
        s = store.stats()
        return self.is_short() or bool(s.mem_limit) and s.mem_used_total > NEAR_LIMIT * s.mem_limit

    async def _round(self, store: Store) -> bool:
        """One pass of everything over the whole pool. True if it gave something back."""
        self._runs += 1
        before = store.stats()
        while await self._slice(store, lambda: self._balloon_step(store, BALLOON_SLICE)):
            pass
        while await self._slice(store, lambda: store.compact_slice(SLICE_NS)):
            pass
        await self._slice(store, store.migration.begin)
        while await self._slice(store, store.migration.step):
            pass
        if self._store() is not store:
            return False
        after = store.stats()
        returned = after.bytes_returned + after.reserve > before.bytes_returned + before.reserve
        return returned or after.mem_used_total < before.mem_used_total

    def _balloon_step(self, store: Store, most: int) -> bool:
        """True if the balloon is (most = 0: could be) moved towards its target."""
        balloon, room = store.balloon.stats(), store.room()
        wanted = balloon.target - balloon.pages
        if wanted > 0 and room is not None:
            wanted = min(wanted, room)
        if wanted < 0 and balloon.isolated == balloon.pages:
            wanted = 0
        if most == 0:
            return wanted != 0
        return store.balloon.adjust(most, room) != 0

    async def _slice(self, store: Store, work: Callable[[], object]) -> bool:
        """Runs work once, if the store is still the device's, and rests in proportion."""
        requests = self._requests()
        async with self.lock:
            if self._store() is not store:
                return False
            began = time.monotonic_ns()
            more = bool(work())
            took = time.monotonic_ns() - began
        self._slices += 1
        self._ns += took
        duty = IDLE_DUTY
        if self._near_limit(store):
            duty = HURRY_DUTY
        elif self._requests() != requests:
            duty = BUSY_DUTY
        await trio.sleep(took / 1e9 * (1 / duty - 1))
        return more


def _migrate_slice(store: Store) -> bool:
    """True if there are pageblocks left to empty."""
    until = time.monotonic_ns() + JOB_SLICE_NS
    while store.migration.step():
        if time.monotonic_ns() >= until:
            return True
    return False
