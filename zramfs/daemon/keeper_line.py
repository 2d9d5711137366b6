# SPDX-License-Identifier: Apache-2.0
"""A daemon and its keeper: what is handed over, who stands by, and a new keeper when the old one has died."""
from __future__ import annotations

import errno
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio

from zramfs.device.mapped_memory import MappedMemory
from zramfs.errors import ZramfsError
from zramfs.host import memory_file
from zramfs.host.readable import wait_until_readable
from zramfs.host.work_thread import run_in_thread
from zramfs.keeper import client
from zramfs.keeper.client import PROGRAM, Keeper, Place, Spare, expect_program, fork_standby
from zramfs.lane.lane import PAGE_BYTES

from .papers import Papers

log = logging.getLogger(__package__)
__all__ = [
    "PROGRAM", "Inherited", "Keeper", "KeeperLine", "Kept", "LineSettings", "MappedMemory", "Place",
    "Spare", "expect_program",
]

RESTART_PAUSE = 1.0  # seconds between two tries to start a keeper
KEEPER_TIMEOUT = 20.0  # seconds for another keeper in the process of the last one
STANDBY_TIMEOUT = 120.0  # seconds for a process that is to take over, as in keeper.c


@dataclass
class Kept:
    """The descriptors that outlive a daemon, in the keeper's order. The lane closes connection. backing: of
    the backing store, or None."""

    connection: int
    page: int
    papers: int
    memory: int
    backing: int | None = None

    @classmethod
    def new(cls, connection: int, *, unswapped: bool) -> Kept:
        """unswapped: as for memory_file.new()."""
        page, papers, memory = (
            memory_file.new(name, unswapped=unswapped) for name in ("zramfs-page", "zramfs-papers", "zramfs"))
        os.ftruncate(page, PAGE_BYTES)
        return cls(connection, page, papers, memory)

    def fds(self) -> list[int]:
        return list(self.named().values())

    def named(self) -> dict[str, int]:
        return {name: fd for name, fd in vars(self).items() if fd is not None}


@dataclass
class Inherited:
    """What a predecessor has left. mapped: its memory file, as far as this process has it mapped. since: by
    the monotonic clock, when it was this process's turn."""

    kept: Kept
    papers: dict[str, Any]
    mapped: MappedMemory = field(default_factory=MappedMemory)
    since: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, fds: list[int]) -> Inherited:
        kept = Kept(*fds)
        return cls(kept, Papers(kept.papers).read())


@dataclass(frozen=True)
class LineSettings:
    """rundir, command: of keepers and of the processes that they start. standby: one is wanted. on_change:
    called in a thread with the pids of the keeper and of the standby (0 = none) when one of them is another.
    on_mount: called in a thread when the tree was mounted anew."""

    rundir: Path
    command: list[str]
    standby: bool
    on_change: Callable[[int, int], object]
    on_mount: Callable[[], object]


class _KeeperGoneError(ZramfsError):
    """The keeper has died, and _renew() starts another one."""


