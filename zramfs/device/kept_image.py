# SPDX-License-Identifier: Apache-2.0
"""The image that a device is saved into when it ends, and from time to time."""
from __future__ import annotations

import errno
import logging
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from zramfs.errors import ZramfsError
from zramfs.host.work_thread import run_in_thread
from zramfs.image.writer import remove_left

if TYPE_CHECKING:
    from zramfs.model.config import DeviceConfig

    from .device import Device

log = logging.getLogger(__package__)

PAUSE = 0.2  # seconds between two looks whether another save has ended


class KeptImage:
    def __init__(self, device: Device, config: DeviceConfig) -> None:
        self._device = device
        self._every = config.keep_every
        self.path = config.keep
        # By the monotonic clock, when it is saved next; None while that is not known. A successor goes on
        # with it: a device whose process dies more often than it is saved would never be saved.
        self.due: float | None = None

    def inherit(self, due: float | None) -> None:
        """To be called before run()."""
        self.due = due

    async def set_path(self, path: Path | None) -> None:
        """None: the device is not saved at its end."""
        self.path = path

    async def save(self) -> None:
        """Without effect if there is no such file, or if it has everything already. Raises ZramfsError."""
        waits = False
        while self.path is not None and self._device.store is not None:
            if self._device.saver.is_saved(self.path):
                return
            try:
                await self._device.command("save")
                return
            except ZramfsError as error:
                if error.errno != errno.EBUSY or not self._device.saver.stats.is_running:
                    raise
            if not waits:
                log.info("waiting for the save that is under way")
            waits = True
            await trio.sleep(PAUSE)

    async def run(self) -> None:
        """Removes what a save has left that was killed with its process, and saves by the clock, if the
        configuration says so. What fails is said, and tried the next time."""
        if self.path is not None:
            try:
                await run_in_thread(partial(remove_left, self.path))
            except ZramfsError as error:
                log.warning("%s", error.sentence)
        while self._every:
            if self.due is None:
                self.due = time.monotonic() + self._every
            await trio.sleep(max(0.0, self.due - time.monotonic()))
            self.due = None
            try:
                await self.save()
            except ZramfsError as error:
                log.warning("%s is not saved: %s", self.path, error.sentence)
