# SPDX-License-Identifier: Apache-2.0
"""What keeps a mount or a block device busy, in this mount namespace and in all others.

Nothing here asks a file system anything (no stat, no open below a mount), so nothing hangs on a FUSE server
that does not answer.
"""
from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from zramfs.host import process, system_calls
from zramfs.host.mounts import Mount, mount_id, mounts, namespaces
from zramfs.host.paths import AS_PATH
from zramfs.host.swaps import swaps

_OVERLAY_KEYS = ("upperdir", "workdir", "lowerdir")


@dataclass(frozen=True)
class _Target:
    """What somebody may use: the mounts on paths, and the block devices. devs: "major:minor" of the file
    systems there, wherever they are mounted."""

    paths: Collection[Path]
    devices: Collection[str]
    devs: set[str]

    def is_of(self, mount: Mount) -> bool:
        return mount.source in self.devices or mount.dev in self.devs


def users_of(
    paths: Collection[Path], *, devices: Collection[str] = (), but: Collection[int] = (),
    own_swaps: Collection[str] = (),
) -> list[str]:
    """One phrase for each thing that keeps the mounts at `paths`, or the block `devices`, in use.

    Mounts below; mounts of the same elsewhere, also in other mount namespaces, but for copies(); overlays on
    it; swap areas; and processes that have a file of it open or mapped, work in it, or have it as root, also
    after it was detached. Processes in `but`, swap areas in `own_swaps` and this process do not
    count. Of the processes of others an ordinary user sees nothing.
    """
    table = mounts()
    devs = {m.dev for m in table if m.mountpoint in paths} | _numbers(devices)
    target = _Target(paths, devices, devs)
    phrases = [
        f"{m.mountpoint} ({m.fstype}) is mounted below it"
        for m in table
        if any(path in m.mountpoint.parents for path in paths) and m.mountpoint not in paths
    ]
    phrases += [
        f"{m.source} is mounted on {m.mountpoint}"
        for m in table
        if target.is_of(m) and m.mountpoint not in paths
    ]
    phrases += _overlays(table, target)
    phrases += _elsewhere(table, target)
    phrases += [
        f"swap is on {area}"
        for area in swaps()
        if area not in own_swaps
        and (area in devices or any(Path(area).is_relative_to(path) for path in paths))
    ]
    phrases += _built_on(devices)
    skip = {os.getpid(), *but}
    for pid in process.pids():
        if pid not in skip and (way := _uses(pid, target, table)):
            phrases.append(f"{process.process_name(pid)} (pid {pid}) {way}")
    return phrases


def _built_on(devices: Collection[str]) -> list[str]:
    phrases = []
    for device in devices:
        with contextlib.suppress(FileNotFoundError):
            phrases += [
                f"/dev/{holder} is built on {device}"
                for holder in os.listdir(f"/sys/block/{Path(device).name}/holders")
            ]
    return phrases


def holders_below(directory: Path) -> list[str]:
    """One phrase for each process that runs a program, has a file open or has one mapped whose name is below
    `directory`. This process and its parents do not count."""
    skip = set(_ancestors(os.getpid()))
    phrases = []
    for pid in process.pids():
        if pid not in skip and (way := _runs_or_has(pid, directory)):
            phrases.append(f"{process.process_name(pid)} (pid {pid}) {way}")
    return phrases


def _numbers(devices: Collection[str]) -> set[str]:
    """"major:minor" of block devices."""
    found = set()
    for device in devices:
        with contextlib.suppress(OSError):
            found.add(Path(f"/sys/block/{Path(device).name}/dev").read_text(encoding="utf-8").strip())
    return found


def _overlays(table: Iterable[Mount], target: _Target, whose: str = "") -> list[str]:
    """An overlay has a mount of its own of each of its directories, which no table shows."""
    places = [m.mountpoint for m in table if target.is_of(m)]
    phrases = []
    for mount in table:
        if mount.fstype != "overlay":
            continue
        for word in mount.options.split(","):
            key, _, value = word.partition("=")
            if key in _OVERLAY_KEYS and any(_below(path, places) for path in value.split(":")):
                phrases.append(f"the overlay on {mount.mountpoint}{whose} has its {key} in {value}")
    return phrases


def _elsewhere(table: list[Mount], target: _Target) -> list[str]:
    """What is mounted in other mount namespaces, on purpose: not as a mere copy of this one's."""
    phrases = []
    for pid, theirs in namespaces():
        whose = f" in the mount namespace of {process.process_name(pid)} (pid {pid})"
        phrases += [f"{m.source} is mounted on {m.mountpoint}{whose}" for m in theirs
                    if target.is_of(m) and not _is_copy(m, theirs, table)]
        phrases += _overlays(theirs, target, whose)
    return phrases


