# SPDX-License-Identifier: Apache-2.0
"""What other commands must know about a device: the contents of state.json.

The file is the daemon's word. Two things in it can be out of date or gone, and the kernel knows them better:
where the mounts are, since a directory above them may be renamed, and who serves, since a pid means another
process in another pid namespace. correct() and rebuild() take them from there.
"""
from __future__ import annotations

import errno
import os
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from zramfs import __version__
from zramfs.host import bounded, loops, mounts, swaps
from zramfs.host.process import boot_id, process_name, process_start

_STATE_VERSION = 1
KEEPER = "zramfs-keeper"  # the name that zramfs/keeper/keeper.c gives its process
DISK_SOURCE = "zramfs-disk:"  # and the device's name: what the daemon mounts on `disk` under


class State(NamedTuple):
    """What state.json says. pid and pid_start (clock ticks after boot) name one process within boot_id.
    A RAM disk has loop, mountpoint, fs, options and size, a swap device loop and size, else they are None.
    Nobody writes to the lists, which states share.

    Not a dataclass: such a class takes 2 ms to be made, of 60 that `zramfs status` may cost, and this 0.3.
    """

    name: str
    directory: str
    disk: str
    kind: str  # "device", "ramdisk" or "swap"
    phase: str  # "starting" until the daemon serves, then "ready", and "failed" after an end by a fault
    pid: int
    pid_start: int
    boot_id: str
    created: str  # ISO 8601, local time with offset
    threads: int  # 0 where that was lost
    made: list[str] = []  # directories to remove at the end, if empty
    loop: str | None = None
    mountpoint: str | None = None
    fs: str | None = None
    options: str | None = None  # of mount(8), for the file system
    size: int | None = None  # bytes, of a RAM disk or a swap device: as made, or as `zramfs resize` left it
    attached: int | None = None  # loops.sequence() of loop
    tree_dev: str | None = None  # "major:minor" of the mounted tree
    keep: str | None = None  # image that a RAM disk is saved into at its end
    former: list[str] = []  # what its places were called before a rename
    notes: list[str] = []  # what was set up for swap, and what that lacks
    keeper_pid: int = 0  # of the process that starts another daemon when this one dies; 0 = none
    standby_pid: int = 0  # of the process that waits to take over; 0 = none
    release: str = ""  # of zramfs that the daemon runs; empty where that was lost, as the next one
    layouts: dict[str, int] = {}  # that it writes: daemon/layouts.py
    said_by: int = 0  # the daemon that has said these two, by its pid, which others may correct above
    version: int = _STATE_VERSION

    def alive(self) -> bool:
        """True as long as the very process that wrote its pid here runs."""
        return self.boot_id == boot_id() and self.pid_start == process_start(self.pid)

    @property
    def where(self) -> str:
        """What its user calls it: the directory that was given, or the name of a swap device."""
        return self.mountpoint or (self.name if self.kind == "swap" else self.directory)

    def other_release(self) -> str | None:
        """That of its daemon, if it is another one than is installed. None also where it is not known."""
        return self.release if self.release not in ("", __version__) else None

    def places(self) -> set[str]:
        return {place for place in (self.directory, self.mountpoint) if place}


def correct(state: State, holders: list[int]) -> State:
    """The state with the places where its mounts are now, and with the process that serves it in this pid
    namespace. holders: who has the run directory locked."""
    if state.boot_id != boot_id():
        return state
    table = mounts.mounts()
    # The kernel gives the number of a tree that is gone to another mount, maybe another device's tree. The
    # name tells them apart: a device that ends has lost its tree first, and would take the other one's down.
    tree = [each for each in table
            if (each.dev, each.fstype, each.source) == (state.tree_dev, mounts.FSTYPE, state.name)]
    if not holders:
        # Devices of other users, and of other run directories, may have the same name.
        tree = [each for each in tree if str(each.mountpoint) == state.directory or _is_dead(each)]
    state = _moved(state, "directory", tree)
    if state.loop and state.mountpoint and loops.stands_on(state.loop, Path(state.disk), state.attached):
        state = _moved(state, "mountpoint", [each for each in table if each.source == state.loop])
    if state.phase == "ready" and holders and state.pid not in holders:
        # Between a daemon's death and the next one there is only the keeper.
        serving = next((pid for pid in holders if pid != state.keeper_pid), holders[0])
        state = state._replace(pid=serving, pid_start=process_start(serving) or 0)
    return state


def _is_dead(tree: mounts.Mount) -> bool:
    """Whether nobody serves a tree: then the kernel answers by itself. A server that does not answer in time
    is one."""
    try:
        bounded.call(lambda: os.statvfs(tree.mountpoint) and None, bounded.ANSWER_TIMEOUT)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def _moved(state: State, which: str, found: list[mounts.Mount]) -> State:
    """With the one mount that is left of `found` as the place called `which`."""
    old = str(getattr(state, which))
    now = [str(each.mountpoint) for each in found]
    if len(now) != 1 or now[0] == old:
        return state
    made = [now[0] if each == old else each for each in state.made]
    changes: dict[str, Any] = {which: now[0], "made": made, "former": [*state.former, old]}
    return state._replace(**changes)


def rebuild(path: Path, holders: list[int]) -> State | None:
    """The state of a device whose state.json is gone, while its daemon serves: from what is mounted. path:
    its run directory."""
    disk, tree = path / "disk", path / "tree"
    lane = mounts.mount_at(disk)
    if not holders or lane is None or not lane.source.startswith(DISK_SOURCE):
        return None
    table = mounts.mounts()
    own = [each for each in table
           if each.fstype == mounts.FSTYPE and each.source == lane.source.removeprefix(DISK_SOURCE)]
    directory = next((each.mountpoint for each in own if each.mountpoint == tree),
                     own[0].mountpoint if own else tree)
    standing = loops.find(disk) if directory == tree else []
    top = next((each for each in table if each.source in standing), None)
    areas = [area for area in swaps.swaps() if area in standing]
    loop = top.source if top else areas[0] if areas else standing[0] if standing else None
    keeper = next((pid for pid in holders if process_name(pid) == KEEPER), 0)
    serving = next((pid for pid in holders if pid != keeper), holders[0])
    return State(
        name=path.name, directory=str(directory), disk=str(disk), phase="ready", threads=0,
        kind="device" if directory != tree else "swap" if areas or not loop else "ramdisk",
        pid=serving, pid_start=process_start(serving) or 0, keeper_pid=keeper, boot_id=boot_id(),
        created=datetime.fromtimestamp(os.lstat(path).st_mtime).astimezone().isoformat(timespec="seconds"),
        loop=loop, attached=loops.sequence(loop) if loop else None,
        mountpoint=str(top.mountpoint) if top else None, fs=top.fstype if top else None)


