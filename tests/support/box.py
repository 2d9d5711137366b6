# SPDX-License-Identifier: Apache-2.0
"""A device without a mount, to which tests write as through the files of zram/."""
from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fakes import FakeLane
from zramfs.device.device import Device
from zramfs.errors import ZramfsError
from zramfs.model.config import DeviceConfig
from zramfs.tree.attributes import ATTRIBUTES

MIB = 1 << 20
PAGE = 4096
BY_NAME = {a.name: a for a in ATTRIBUTES}


class Box:
    """A device, written to as through the files of zram/."""

    def __init__(self, **config: object) -> None:
        self.lane = FakeLane()
        self.device = Device(
            DeviceConfig(directory=Path("/mnt/z0"), rundir=Path("/run/z0"), name="z0", **config), self.lane)

    async def start(self) -> Box:
        await self.device.start()
        self.lane.started = True
        return self

    async def write(self, name: str, data: str | bytes) -> None:
        data = data.encode() if isinstance(data, str) else data
        await self.device.command(BY_NAME[name].parse(data))

    async def refused(self, name: str, data: str | bytes, words: str = "") -> int:
        before = self.device.stats()
        with pytest.raises(ZramfsError) as caught:
            await self.write(name, data)
        assert words in str(caught.value)
        assert self.device.stats().algorithms == before.algorithms
        return caught.value.errno

    async def outcome(self, name: str, data: str) -> int:
        """The errno of a write, 0 if it succeeds."""
        try:
            await self.write(name, data)
        except ZramfsError as error:
            return error.errno
        return 0

    def show(self, name: str) -> str:
        return BY_NAME[name].show(self.device.stats())

    @property
    def store(self):
        return self.lane.store