def copies(paths: Collection[Path], devices: Collection[str] = ()) -> list[tuple[int, Path]]:
    """A process and a mount point for each copy of the mounts at `paths`, or of `devices`, that another mount
    namespace got when it was made (unshare, a sandbox). Nobody need know of it, but it keeps what is mounted
    alive. The last mount first. One that goes when ours is unmounted may be among them."""
    table = mounts()
    target = _Target(paths, devices, {m.dev for m in table if m.mountpoint in paths} | _numbers(devices))
    return [(pid, m.mountpoint) for pid, theirs in namespaces() for m in reversed(theirs)
            if target.is_of(m) and _is_copy(m, theirs, table)]


def _is_copy(mount: Mount, theirs: Iterable[Mount], ours: Iterable[Mount]) -> bool:
    """On the same place below the same root. A container has another root, and what is mounted there was
    asked for."""
    return {(mount.dev, mount.mountpoint), (_root(theirs), Path("/"))} <= {
        (each.dev, each.mountpoint) for each in ours}


def _root(table: Iterable[Mount]) -> str:
    return next((each.dev for each in table if each.mountpoint == Path("/")), "")


def _ancestors(pid: int) -> Iterator[int]:
    while pid > 0:
        yield pid
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
                pid = int(stat.read().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            return


def _uses(pid: int, target: _Target, table: Iterable[Mount]) -> str | None:
    proc = f"/proc/{pid}"
    try:
        if os.readlink(f"{proc}/ns/mnt") != os.readlink("/proc/self/ns/mnt"):
            table = mounts(pid)
        ids = {m.id for m in table if m.dev in target.devs}
        known = {m.id for m in table}
        places = [*target.paths, *(m.mountpoint for m in table if m.dev in target.devs)]
        for link, way in (("cwd", "works in"), ("root", "has as its root"), ("exe", "runs")):
            # A kernel thread has neither exe nor fds.
            with contextlib.suppress(FileNotFoundError):
                path = os.readlink(f"{proc}/{link}")
                if _below(path, places) or system_calls.device_of(f"{proc}/{link}") in target.devs:
                    return f"{way} {path}"
        for fd in os.listdir(f"{proc}/fd"):
            with contextlib.suppress(FileNotFoundError):
                path = os.readlink(f"{proc}/fd/{fd}")
                number = mount_id(f"{proc}/fdinfo/{fd}")
                if path in target.devices or number in ids:
                    return f"has {path} open"
                # A mount that was detached (umount --lazy) is in no table.
                if path.startswith("/") and number not in known and (
                        system_calls.device_of(f"{proc}/fd/{fd}") in target.devs):
                    return f"has {path} open, of a mount that was detached"
        for dev, path in _mapped(pid):
            if dev in target.devs or _below(path, places):
                return f"has {path} mapped"
    except OSError:  # it ended meanwhile, or belongs to somebody else
        pass
    return None


def _runs_or_has(pid: int, directory: Path) -> str | None:
    proc = f"/proc/{pid}"
    with contextlib.suppress(OSError):  # as above
        path = os.readlink(f"{proc}/exe")
        if _below(path, [directory]):
            return f"runs {path}"
        for fd in os.listdir(f"{proc}/fd"):
            with contextlib.suppress(FileNotFoundError):
                path = os.readlink(f"{proc}/fd/{fd}")
                if _below(path, [directory]) and path != str(directory):
                    return f"has {path} open"
        for _, path in _mapped(pid):
            if _below(path, [directory]):
                return f"has {path} mapped"
    return None


def _mapped(pid: int) -> Iterator[tuple[str, str]]:
    """"major:minor" and path of each file that a process has mapped; once, though a library has five lines in
    maps. Raises OSError."""
    with open(f"/proc/{pid}/maps", **AS_PATH) as maps:
        found = dict.fromkeys(
            (fields[3], fields[5]) for line in maps if "/" in line
            if len(fields := line.rstrip("\n").split(maxsplit=5)) == 6)
    return ((_dev(dev), path) for dev, path in found if path.startswith("/"))


def _below(target: str, places: Iterable[Path]) -> bool:
    """target: as the kernel writes it, or an overlay's option has it. Compared as text, since a process may
    have thousands of files, and a Path of each took most of the time of `zramfs stop`."""
    path = target.removesuffix(" (deleted)")
    if "//" in path or "/./" in path or path.endswith("/"):
        path = str(Path(path))
    return any(path == place or path.startswith(place.rstrip("/") + "/") for place in map(str, places))


def _dev(hexadecimal: str) -> str:
    """maps writes the device in hexadecimal (00:2f), mountinfo in decimal (0:47)."""
    major, minor = hexadecimal.split(":")
    return f"{int(major, 16)}:{int(minor, 16)}"
