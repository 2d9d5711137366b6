# SPDX-License-Identifier: Apache-2.0
"""Which files the tree of a device has, and where each gets its text from."""
from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path

from zramfs.device import commands
from zramfs.device.device import Device
from zramfs.errors import ZramfsError
from zramfs.model.device_stats import DeviceStats
from zramfs.text.kernel_numbers import c_string, printable
from zramfs.text.sizes import PAGE
from zramfs.tree.tree import Directory, File, Link, Node

from . import attributes, memory_files, metrics, state

ATTRIBUTE_SIZE = 4096  # st_size of every file of sysfs, and what one write to it takes at most
Write = Callable[[bytes], Awaitable[int]]


def tree_of(device: Device, disk: Path) -> Directory:
    """The root of the tree; disk: where the lane is mounted."""
    return Directory(name="", mode=0o755, children=[
        *_root_files(device, disk),
        Directory(name="zram", mode=0o755, children=_attribute_files(device)),
        # 0700 like /sys/kernel/debug, where the kernel has it.
        Directory(name="zsmalloc", mode=0o700, children=[
            File(name="classes", mode=0o444,
                 read=lambda: memory_files.format_classes(device.classes()).encode()),
        ]),
        Directory(name="memory", mode=0o755, children=_memory_files(device)),
    ])


def _root_files(device: Device, disk: Path) -> Iterable[Node]:
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
    yield Link(name="disk", mode=0o777, size=len(target), target=target)
    yield File(name="control", mode=0o600, write=write_control,
               read=lambda: state.control_text(device.stats()).encode(errors="replace"))
    yield File(name="peek", mode=0o600, choose=_peek_chooser(device), read_at=device.peek)
    yield File(name="metrics", mode=0o444, read=lambda: metrics.openmetrics_text(device))
    yield File(name="metrics.prom", mode=0o444, read=lambda: metrics.prometheus_text(device))


def _encoded(show: Callable[[], str]) -> bytes:
    return show().encode()


def _shown(device: Device, show: Callable[[DeviceStats], str]) -> bytes:
    return show(device.stats()).encode("utf-8", "surrogateescape")


def _attribute_files(device: Device) -> list[Node]:
    def attribute(a: attributes.Attribute) -> File:
        return File(
            name=a.name, mode=a.mode, size=ATTRIBUTE_SIZE,
            read=partial(_shown, device, a.show) if a.show else None,
            write=_writer(device, f"zram/{a.name}", a.parse) if a.parse else None,
        )

    return [
        *(attribute(a) for a in attributes.ATTRIBUTES),
        File(name="block_state", mode=0o400, read_from=device.block_state),
    ]


def _memory_files(device: Device) -> list[Node]:
    shown: tuple[tuple[str, Callable[[], str], Callable[[bytes], str] | None], ...] = (
        ("buddyinfo", lambda: memory_files.format_buddyinfo(device.buddyinfo()), None),
        ("pageblocks", lambda: memory_files.format_pageblocks(device.pageblocks()), None),
        ("compaction", lambda: memory_files.format_compaction(device.memory()), None),
        ("policies", lambda: memory_files.format_policies(device.stats().policies), None),
        ("units", lambda: memory_files.format_units(device.stats()), None),
        ("contents", lambda: memory_files.format_contents(device.stats()), None),
        ("estimate", lambda: memory_files.format_estimate(device.stats().estimate), None),
        ("governor", lambda: memory_files.format_governor(device.stats().governor), None),
        ("balloon", lambda: memory_files.format_balloon(device.memory()), memory_files.parse_balloon),
        ("proactiveness", lambda: memory_files.format_proactiveness(device.stats()),
         memory_files.parse_proactiveness),
    )
    return [
        File(name=name, mode=0o644 if parse else 0o444, read=partial(_encoded, show),
             write=_writer(device, f"memory/{name}", parse) if parse else None)
        for name, show, parse in shown
    ]


def _writer(device: Device, path: str, parse: Callable[[bytes], str]) -> Write:
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


def _peek_chooser(device: Device) -> Callable[[bytes], tuple[int, int]]:
    """PAGE or FIRST-LAST, numbers of pages: the bytes that reads of the same open file deliver.

    Without that the file is empty. It is as large as the device, and an indexer, a backup or `grep -r` that
    comes by would read all of it: 100 s for an empty device of 8 GiB.
    """
    def choose(data: bytes) -> tuple[int, int]:
        text = c_string(data).strip()
        first, dash, last = text.partition(b"-")
        last = last if dash else first
        are_numbers = all(number.isdigit() and len(number) < 16 for number in (first, last))
        if not are_numbers or int(first) > int(last):
            error = ZramfsError(
                errno.EINVAL, f"expected the number of a page, or FIRST-LAST, got {printable(text)}")
            device.refused("peek", error)
            raise error
        return int(first) * PAGE, (int(last) + 1) * PAGE

    return choose
