# SPDX-License-Identifier: Apache-2.0
"""Which device a command's argument DIR means."""
from __future__ import annotations

import errno
from pathlib import Path

from zramfs.errors import ZramfsError
from zramfs.host import mounts, paths
from zramfs.lifecycle import rundir
from zramfs.lifecycle.rundir import Rundir


def device(text: str) -> Rundir:
    """The device that DIR means. Raises ZramfsError."""
    found = rundir.find(text)
    if found is None:
        raise no_device(text)
    return found


def tree(text: str) -> Path:
    """The directory with `control` and the rest: of a device of this user, or of another user's device that
    is mounted on this very directory. Raises ZramfsError."""
    place = paths.resolve(text)
    mount = mounts.mount_at(place)
    if mount is not None and mount.fstype == mounts.FSTYPE:
        return place
    state = device(text).read()
    if state is None:
        raise ZramfsError(errno.ENODEV, f"the device {text} never came up; `zramfs stop {text}` cleans it up")
    return Path(state.directory)


def no_device(text: str) -> ZramfsError:
    known = [
        state.where if state else each.name
        for each in rundir.rundirs()
        for state in [each.read()]
    ]
    place = paths.resolve(text)
    there = f"yours are on {', '.join(known)}" if known else "there is none at all"
    return ZramfsError(
        errno.ENODEV,
        f"no zramfs device of yours is on {place}, and none is called {text}; "
        f"{rundir.foreign_mount(place) or there}",
    )
