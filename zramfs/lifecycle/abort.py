# SPDX-License-Identifier: Apache-2.0
"""The way out when a device does not answer: its FUSE connections are ended, and its data is lost."""
from __future__ import annotations

import contextlib
import errno
from pathlib import Path

from zramfs.errors import ZramfsError
from zramfs.host import fuse_connections, loops, mounts, swaps
from zramfs.host.mounts import Mount
from zramfs.text.sizes import format_size

from .device_state import DISK_SOURCE, State
from .rundir import Rundir

LANE_FSTYPE = "fuse.zramfs-disk"


def abort_device(found: Rundir, *, force: bool = False) -> list[Mount]:
    """Ends the lane and the tree of a device of this user, and returns the mounts that were ended: whoever
    waits for them gets an error at once, and the daemon ends as soon as it runs. Asks the device nothing.

    Raises ZramfsError: EBUSY for swap in use, unless `force`; ENODEV if nothing is mounted; EPERM.
    """
    state = found.read()
    if state is None or not state.alive():
        where = state.where if state else found.name
        raise ZramfsError(
            errno.ENODEV, f"the daemon of {where} is dead, so nobody waits for it any more; "
            f"`zramfs stop {where}` cleans up")
    if not force:
        _expect_no_swap(found, state)
    table = _table_of(state)
    ours = [each for each in table
            if (each.fstype == LANE_FSTYPE and each.mountpoint == found.disk)
            or (each.fstype == mounts.FSTYPE and each.mountpoint == Path(state.directory))]
    return _abort(ours, state.where)


def abort_foreign(place: Path) -> list[Mount]:
    """As abort_device(), of the device of another user whose tree is mounted on `place`."""
    table = mounts.mounts()
    [tree] = [each for each in table if each.fstype == mounts.FSTYPE and each.mountpoint == place][-1:]
    lanes = [each for each in table if each.fstype == LANE_FSTYPE
             and each.source == f"{DISK_SOURCE}{tree.source}" and _user(each) == _user(tree)]
    if len(lanes) > 1:
        where = ", ".join(str(each.mountpoint.parent) for each in lanes)
        raise ZramfsError(
            errno.EINVAL, f"several devices of this user are called {tree.source}, in {where}; write the "
            "parent of one into ZRAMFS_RUN_DIR, and abort it by its name")
    return _abort([*lanes, tree], str(place))


def _abort(ours: list[Mount], where: str) -> list[Mount]:
    if not ours:
        raise ZramfsError(errno.ENODEV, f"neither the disk nor the tree of {where} is mounted any more")
    # The lane first, whose end is the end of the daemon.
    for mount in sorted(ours, key=lambda each: each.fstype != LANE_FSTYPE):
        try:
            fuse_connections.abort_connection(mount)
        except ZramfsError as error:
            # The end of the lane may be that of the tree, before it is its turn.
            if error.errno != errno.ENOENT or mount.fstype == LANE_FSTYPE:
                raise
    return ours


def _table_of(state: State) -> list[Mount]:
    """The daemon's mounts, which may be in a namespace of its own."""
    with contextlib.suppress(OSError):
        return mounts.mounts(state.pid)
    return mounts.mounts()


def _user(mount: Mount) -> str:
    return next((word for word in mount.options.split(",") if word.startswith("user_id=")), "")


def _expect_no_swap(found: Rundir, state: State) -> None:
    standing = {*loops.find(found.disk), *([state.loop] if state.loop else [])}
    for area in swaps.swap_areas():
        if area.path in standing and area.used:
            raise ZramfsError(
                errno.EBUSY, f"{format_size(area.used)} are in swap on {state.where}, and the programs whose "
                f"pages these are would be killed; `zramfs stop {state.where}` brings them back, --force "
                "aborts all the same")
