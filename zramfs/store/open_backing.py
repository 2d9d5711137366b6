# SPDX-License-Identifier: Apache-2.0
"""Opens what a device writes pages back to: nothing else in its place, and nothing of another device."""
from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable

from zramfs.errors import ZramfsError


def open_backing(path: str, opener: Callable[[str, int], int]) -> int:
    """A descriptor of a block device that nobody else has opened exclusively, or of a file that no
    other zramfs has. opener: see Backing. Raises OSError."""
    place = opener(path, os.O_PATH | os.O_CLOEXEC)
    try:
        return _open_place(path, place)
    finally:
        os.close(place)


def _open_place(path: str, place: int) -> int:
    kind = os.fstat(place).st_mode          # before opening: opening a fifo or a tape may wait or rewind
    if stat.S_ISDIR(kind):
        raise ZramfsError(errno.EISDIR, f"expected a block device or a file, got the directory {path}")
    if not stat.S_ISBLK(kind) and not stat.S_ISREG(kind):
        raise ZramfsError(errno.ENOTBLK, f"expected a block device or a regular file, got {path}")
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_EXCL if stat.S_ISBLK(kind) else 0)
    try:
        # Past the page cache: what was written back shall leave memory, and its errors shall be told.
        fd = _reopen(path, place, flags | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = _reopen(path, place, flags | os.O_DSYNC)
    try:
        if stat.S_ISREG(kind):
            _lock(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _reopen(path: str, place: int, flags: int) -> int:
    """By the descriptor: by its name it may be another file by now."""
    try:
        return os.open(f"/proc/self/fd/{place}", flags)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None


def _lock(fd: int, path: str) -> None:
    try:
        # Of the open file, not of the process, and so also against ourselves.
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ZramfsError(
                errno.EBUSY, f"{path} is locked by somebody else, probably as another device's backing store"
            ) from None
        raise
