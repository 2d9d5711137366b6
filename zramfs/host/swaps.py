# SPDX-License-Identifier: Apache-2.0
"""The active swap areas of the machine."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from zramfs.host.mounts import Mount, unescape
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


def mounted_on(standing: Sequence[str], table: Sequence[Mount], areas: Sequence[SwapArea]) -> str | None:
    """Where a file system on a device is mounted, or [SWAP]; None for neither. standing: the loop devices on
    it; table: mounts(); areas: swap_areas()."""
    for mount in table:
        if mount.source in standing:
            return str(mount.mountpoint)
    return "[SWAP]" if any(area.path in standing for area in areas) else None
