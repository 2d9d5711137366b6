# SPDX-License-Identifier: Apache-2.0
"""The active swap areas of the machine."""
from __future__ import annotations

from typing import NamedTuple

from zramfs.host.mounts import unescape
from zramfs.host.paths import AS_PATH


class SwapArea(NamedTuple):
    """One line of /proc/swaps; size and used in bytes."""

    path: str
    size: int
    used: int
    priority: int


def swap_areas() -> list[SwapArea]:
    """The active swap areas."""
    try:
        with open("/proc/swaps", **AS_PATH) as lines:
            rows = [line.split() for line in lines.readlines()[1:]]
    except FileNotFoundError:  # a kernel without swap
        return []
    return [
        SwapArea(unescape(path), int(size) * 1024, int(used) * 1024, int(priority))
        for path, _, size, used, priority in rows
    ]


def swaps() -> list[str]:
    """Paths of the active swap areas."""
    return [area.path for area in swap_areas()]
