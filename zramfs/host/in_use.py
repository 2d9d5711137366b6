# SPDX-License-Identifier: Apache-2.0
"""Who keeps a mount busy. Nothing here asks a file system anything (no stat, no open below a mount),
so nothing hangs on a FUSE server that does not answer."""
from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from zramfs.host.mounts import Mount, mount_id, mounts
from zramfs.host.swaps import swaps


def users_of(
    paths: Collection[Path], *, devices: Collection[str] = (), but: Collection[int] = (),
    own_swaps: Collection[str] = (),
) -> list[str]:
    """One phrase for each thing that keeps the mounts at `paths`, or the block `devices`, in use.

    Mounts below, mounts of the same elsewhere, swap areas, and processes that have a file of the
    mount open or mapped, work in it, or have it as root; processes of other mount namespaces too.
    Processes in `but`, swap areas in `own_swaps` and this process do not count. Of the processes of
    others an ordinary user sees nothing.
    """
    table = mounts()
    ours = [m for m in table if m.mountpoint in paths]
    devs = {m.dev for m in ours}
    phrases = [
        f"{m.mountpoint} ({m.fstype}) is mounted below it"
        for m in table
        if any(path in m.mountpoint.parents for path in paths) and m.mountpoint not in paths
    ]
    phrases += [
        f"{m.source} is mounted on {m.mountpoint}"
        for m in table
        if (m.source in devices or m.dev in devs) and m.mountpoint not in paths
    ]
    phrases += [
        f"swap is on {area}"
        for area in swaps()
        if area not in own_swaps
        and (area in devices or any(Path(area).is_relative_to(path) for path in paths))
    ]
    for device in devices:
        with contextlib.suppress(FileNotFoundError):
            phrases += [
                f"/dev/{holder} is built on {device}"
                for holder in os.listdir(f"/sys/block/{Path(device).name}/holders")
            ]
    skip = {os.getpid(), *but}
    for pid in _pids():
        if pid not in skip and (way := _uses(pid, paths, devs, devices, table)):
            phrases.append(f"{process_name(pid)} (pid {pid}) {way}")
    return phrases


def process_name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
            return comm.read().rstrip("\n")
    except OSError:
        return "a process that just ended"


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _uses(
    pid: int, paths: Collection[Path], devs: set[str], devices: Collection[str], table: Iterable[Mount]
) -> str | None:
    proc = f"/proc/{pid}"
    try:
        if os.readlink(f"{proc}/ns/mnt") != os.readlink("/proc/self/ns/mnt"):
            table = mounts(pid)
        ids = {m.id for m in table if m.dev in devs}
        places = [*paths, *(m.mountpoint for m in table if m.dev in devs)]
        for link, way in (("cwd", "works in"), ("root", "has as its root"), ("exe", "runs")):
            # A kernel thread has neither exe nor fds.
            with contextlib.suppress(FileNotFoundError):
                target = os.readlink(f"{proc}/{link}")
                if _below(target, places):
                    return f"{way} {target}"
        for fd in os.listdir(f"{proc}/fd"):
            with contextlib.suppress(FileNotFoundError):
                target = os.readlink(f"{proc}/fd/{fd}")
                if target in devices or mount_id(f"{proc}/fdinfo/{fd}") in ids:
                    return f"has {target} open"
        with open(f"{proc}/maps", encoding="utf-8", errors="surrogateescape") as maps:
            for line in maps:
                fields = line.rstrip("\n").split(maxsplit=5)
                if len(fields) == 6 and fields[5].startswith("/") and (
                    _dev(fields[3]) in devs or _below(fields[5], places)
                ):
                    return f"has {fields[5]} mapped"
    except OSError:  # it ended meanwhile, or belongs to somebody else
        pass
    return None


def _below(target: str, places: Iterable[Path]) -> bool:
    path = Path(target.removesuffix(" (deleted)"))
    return any(path.is_relative_to(place) for place in places)


def _dev(hexadecimal: str) -> str:
    """maps writes the device in hexadecimal (00:2f), mountinfo in decimal (0:47)."""
    major, minor = hexadecimal.split(":")
    return f"{int(major, 16)}:{int(minor, 16)}"
