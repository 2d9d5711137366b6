# SPDX-License-Identifier: Apache-2.0
"""A device and the files of its tree, without a mount: what a write or a read of them comes to."""
from __future__ import annotations

import errno
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support.fakes import FakeLane
from zramfs.device.device import Device
from zramfs.model.config import DeviceConfig
from zramfs.tree.files import tree_of
from zramfs.tree.tree import Directory, File, Node

PAGE = 4096
OK = "ok"
BLOCK_STATE = re.compile(r"( *\d+) ( *\d+)\.(\d{6}) ([s.][w.][h.][i.][r.][n.])")


def files(node: Node, above: str = "") -> dict[str, File]:
    """By path, control and zram/disksize and so on."""
    if isinstance(node, Directory):
        found: dict[str, File] = {}
        for child in node.children:
            found |= files(child, f"{above}/{child.name}".lstrip("/"))
        return found
    return {above: node} if isinstance(node, File) else {}


class Ours:
    def __init__(self, directory: Path) -> None:
        self.lane = FakeLane()
        self.lane.started = True
        self.device = Device(DeviceConfig(directory=directory, rundir=directory, name="z"), self.lane)
        self.files = files(tree_of(self.device, directory / "disk"))

    @property
    def store(self):
        return self.lane.store

    async def write(self, name: str, text: str | bytes) -> str:
        """OK, or the name of an errno."""
        data = text.encode() if isinstance(text, str) else text
        try:
            assert await self.files[name].write(data) == min(len(data), PAGE)
        except OSError as error:
            return errno.errorcode[error.errno]
        return OK

    async def done(self, *steps: tuple[str, str]) -> None:
        for step in steps:
            assert await self.write(*step) == OK, step

    def read(self, name: str) -> str:
        """The text, or the name of an errno."""
        file = self.files[name]
        try:
            return (file.read() if file.read else file.read_from(0, 1 << 16)[0]).decode()
        except OSError as error:
            return errno.errorcode[error.errno]


@asynccontextmanager
async def device(directory: Path) -> AsyncIterator[Ours]:
    ours = Ours(directory)
    try:
        yield ours
    finally:
        ours.lane.open_count = 0
        await ours.device.close()


def flags(ours: Ours) -> dict[int, str]:
    """What zram/block_state says of each page that it lists, without the dots."""
    found = {}
    for line in ours.read("zram/block_state").splitlines():
        match = BLOCK_STATE.fullmatch(line)
        assert match and len(match[1]) == 12 and len(match[2]) == 12, line
        found[int(match[1])] = match[4].replace(".", "")
    return found
