# SPDX-License-Identifier: Apache-2.0
"""The file system of a RAM disk that umount(8) has taken away, mounted again."""
from __future__ import annotations

import errno
from pathlib import Path

from zramfs.errors import ZramfsError
from zramfs.host import loops
from zramfs.lifecycle.stop import Say

from . import ramdisk, rundir
from .rundir import Rundir


def mount_again(found: Rundir | None, place: Path, say: Say) -> bool:
    """True if a RAM disk serves that belongs on `place`: it is mounted there, with its data.

    False if there is none, or its daemon is dead: a new one is to be made. Raises ZramfsError: EBUSY while it
    is being started, or for a device of another kind.
    """
    state = found.read() if found else None
    if found is None or state is None or not state.alive():
        return False
    with rundir.locked(found.path.parent):
        state = found.read()
        if state is None or not state.alive():
            return False
        if state.kind != "ramdisk" or state.phase != "ready" or state.loop is None:
            raise ZramfsError(
                errno.EBUSY, f"a zramfs device is there on {place} (daemon pid {state.pid}, {state.phase}), "
                f"and it is no RAM disk that could be mounted again; `zramfs stop {place}` first")
        if ramdisk.places(state.loop):
            say(f"note: {state.name} is mounted on {place} already")
            return True
        if not loops.stands_on(state.loop, found.disk, state.attached):
            raise ZramfsError(
                errno.ENODEV, f"the loop device {state.loop} of {place} was detached, so its file system "
                f"cannot be mounted again; `zramfs stop {place}` ends the device, and its data is lost")
        ramdisk.mount(ramdisk.as_it_was(state, place), state.loop)
    ramdisk.govern(Path(state.directory))
    say(f"note: {state.name} was there, and is mounted on {place} again with its data")
    return True


def put_back(old: Rundir) -> bool:
    """For the daemon that was to end, and goes on because it could not be saved: mounts what may_end() has
    unmounted. True if something was."""
    state = old.read()
    if state is None or state.kind != "ramdisk" or state.mountpoint is None or state.loop is None:
        return False
    if ramdisk.places(state.loop) or not loops.stands_on(state.loop, old.disk, state.attached):
        return False
    ramdisk.mount(ramdisk.as_it_was(state, Path(state.mountpoint)), state.loop)
    return True
