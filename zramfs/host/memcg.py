# SPDX-License-Identifier: Apache-2.0
"""Memory cgroups of version 1 and 2: where a process is, what limits it, and how it gets out."""
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
    """root: the directory of the topmost group that can be seen; version 1 or 2; place: the path of this
    process below it, "/...".

    The topmost group that can be seen is the machine's, or that of a container, which has a limit of its own.
    """

    root: Path
    version: int
    place: str

    @property
    def here(self) -> Path:
        return self.root / self.place.strip("/")

    def groups(self) -> list[Path]:
        """The group of this process and all above it that can be seen, the nearest first."""
        group = self.here
        found = [group]
        while group != self.root:
            group = group.parent
            found.append(group)
        return found

    def bounding(self) -> list[Path]:
        """Those of groups() that have a limit or can be given one. The machine's own can't."""
        name = "memory.limit_in_bytes" if self.version == 1 else "memory.max"
        return [group for group in self.groups() if (group / name).exists()]

    def limit(self, group: Path) -> int | None:
        """Bytes, None = none. Version 1 tells the smallest limit above too, also of groups out of sight."""
        if self.version == 1:
            values = [_number(group / "memory.limit_in_bytes"),
                      _table(group / "memory.stat").get("hierarchical_memory_limit")]
        else:
            values = [_number(group / "memory.max"), _number(group / "memory.high")]
        return min((each for each in values if each is not None and each < _NO_LIMIT), default=None)

    def limited(self) -> Path | None:
        """The group that has the smallest limit of those around this process; of equal ones the outermost,
        because a limit of version 1 shows in the groups below too."""
        limits = [(limit, group) for group in reversed(self.groups())
                  if (limit := self.limit(group)) is not None]
        return min(limits, key=lambda each: each[0])[1] if limits else None

    def leave(self) -> None:
        """Moves this process to the topmost group. Raises OSError."""
        (self.root / "cgroup.procs").write_text("0")

    def may_leave(self) -> bool:
        """Whether the topmost group has no limit, and can be entered as far as the rights to its file say."""
        return self.limit(self.root) is None and os.access(self.root / "cgroup.procs", os.W_OK)


@dataclass(frozen=True)
class ShortGroup:
    """A group that could not take back what it has in swap: bytes in swap, and bytes below the limit."""

    path: Path
    swap: int
    room: int


def hierarchy(proc: Path = Path("/proc/self")) -> Hierarchy | None:
    """The hierarchy of the memory controller. None when there is none, or this process can't see it.

    proc: the directory of this process, with `cgroup` and `mountinfo`.
    """
    places = {}
    with contextlib.suppress(OSError):
        for line in (proc / "cgroup").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            _, controllers, place = line.split(":", 2)
            for name in controllers.split(","):
                places[name] = place
    with contextlib.suppress(OSError):
        table = mounts.mounts(proc)
        if "memory" in places:
            found = [mount for mount in table
                     if mount.fstype == "cgroup" and (mount.mountpoint / "memory.limit_in_bytes").exists()]
            return _widest(found, 1, places["memory"])
        if "" in places:
            return _widest([mount for mount in table if mount.fstype == "cgroup2"], 2, places[""])
    return None


def _widest(found: list[mounts.Mount], version: int, place: str) -> Hierarchy | None:
    """Of the mounts of a hierarchy, the one that shows most of the groups around `place`.

    A container may see only its own part of the hierarchy. Then the mount's root is a directory of the
    hierarchy, while /proc names the place from the top; or, in a cgroup namespace, `place` is below the root
    of the namespace, and begins with /.. outside of it.
    """
    for mount in sorted(found, key=lambda each: len(each.root)):
        inside = os.path.relpath(place, mount.root)
        if inside.split("/")[0] != ".." and (mount.mountpoint / inside).is_dir():
            return Hierarchy(mount.mountpoint, version, "/" if inside == "." else f"/{inside}")
    # This process is out of sight: what the topmost group allows holds for it, if anything does.
    return Hierarchy(found[0].mountpoint, version, "/") if found else None


def short_groups(elsewhere: int) -> Iterator[ShortGroup]:
    """Groups that could not take back what they have in swap: it is more than their room and `elsewhere`
    together. elsewhere: bytes free in the swap areas that stay. File pages count as room."""
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
        return int(file.read_text(encoding="utf-8"))
    return None


def _table(file: Path) -> dict[str, int]:
    with contextlib.suppress(OSError, ValueError):
        rows = (line.split() for line in file.read_text(encoding="utf-8").splitlines())
        return {row[0]: int(row[1]) for row in rows if len(row) == 2}
    return {}
