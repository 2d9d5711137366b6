# SPDX-License-Identifier: Apache-2.0
"""Devices without a mount whose readings `zramfs top` shows, and what a terminal shows of them."""
from __future__ import annotations

import dataclasses
import io
import os
from pathlib import Path

import pyte
import pytest
from rich.console import Console

from tests.support.fakes import FakeLane
from zramfs.device.device import Device
from zramfs.model.config import DeviceConfig
from zramfs.model.stats import BUCKET_BOUNDS, OPERATIONS, Latency
from zramfs.tree import metrics
from zramfs.views import scrape
from zramfs.views.screen import View, screen
from zramfs.views.watched import Place, Reading, Watched

PAGE = 4096
SIZES = pytest.mark.parametrize("columns, lines", [(80, 24), (120, 40), (200, 50)])


def latency(**requests: int) -> tuple[Latency, ...]:
    """read=N: N reads of 3 us; write=N: N writes of 100 us, and so on."""
    found = []
    for operation in OPERATIONS:
        n = requests.get(operation, 0)
        bucket, ns = {"read": (2, 3000), "write": (7, 100_000)}.get(operation, (10, 1_000_000))
        counts = [0] * (len(BUCKET_BOUNDS) + 1)
        counts[bucket] = n
        found.append(Latency(tuple(counts), n * ns))
    return tuple(found)


def made(size: int = 64 << 20, name: str = "mnt-z0", **more: object) -> Device:
    return Device(DeviceConfig(directory=Path(f"/mnt/{name}"), rundir=Path("/run/z0"), size=size, name=name,
                               **more), FakeLane())


def reading(device: Device, when: float, **counters: object) -> Reading:
    lane = device._lane
    lane.counters = dataclasses.replace(lane.counters, **counters)
    return Reading(when, scrape.parse_metrics(metrics.openmetrics_text(device).decode(), "metrics"))


def drawn(
    devices: list[Watched], *, width: int = 80, height: int = 24, chosen: int = 0, keys: str = "",
    **how: object,
) -> str:
    """chosen: the number in `devices`. keys: that are pressed before."""
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, **how)
    view = View()
    if devices:
        view.chosen = devices[chosen]
    for key in keys:
        assert view.press(key.encode(), devices)
    with console.capture() as capture:
        console.print(screen(devices, view, 1.0, width, height), end="")
    return capture.get()


def on(*readings: Reading, name: str = "mnt-z0") -> Watched:
    device = Watched(Place(Path(f"/mnt/{name}"), name, f"/mnt/{name}"))
    for each in readings:
        device.note(each)
    device.state = "ready"
    return device


async def two_readings(seconds: float = 2.0) -> Watched:
    device = made(mem_limit=32 << 20)
    await device.start()
    store = device._lane.store
    for page in range(400):
        store.write(page * PAGE, os.urandom(PAGE // 4).ljust(PAGE, b"z"))
    first = reading(device, 100.0, latency=latency(read=10, write=10), read_sectors=80)
    for page in range(0, 400, 3):
        store.zero(page * PAGE, PAGE)
    last = reading(device, 100.0 + seconds, latency=latency(read=2010, write=30), longest_us=2400,
                   read_sectors=80 + 2000 * 8, in_flight=3)
    return on(first, last)


def picture(
    devices: list[Watched], columns: int, lines: int, chosen: int = 0, keys: str = ""
) -> list[str]:
    """What a terminal of this size shows, line by line."""
    terminal = pyte.Screen(columns, lines)
    text = drawn(devices, width=columns, height=lines, chosen=chosen, keys=keys, color_system="standard")
    # The end of the last line would scroll the first one away.
    pyte.Stream(terminal).feed(text.removesuffix("\n").replace("\n", "\r\n"))
    return [line.rstrip() for line in terminal.display]
