# SPDX-License-Identifier: Apache-2.0
"""Freezes a mounted file system for a moment, in a process of its own.

    python -m zramfs.host.freezer MOUNTPOINT DEVICE [thaw]

Says `frozen` when it is, or `busy` if somebody else has frozen it, and thaws what it has frozen when stdin
ends or a line comes, and in any case after LONGEST seconds. Then its status is LATE: what its parent has done
meanwhile may have come after the thaw. Its parent is the daemon that serves the file
system's device: freezing waits for that, so the daemon cannot do it. If it dies, stdin ends. thaw: ends a
freeze whoever made it, for a daemon whose freezer was killed. """
from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import sys

from . import mounts

FIFREEZE, FITHAW = 0xC0045877, 0xC0045878  # <linux/fs.h>
LONGEST = 3.0  # seconds; a save needs it for less than a millisecond
LATE = 3  # exit status


def open_mounted(mountpoint: str, device: str) -> int:
    """The root directory of the file system of `device` that is mounted there. Raises OSError: ENOENT if
    something else is."""
    fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    number = mounts.mount_id(f"/proc/self/fdinfo/{fd}")
    if any(each.id == number and each.source == device for each in mounts.mounts()):
        return fd
    os.close(fd)
    raise OSError(errno.ENOENT, f"{device} is not mounted on {mountpoint} any more")


def _freeze(fd: int) -> bool:
    """False if somebody else has frozen it."""
    try:
        fcntl.ioctl(fd, FIFREEZE, 0)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    try:
        fd = open_mounted(sys.argv[1], sys.argv[2])
        if sys.argv[3:] == ["thaw"]:
            with contextlib.suppress(OSError):  # it is not frozen
                fcntl.ioctl(fd, FITHAW, 0)
            return
        frozen = _freeze(fd)
    except OSError as error:
        sys.exit(f"{sys.argv[1]}: {error.strerror or error}")
    told = []
    try:
        with contextlib.suppress(OSError):  # nobody listens any more
            os.write(1, b"frozen\n" if frozen else b"busy\n")
        told = select.select([0], [], [], LONGEST)[0]
    finally:
        if frozen:
            fcntl.ioctl(fd, FITHAW, 0)
    if frozen and not told:
        sys.exit(LATE)


if __name__ == "__main__":
    main()
