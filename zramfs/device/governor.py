# SPDX-License-Identifier: Apache-2.0
# Order of the trio locks: Device._busy, Governor._turn, WardenLink's.
"""Keeps the file system on a device from asking for more memory than the pool may take.

Four steps, each for what the one before lets through (docs/operations.md, "A file system that is full"):
 1. little of what was written waits in the page cache;
 2. the file system's users get as many free blocks as the pool can take at its present ratio;
 3. past the limit there is a reserve, for what was promised and is overwritten; in it writers are braked;
 4. in the second half of the reserve the file system is frozen, until there is room.

All that decides is in here; host/warden.py acts.
"""
from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from zramfs.errors import ZramfsError
from zramfs.host import loops
from zramfs.host.mounts import Mount, mounts
from zramfs.host.readable import wait_until_readable
from zramfs.model.stats import GovernorStats
from zramfs.text.sizes import PAGE, format_size

from .warden_link import WardenLink

if TYPE_CHECKING:
    from pathlib import Path

    from zramfs.store.store import Store

log = logging.getLogger(__name__)

MIB = 1 << 20
# A sixteenth of the limit; less than 12 MiB would leave less than 3 MiB for the page cache, and writers then
# wait more than they write (ext4, 400 MiB: 110 MiB/s with 2 MiB, 140 to 170 with 8, 137 to 171 unbounded).
RESERVE_SHARE = 16
LEAST_RESERVE, MOST_RESERVE = 12 * MIB, 256 * MIB
# What the pool may grow by before a new bound is in force.
REACTION = 32 * MIB
# Bytes of change after which the bound is looked at again, of an eighth of what is left.
LEAST_STEP, MOST_STEP = MIB // 4, 16 * MIB
# Seconds between two looks while nothing changes: what compaction wins, and the host's memory.
INTERVAL = 1.0
BRAKED_BYTES = PAGE  # that may wait in the page cache for a writer who is braked


