# SPDX-License-Identifier: Apache-2.0
"""The mounts of a process, read from /proc. Nothing here asks a file system anything, so nothing hangs on
a FUSE server that does not answer."""
from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .paths import AS_PATH

FSTYPE = "fuse.zramfs"  # of the tree of a device
_SAME = 6  # fields of a Mount that tell it from others


class Mount(NamedTuple):
    """One line of mountinfo. dev is "major:minor"; id is what fdinfo calls mnt_id; root: the directory of the
    file system that is mounted there.

    Two are the same mount whatever has become of the rest: parent, the id of the mount below; peers, as
    "shared:7" or "master:3"; options, those of the file system itself.
    """

    id: int
    dev: str
    mountpoint: Path
    fstype: str
    source: str
    root: str = "/"
    parent: int = 0
    peers: tuple[str, ...] = ()
    options: str = ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mount) and self[:_SAME] == other[:_SAME]

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self[:_SAME])


def unescape(text: str) -> str:
    """A field of mountinfo, mounts or swaps, where space, tab, newline and backslash are octal."""
    if "\\" not in text:
        return text
    # Without re, whose expression takes 0.5 ms to be compiled: a hundredth of what `zramfs status` may cost.
    first, *others = text.split("\\")
    return first + "".join(
        chr(int(each[:3], 8)) + each[3:] if _is_octal(each[:3]) else f"\\{each}" for each in others)


def _is_octal(text: str) -> bool:
    return len(text) == 3 and set(text) <= set("01234567")


def mounts(process: int | Path = Path("/proc/self")) -> list[Mount]:
    """The mounts that a process sees, in the order of mounting: of several on one directory the last is on
    top. process: its pid, or its directory in /proc."""
    found = []
    place = process if isinstance(process, Path) else Path(f"/proc/{process}")
    with open(place / "mountinfo", **AS_PATH) as lines:
        for line in lines:
            fields = line.rstrip("\n").split(" ")
            dash = fields.index("-")
            fstype, source, *options = fields[dash + 1:]
            found.append(Mount(
                int(fields[0]), fields[2], Path(unescape(fields[4])), fstype, unescape(source),
                unescape(fields[3]), int(fields[1]), tuple(fields[6:dash]), " ".join(options)))
    return found


def namespaces() -> Iterator[tuple[int, list[Mount]]]:
    """A process and the mounts it sees, for each mount namespace but this process's own; of those alone that
    this user may look into."""
    seen = {os.readlink("/proc/self/ns/mnt")}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            namespace = os.readlink(f"/proc/{name}/ns/mnt")
            if namespace not in seen:
                found = mounts(int(name))
                seen.add(namespace)
                yield int(name), found


def mount_at(path: Path) -> Mount | None:
    """The topmost mount whose mount point is exactly `path`."""
    return next((m for m in reversed(mounts()) if m.mountpoint == path), None)


def device_of(number: int) -> str | None:
    """The "major:minor" of the mount with this id. Of all the mounts nothing else is read."""
    with open("/proc/self/mountinfo", **AS_PATH) as lines:
        for line in lines:
            first, _, dev, _ = line.split(" ", 3)
            if int(first) == number:
                return dev
    return None


def mount_id(fdinfo: str) -> int | None:
    """Of the mount that an open file is on; fdinfo: its file in /proc."""
    # The second or third line; without the layers of a text file, which take longer than the system calls.
    with open(fdinfo, "rb", buffering=0) as file:
        _, found, rest = file.read(256).partition(b"mnt_id:")
    return int(rest.split(maxsplit=1)[0]) if found else None


