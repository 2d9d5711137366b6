# SPDX-License-Identifier: Apache-2.0
"""Which files the tree of a device has, and where each gets its text from."""
from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from zramfs.device import commands
from zramfs.device.device import Device
from zramfs.errors import ZramfsError
from zramfs.tree.tree import Directory, File, Link

from . import attributes, memory_files, metrics, state
from .attributes import Attribute

ATTRIBUTE_SIZE = 4096  # st_size of every file of sysfs, and what one write to it takes at most


def build(device: Device, disk: Path) -> Directory:
    """The root of the tree; disk: where the lane is mounted."""

    def writer(path: str, parse: Callable[[bytes], str]) -> Callable[[bytes], Awaitable[int]]:
        async def write(data: bytes) -> int:
            data = data[:ATTRIBUTE_SIZE]
            try:
                line = parse(data)
            except ZramfsError as error:
                device.refused(path, error)
                raise
            await device.command(line)
            return len(data)

        return write

    def attribute(a: Attribute) -> File:
        return File(
            name=a.name, mode=a.mode, size=ATTRIBUTE_SIZE,
            read=(lambda: a.show(device.stats()).encode("utf-8", "surrogateescape")) if a.show else None,
            write=writer(f"zram/{a.name}", a.parse) if a.parse else None,
        )

    async def write_control(data: bytes) -> int:
        try:
            lines = commands.lines(data)
        except ZramfsError as error:
            device.refused("control", error)
            raise
        for line in lines:
            await device.command(line)
        return len(data)

    target = os.fsencode(disk)
    return Directory(name="", mode=0o755, children=[
        Link(name="disk", mode=0o777, size=len(target), target=target),
        File(name="control", mode=0o600, write=write_control,
             read=lambda: state.control_text(device.stats()).encode(errors="replace")),
        File(name="peek", mode=0o400, read_at=device.peek),
        File(name="metrics", mode=0o444, read=lambda: metrics.text(device)),
        Directory(name="zram", mode=0o755, children=[
            *(attribute(a) for a in attributes.ATTRIBUTES),
            File(name="block_state", mode=0o400, read_from=device.block_state),
        ]),
        # 0700 like /sys/kernel/debug, where the kernel has it.
        Directory(name="zsmalloc", mode=0o700, children=[
            File(name="classes", mode=0o444,
                 read=lambda: memory_files.format_classes(device.classes()).encode()),
        ]),
        Directory(name="memory", mode=0o755, children=[
            File(name="buddyinfo", mode=0o444,
                 read=lambda: memory_files.format_buddyinfo(device.buddyinfo()).encode()),
            File(name="pageblocks", mode=0o444,
                 read=lambda: memory_files.format_pageblocks(device.pageblocks()).encode()),
            File(name="compaction", mode=0o444,
                 read=lambda: memory_files.format_compaction(device.memory()).encode()),
            File(name="policies", mode=0o444,
                 read=lambda: memory_files.format_policies(device.stats().policies).encode()),
            File(name="balloon", mode=0o644, write=writer("memory/balloon", memory_files.parse_balloon),
                 read=lambda: memory_files.format_balloon(device.memory()).encode()),
            File(name="proactiveness", mode=0o644,
                 write=writer("memory/proactiveness", memory_files.parse_proactiveness),
                 read=lambda: memory_files.format_proactiveness(device.stats()).encode()),
        ]),
    ])