class KeeperLine:
    def __init__(self, keeper: Keeper, settings: LineSettings) -> None:
        self._keeper = keeper
        self._settings = settings
        self.on_mount = settings.on_mount
        self._kept: Kept | None = None
        self._survives: bool | None = None  # None: it does not serve yet
        self._is_ending = False
        # What the keeper says, for upgrade() while it runs. None: it has died.
        self._told: trio.MemorySendChannel[tuple[int, int] | None] | None = None

    @classmethod
    def fork(cls, settings: LineSettings) -> KeeperLine:
        """As Keeper.fork(): the caller's process becomes the keeper."""
        return cls(Keeper.fork(settings.rundir, settings.command), settings)

    @property
    def pids(self) -> tuple[int, int]:
        return self._keeper.pid, self._keeper.standby_pid

    def fork_standby(self) -> Place | None:
        """As there: a place in the process that stands by, and None here."""
        return fork_standby(self._keeper)

    def register_spare(self, spare: Spare) -> bool:
        """As Spare.register()."""
        return spare.register(self._keeper)

    def keep(self, kept: Kept) -> None:
        self._kept = kept
        self._keeper.keep(kept.fds())

    def serving(self, survives: bool) -> None:
        """To be called again when that changes."""
        if survives is not self._survives:
            self._survives = survives
            self._keeper.serving(survives=survives, standby=self._settings.standby)

    def ending(self) -> None:
        """From here on the connection ends with this process."""
        self._is_ending = True
        self._keeper.ending()

    def forget_way_back(self) -> None:
        """The keeper does not return to the version before, whatever becomes of this daemon."""
        self._keeper.forget_way_back()

    async def watch(self) -> None:
        """The task. May be started again after any exception."""
        told = None
        while True:
            if told != self.pids:
                told = self.pids
                await run_in_thread(partial(self._settings.on_change, *told))
            await wait_until_readable(self._keeper.fileno())
            heard = self._keeper.hear()
            if self._told is not None:
                self._told.send_nowait(heard)
            if heard is None:
                if self._is_ending:
                    return
                await self._renew()

    async def upgrade(self, program: Path, command: list[str]) -> int:
        """Makes the keeper another program, in the same process, and has it start another daemon, which
        stands by. Returns the pid of that when it is ready: then it takes over as soon as this process ends.
        Raises ZramfsError, and the keeper and a standby are as before, or are on the way to that."""
        if not self._survives:
            raise ZramfsError(
                errno.EOPNOTSUPP, "another process can take over only from a daemon that serves, and only "
                "with Linux 6.9 or later: this device goes on until it is stopped")
        if self._is_ending or self._told is not None:
            raise ZramfsError(errno.EBUSY, "the device ends, or is upgraded already")
        self._told, told = trio.open_memory_channel[tuple[int, int] | None](math.inf)
        try:
            with self._told, told:
                await self._become(program, command, told, (PROGRAM, self._settings.command))
                try:
                    # Also for a device that has none: so the new one is seen to work before it is needed.
                    self._keeper.serving(survives=True, standby=True)
                    return await _hear_of_standby(told)
                except _KeeperGoneError:  # and the other program with it
                    raise
                except ZramfsError:
                    await self._go_back(told)
                    raise
        finally:
            self._told = None

    async def _become(
        self, program: Path, command: list[str], told: trio.MemoryReceiveChannel[tuple[int, int] | None],
        back: tuple[Path, list[str]] | None = None,
    ) -> None:
        self._keeper.upgrade(program, command, back)
        with trio.move_on_after(KEEPER_TIMEOUT):
            while (heard := await told.receive()) is not None:
                if heard[0] == client.NOT_UPGRADED:
                    raise ZramfsError(heard[1], f"{program} cannot be run: {os.strerror(heard[1])}")
                if heard[0] == client.GREETING:
                    return
            raise _KeeperGoneError(errno.EIO, f"{program} has ended at once, and another keeper is started")
        raise ZramfsError(
            errno.ETIMEDOUT, f"{program} was started, and did not answer for {KEEPER_TIMEOUT:g} s")

    async def _go_back(self, told: trio.MemoryReceiveChannel[tuple[int, int] | None]) -> None:
        """To the keeper and the command of this version."""
        try:
            await self._become(PROGRAM, self._settings.command, told)
        except ZramfsError as error:
            log.error("the keeper is still that of the other version: %s", error)
        self._keeper.serving(survives=True, standby=self._settings.standby)

    async def _renew(self) -> None:
        log.error("the keeper, process %d, has died; another one is started", self._keeper.pid)
        old = self._keeper
        while True:
            try:
                new = await run_in_thread(
                    partial(Keeper.start, self._settings.rundir, self._settings.command))
                break
            except OSError as error:
                log.error("no keeper can be started: %s; the device would not outlive its daemon, and the "
                          "next try is in %g s", error, RESTART_PAUSE)
                await trio.sleep(RESTART_PAUSE)
        self._keeper = new
        old.close()
        if self._kept is not None and not self._is_ending:
            new.keep(self._kept.fds())
            if self._survives is not None:
                new.serving(survives=self._survives, standby=self._settings.standby)


async def _hear_of_standby(told: trio.MemoryReceiveChannel[tuple[int, int] | None]) -> int:
    """The pid of the first one that is ready. Raises ZramfsError."""
    with trio.move_on_after(STANDBY_TIMEOUT):
        while (heard := await told.receive()) is not None:
            if heard[0] == client.STANDBY and heard[1]:
                return heard[1]
            if heard[0] == client.STANDBY:
                raise ZramfsError(
                    errno.ENOEXEC, "the process that was to take over has ended before it was ready; `zramfs "
                    "log` shows why, and the device goes on with the version that it had")
        raise _KeeperGoneError(
            errno.EIO, "the keeper has died meanwhile, and another one is started: try again")
    raise ZramfsError(
        errno.ETIMEDOUT, f"the process that was to take over was not ready within {STANDBY_TIMEOUT:g} s; the "
        "device goes on with the version that it had")
