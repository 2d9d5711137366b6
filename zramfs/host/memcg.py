# SPDX-License-Identifier: Apache-2.0
"""Memory cgroups, of version 1 and 2: where a process is, what limits it, and how it gets out."""
from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import mounts

# Version 1 shows "no limit" as the largest multiple of the page size.
_NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class Hierarchy:
    """root: where it is mounted; version 1 or 2; place: the path of this process in it, "/..."."""

    root: Path
    version: int
    place: str

    @property
    def here(self) -> Path:
        return self.root / self.place.strip("/")

    def limit(self, group: Path) -> int | None:
        """Bytes, None = none."""
        names = ("memory.limit_in_bytes",) if self.version == 1 else ("memory.max", "memory.high")
        found = [
            value for name in names
            if (value := _number(group / name)) is not None and value < _NO_LIMIT
        ]
        return min(found, default=None)

    def limited(self) -> Path | None:
        """The nearest group around this process that has a limit."""
        group = self.here
        while group != self.root:
            if self.limit(group) is not None:
                return group
            group = group.parent
        return None

    def leave(self) -> None:
        """Moves this process to the root group. Raises OSError."""
        (self.root / "cgroup.procs").write_text("0")


@dataclass(frozen=True)
class ShortGroup:
    """A group that could not take back what it has in swap: bytes in swap, and bytes below the limit."""

    path: Path
    swap: int
    room: int


def hierarchy() -> Hierarchy | None:
    """The hierarchy of the memory controller; None when there is none or it is not to be seen."""
    places = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(
                encoding="utf-8", errors="surrogateescape").splitlines():
            _, controllers, place = line.split(":", 2)
            for name in controllers.split(","):
                places[name] = place
    table = mounts.mounts()
    if "memory" in places:
        for mount in table:
            if mount.fstype == "cgroup" and (mount.mountpoint / "memory.limit_in_bytes").exists():
                return Hierarchy(mount.mountpoint, 1, places["memory"])
    if "" in places:
        for mount in table:
            if mount.fstype == "cgroup2":
                return Hierarchy(mount.mountpoint, 2, places[""])
    return None


def short_groups(elsewhere: int) -> Iterator[ShortGroup]:
    """Groups that have more in swap than they have room for, and than `elsewhere`, the bytes free in the
    swap areas that stay, could take. What they hold of files counts as room."""
    found = hierarchy()
    if found is None:
        return
    for directory, _, _ in os.walk(found.root):
        group = Path(directory)
        if group == found.root or (limit := found.limit(group)) is None:
            continue
        if found.version == 1:
            stat = _table(group / "memory.stat")
            swap = stat.get("total_swap", 0)
            used = _number(group / "memory.usage_in_bytes") or 0
            files = stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0)
        else:
            stat = _table(group / "memory.stat")
            swap = _number(group / "memory.swap.current") or 0
            used = _number(group / "memory.current") or 0
            files = stat.get("inactive_file", 0) + stat.get("active_file", 0)
        room = max(0, limit - used + files)
        if swap > room + elsewhere:
            yield ShortGroup(group, swap, room)


def _number(file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(file.read_text(encoding="ascii"))
    return None


def _table(file: Path) -> dict[str, int]:
    with contextlib.suppress(OSError, ValueError):
        rows = (line.split() for line in file.read_text(encoding="ascii").splitlines())
        return {row[0]: int(row[1]) for row in rows if len(row) == 2}
    return {}
