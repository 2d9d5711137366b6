# SPDX-License-Identifier: Apache-2.0
"""Keeps ready what another process needs to take over from this daemon.

Without a keeper's line nothing here has an effect.
"""
from __future__ import annotations

import contextlib
import errno
import logging
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import trio

from zramfs.device.device import Device
from zramfs.device.takeover import settings_of
from zramfs.errors import ZramfsError
from zramfs.host import memory_file
from zramfs.model.config import DeviceConfig

from .keeper_line import Inherited, KeeperLine, Kept
from .layouts import LAYOUTS
from .orders import end_process, take_orders
from .own_mount import OwnMount
from .papers import Papers, packed_config
from .service import Notifier

log = logging.getLogger(__package__)

INTERVAL = 10.0  # seconds between two looks for settings that a successor must know
SURVIVES = "another process takes over when the daemon dies"
NO_RESEND = "it ends with its daemon: this kernel is older than 6.9, and sends no request a second time"


class Succession:
    """inherited: what this daemon itself has taken over."""

    def __init__(
        self, config: DeviceConfig, line: KeeperLine | None, inherited: Inherited | None,
        notifier: Notifier | None, disk: OwnMount, tree: OwnMount,
    ) -> None:
        self._config = config
        self._line = line
        self._notifier = notifier
        self._disk = disk
        self._tree = tree
        self._device: Device | None = None
        self._is_over = False
        self.kept = inherited.kept if inherited else None
        self._layouts_before = inherited.papers.get("layouts") if inherited else LAYOUTS
        self._written: tuple[dict[str, Any], int | None] = ({}, None)
        self._stored: dict[str, int] = {}  # by the service manager, under _lock
        # Innermost. Held while papers are written, and for _written.
        self._lock = threading.Lock()

    def prepare(self, connection: int) -> Kept | None:
        """Descriptors for a device that begins. Raises ZramfsError for swap whose data could be swapped out
        to itself."""
        config = self._config
        if self._line is not None:
            refusal = memory_file.refusal() if config.reserve and not config.forced else None
            if refusal:
                raise ZramfsError(
                    errno.EPERM, "swap would not be safe here, so nothing was set up; --force goes on: "
                    f"{refusal}; when the daemon dies, its data could be swapped out to itself")
            # What is locked in memory has to stay there between two processes, too.
            self.kept = Kept.new(connection, unswapped=config.reserve > 0 or config.lock)
        return self.kept

    def begin(self, device: Device, can_resend: bool) -> None:
        """From here on another process can take over, where the kernel sends what it would have to answer."""
        if self._line is None:
            return
        self._device = device
        if self._layouts_before != LAYOUTS:
            # The version before may not read what is written from here on.
            self._line.forget_way_back()
        self.write()
        self._line.serving(can_resend)
        device.survival = SURVIVES if can_resend else NO_RESEND
        device.on_change = self.write
        if not can_resend:
            log.warning("%s: the device would not survive: %s", self._config.name, NO_RESEND)

    def tasks(self) -> list[tuple[str, Callable[[], Awaitable[None]]]]:
        if self._line is None:
            return []
        return [("keeper", self._line.watch), ("papers", self._keep_papers),
                ("orders", partial(take_orders, self._config.rundir, self._line.upgrade, self._let_go))]

    def _let_go(self) -> None:
        """Ends this process, for the one that stands by. Without effect where the device ends."""
        self.write()
        if not self._is_over:
            log.warning("%s: this process ends for another version of zramfs", self._config.name)
            end_process()

    def tree_mounted(self) -> None:
        """In a thread."""
        if self._device is not None and self._line is not None:
            self.write()
            self._line.on_mount()

    def end(self) -> None:
        """Nobody is to take over any more."""
        self._is_over = True
        if self._line is not None:
            self._line.ending()
        if self.kept is not None:
            with contextlib.suppress(OSError), self._lock:
                Papers(self.kept.papers).write({})
        if self._notifier and self._stored:
            self._notifier.forget(self._stored)

    async def _keep_papers(self) -> None:
        """For what changes without a command: the ledger and the budget of write-back."""
        while True:
            await trio.sleep(INTERVAL)
            self.write()

    def write(self) -> None:
        """What a successor needs, and where it has to stand. Without effect where nothing has changed."""
        kept, device, line = self.kept, self._device, self._line
        if kept is None or device is None or line is None or self._is_over:
            return
        with self._lock:
            notifier = self._notifier
            found = {
                "layouts": LAYOUTS, "config": packed_config(self._config), "settings": settings_of(device),
                "disk": self._disk.kept(), "tree": self._tree.kept(),
                "notifier": [notifier.address, notifier.watchdog] if notifier else None,
            }
            backing = device.backing_store.fileno()
            if self._written == (found, backing):
                return
            try:
                Papers(kept.papers).write(found)
            except OSError as error:
                log.error("%s: a successor would not know of this change: %s", self._config.name, error)
                return
            kept.backing = backing
            line.keep(kept)
            if notifier and self._stored != kept.named():
                # Another backing store has another descriptor, which may have the number of the last one.
                notifier.forget(self._stored.keys() - kept.named().keys())
                notifier.store(kept.named())
                self._stored = kept.named()
            self._written = (found, backing)
