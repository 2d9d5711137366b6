# SPDX-License-Identifier: Apache-2.0
"""A daemon and its keeper: what is handed over, who stands by, and a new keeper when the old one has died."""
from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio

from zramfs.device.mapped_memory import MappedMemory
from zramfs.host import memory_file
from zramfs.host.readable import wait_until_readable
from zramfs.host.work_thread import run_in_thread
from zramfs.keeper.client import Keeper, Place, Spare, fork_standby
from zramfs.lane.lane import PAGE_BYTES

from .papers import Papers

log = logging.getLogger(__package__)
__all__ = ["Inherited", "Keeper", "KeeperLine", "Kept", "LineSettings", "MappedMemory", "Place", "Spare"]

RESTART_PAUSE = 1.0  # seconds between two tries to start a keeper


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


class KeeperLine:
    def __init__(self, keeper: Keeper, settings: LineSettings) -> None:
        self._keeper = keeper
        self._settings = settings
        self.on_mount = settings.on_mount
        self._kept: Kept | None = None
        self._survives: bool | None = None  # None: it does not serve yet
        self._is_ending = False

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

    async def watch(self) -> None:
        """The task. May be started again after any exception."""
        told = None
        while True:
            if told != self.pids:
                told = self.pids
                await run_in_thread(partial(self._settings.on_change, *told))
            await wait_until_readable(self._keeper.fileno())
            if self._keeper.hear() is None:
                if self._is_ending:
                    return
                await self._renew()

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