def reserve_for(limit: int) -> int:
    """Bytes that a governed pool may take beyond `limit`."""
    return min(max(limit // RESERVE_SHARE, LEAST_RESERVE), MOST_RESERVE)


def allowance(room: int, reserve: int, ratio: float, *, quick: bool = True) -> int:
    """Bytes of new blocks that a file system may give out, when the pool may take `room` bytes more and then
    a reserve, and has stored `ratio` bytes in each of its own.

    What the room takes at that ratio. But data may come that does not compress: what the pool can take of
    that before it must be frozen is given in any case, and the rest only as far as it comes too late for
    the next look. Where blocks are not quick to take back, nothing of the rest is given, and less altogether:
    that is btrfs, which writes its own blocks anew at each commit, before it frees the old ones.
    """
    if not quick:
        room -= reserve // 4
    if room <= 0:
        return 0
    safe = room + reserve // 4  # half of the reserve, less what may wait in the page cache
    late = max(0, safe - REACTION) if quick else 0
    return int(min(ratio * room, safe + max(0.0, ratio - 1) * late))


class Governor:
    """store: the device's, or None. host_room: bytes that the host lets the pool take, None = any number.
    disk: the file under the loop device of the file system that is governed."""

    def __init__(
        self, store: Callable[[], Store | None], host_room: Callable[[], int | None], disk: Path
    ) -> None:
        self._store = store
        self._host_room = host_room
        self._disk = disk
        self._turn = trio.Lock()
        self._link: WardenLink | None = None
        self._linked = trio.Event()
        self._dismissed = False
        self._poke = trio.Event()
        # A limit that was lowered below what is stored leaves that where it is.
        self._base = 0
        self._limit = 0
        self._waits: int | None = None
        self._quick = self._prompt = True
        self._free = 0
        self._lent = 0
        self._wake_fd = -1
        # Whether it had frozen the file system: of a warden whose trio loop is gone. None = there is none.
        self._lost: bool | None = None
        self.stats = GovernorStats()

    async def take(self) -> None:
        """Governs the file system on the device from here on; without effect when it is governed. Raises
        ZramfsError: ENOENT when none is mounted, and what the warden is refused."""
        async with self._turn:
            if self._link is None:
                await self._take()

    async def _take(self, *, frozen: bool = False) -> None:
        """frozen: by a warden that died."""
        store = self._store()
        if store is None:
            raise ZramfsError(errno.EINVAL, "there is nothing to govern: the device is not set up")
        mount = await trio.to_thread.run_sync(self._find)
        link = await WardenLink.start()
        try:
            found = await link.ask("take", mountpoint=str(mount.mountpoint), device=mount.source,
                                   fstype=mount.fstype, frozen=frozen)
            self._quick, self._prompt, self._free = found["quick"], found["prompt"], found["free"]
            self._limit = self._base = self._lent = 0
            self._waits = None
            self.stats = replace(
                self.stats, state="on", mountpoint=str(mount.mountpoint), fstype=mount.fstype)
            await self._look(link, store)
        except BaseException:
            self._forget()
            await link.close()
            raise
        self._link = link
        self._linked.set()
        log.info("the file system on %s is kept within the pool's limit", mount.mountpoint)

    async def set_to(self, wanted: bool | int) -> None:
        """True: take(); False: let_go(); bytes: lend(). Raises ZramfsError."""
        if wanted is True:
            await self.take()
        elif wanted is False:
            await self.let_go()
        else:
            await self.lend(wanted)

    async def lend(self, nbytes: int) -> None:
        """Leaves the file system so many free blocks more than the pool has room for, until it is told
        otherwise: one that becomes smaller needs what is withheld of it. All else goes on, so that writers
        who use them up are braked and frozen. Without effect when nothing is governed."""
        async with self._turn:
            store = self._store()
            if self._link is not None and store is not None:
                self._lent = nbytes
                await self._look(self._link, store)

    def poke(self) -> None:
        """Has it look at once: the device has another size."""
        self._poke.set()

    async def let_go(self, *, ends: bool = False) -> None:
        """Ends that; without effect when nothing is governed. ends: the device ends too."""
        async with self._turn:
            if self._link is not None:
                self._dismissed = True
                await self._link.close(ends=ends)

    @property
    def is_governing(self) -> bool:
        return self._link is not None or self._lost is not None

    def inherit(self) -> None:
        """A predecessor governed the file system. Its warden thaws that, and gives everything back, when it
        finds the daemon gone. To be called before run()."""
        self._lost = True

    def expect_limit(self, limit: int) -> None:
        """To be called before the pool gets another limit: one below what is stored must not make the file
        system's next write fail."""
        store = self._store()
        if self._link is not None and store is not None:
            above = max(0, self._used(store) - limit) if limit else 0
            self._give(store, reserve_for(limit), above)
            self._poke.set()

    def _give(self, store: Store, reserve: int, above: int) -> None:
        """above: what is stored above the limit."""
        store.set_overdraft((reserve + above) // PAGE, reserve // PAGE)

    def _used(self, store: Store) -> int:
        return store.stats().mem_used_total + store.balloon.stats().pages * PAGE

    def resume(self) -> None:
        """As Device.resume(). The warden's pipes belonged to the old loop, so another one takes its place."""
        self._turn = trio.Lock()
        self._linked = trio.Event()
        self._poke = trio.Event()
        if self._link is not None:
            self._lost = self.stats.state == "frozen"
            self._link.kill()
            self._link = None

    async def run(self) -> None:
        """The task. May be started again after any exception."""
        if self._wake_fd < 0:
            self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        if self._lost is not None:
            frozen, self._lost = self._lost, None
            await self._take_again(frozen)
        while True:
            await self._linked.wait()
            frozen = await self._govern(self._wake_fd)
            if not self._dismissed:
                await self._take_again(frozen)
            self._dismissed = False

    def close(self) -> None:
        """After run() has ended for good."""
        fd, self._wake_fd = self._wake_fd, -1
        if fd >= 0:
            os.close(fd)

    def _find(self) -> Mount:
        devices = loops.find(self._disk)
        for mount in mounts():
            if mount.source in devices:
                return mount
        raise ZramfsError(
            errno.ENOENT, f"expected a file system on a loop device on {self._disk}, but none is mounted")

    async def _govern(self, wake_fd: int) -> bool:
        """Until nobody has the file system mounted any more, or the warden ends for another reason. True if
        that left it frozen."""
        link = self._link
        assert link is not None  # _linked is set
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._looks, link, wake_fd)
            await link.ended()
            nursery.cancel_scope.cancel()
        async with self._turn:
            frozen = self.stats.state == "frozen"
            log.info("the file system on %s is no longer governed", self.stats.mountpoint)
            await link.close()
            self._link = None
            self._linked = trio.Event()
            self._forget()
        return frozen

    async def _take_again(self, frozen: bool) -> None:
        """A file system that is mounted all the same, since its warden died."""
        for pause in itertools.chain((0.1, 1.0, 10.0), itertools.repeat(60.0)):
            try:
                async with self._turn:
                    if self._link is None:
                        await self._take(frozen=frozen)
                return
            except ZramfsError as error:
                if error.errno == errno.ENOENT or self._store() is None:
                    return
                self._complain(f"the file system is not governed: {error}")
            await trio.sleep(pause)

    def _forget(self) -> None:
        # The reserve stays, for what the file system still writes at its umount or after `govern=off`.
        self.stats = GovernorStats(freezes=self.stats.freezes, last_error=self.stats.last_error)

    async def _looks(self, link: WardenLink, wake_fd: int) -> None:
        while (store := self._store()) is not None:
            step = LEAST_STEP if self.stats.room is None else self.stats.room // 8
            store.wake_after_change(min(max(step, LEAST_STEP), MOST_STEP), wake_fd)
            await self._wait(wake_fd)
            async with self._turn:
                if self._store() is not store:
                    return
                try:
                    await self._look(link, store)
                except ZramfsError as error:
                    if error.errno in (errno.EPIPE, errno.ETIMEDOUT):
                        return
                    self._complain(str(error))

    def _complain(self, sentence: str) -> None:
        if sentence != self.stats.last_error:
            log.warning("%s: %s", self.stats.mountpoint, sentence)
        self.stats = replace(self.stats, last_error=sentence)

    async def _wait(self, wake_fd: int) -> None:
        self._poke = trio.Event()
        with trio.move_on_after(INTERVAL):
            async with trio.open_nursery() as nursery:
                async def woken(wait: Callable, *arguments: object) -> None:
                    await wait(*arguments)
                    nursery.cancel_scope.cancel()
                nursery.start_soon(woken, self._poke.wait)
                nursery.start_soon(woken, wait_until_readable, wake_fd)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(wake_fd)

    async def _look(self, link: WardenLink, store: Store) -> None:
        """Puts in force what the pool's state asks for."""
        stats = store.stats()
        used = self._used(store)
        limit, host = stats.mem_limit, self._host_room()
        # No data on the disk takes more than its size and what manages it.
        if host is not None and host > store.disksize + 2 * reserve_for(limit):
            host = None
        self._base = max(limit, used if limit != self._limit else min(self._base, used))
        self._limit = limit
        reserve = reserve_for(limit) if limit or host is not None else 0
        self._give(store, reserve, self._base - limit)
        rooms = [*([limit - used] if limit else []), *([host - reserve] if host is not None else [])]
        room = min(rooms, default=None)
        # How far into the reserve; what a lowered limit left above it does not count.
        overs = [*([used - self._base] if limit else []), *([reserve - host] if host is not None else [])]
        over = max(overs, default=0)
        self.stats = replace(self.stats, room=room, reserve=reserve, over=max(0, over))
        # The quick ones first: where blocks are slow to take back, these keep the pool in its reserve.
        await self._bound(link, reserve, braked=over > reserve // 4)
        await self._freeze_or_thaw(link, over, reserve)
        held = stats.orig_data_size - stats.written_back * PAGE
        prior = max(1, limit // 16)  # of data that does not compress: few pages are no measure
        ratio = (held + prior) / (stats.mem_used_total + prior)
        allowed = None if room is None else allowance(room, reserve, ratio, quick=self._quick) + self._lent
        answer = await link.ask("allow", bytes=allowed)
        if room is not None and not self._prompt and answer["free"] - self._free > max(room, MIB):
            # What was deleted lies in the pool until the next commit, up to half a minute.
            await link.ask("sync")
        self._free = answer["free"]
        self.stats = replace(self.stats, allowed=allowed, ratio=ratio, free=answer["free"],
                             withheld=answer["withheld"])

    async def _bound(self, link: WardenLink, reserve: int, *, braked: bool) -> None:
        wait = BRAKED_BYTES if braked else reserve // 4 or None
        if wait != self._waits:
            self._waits = wait
            try:
                await link.ask("wait", bytes=wait)
            except ZramfsError as error:
                self._complain(f"what waits in the page cache cannot be bounded: {error}")

    async def _freeze_or_thaw(self, link: WardenLink, over: int, reserve: int) -> None:
        state, frozen = self.stats.state, False
        if state != "frozen" and reserve and over > reserve // 2:
            answer = await link.ask("freeze")
            self.stats = replace(self.stats, freezes=self.stats.freezes + 1)
            log.warning(
                "%s is frozen: what was overwritten compresses worse than before, and the pool is %s above "
                "its limit. Writers wait until there is room: raise mem_limit by that, and delete something",
                self.stats.mountpoint, format_size(over))
            frozen = True
        elif state == "frozen":
            answer = await link.ask("look")
            frozen = over > 0 or answer["frozen"] == "freezing"
            if not frozen:
                await link.ask("thaw")
                log.warning("%s goes on: there is room", self.stats.mountpoint)
            elif answer["frozen"] not in ("freezing", "yes"):
                self._complain(f"it could not be frozen: {answer['frozen']}")
        state = "frozen" if frozen else "braked" if over > reserve // 4 else "on"
        self.stats = replace(self.stats, state=state)
