# SPDX-License-Identifier: Apache-2.0
"""The mounts of a process, read from /proc. Nothing here asks a file system anything, so nothing hangs on
a FUSE server that does not answer."""
from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FSTYPE = "fuse.zramfs"  # of the tree of a device
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo. dev is "major:minor"; id is what fdinfo calls mnt_id; root: the directory of the
    file system that is mounted there."""

    id: int
    dev: str
    mountpoint: Path
    fstype: str
    source: str
    root: str = "/"


def unescape(field: str) -> str:
    """A field of mountinfo, mounts or swaps, where space, tab, newline and backslash are octal."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), field)


def mounts(process: int | Path = Path("/proc/self")) -> list[Mount]:
    """The mounts that a process sees, in the order of mounting: of several on one directory the last is on
    top. process: its pid, or its directory in /proc."""
    found = []
    # surrogateescape: a path is bytes, and need not be UTF-8.
    place = process if isinstance(process, Path) else Path(f"/proc/{process}")
    with open(place / "mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields = line.rstrip("\n").split(" ")
            fstype, source = fields[fields.index("-") + 1 :][:2]
            found.append(Mount(int(fields[0]), fields[2], Path(unescape(fields[4])), fstype,
                               unescape(source), unescape(fields[3])))
    return found


def mount_at(path: Path) -> Mount | None:
    """The topmost mount whose mount point is exactly `path`."""
    return next((m for m in reversed(mounts()) if m.mountpoint == path), None)


def mount_id(fdinfo: str) -> int | None:
    """Of the mount that an open file is on; fdinfo: its file in /proc."""
    with open(fdinfo, encoding="ascii") as lines:
        for line in lines:
            if line.startswith("mnt_id:"):
                return int(line.split()[1])
    return None


