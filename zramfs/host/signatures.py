# SPDX-License-Identifier: Apache-2.0
"""What a block device or a regular file holds already, for a program that is going to overwrite it.

A device is judged by blkid(8), as mkfs does. A file is taken if nothing was ever written to it (truncate,
fallocate), if it is all zeros as far as one looks, or if it bears our mark: an extended attribute, which a
backing store gets when it is opened, and which tells what a crash left in it from somebody's data.
"""
from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from pathlib import Path

from . import programs, safe_paths

_MARK = "user.zramfs.backing"
# How much of a file's data is read: zeros so far down are taken for the work of dd if=/dev/zero.
_LOOK = 1 << 20
_HOW = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY


def held_by(path: Path) -> str | None:
    """What `path` holds, as a phrase; None for nothing that one knows of. Raises OSError if it cannot be
    read, ZramfsError(ELOOP) for a link that root must not follow."""
    fd = safe_paths.open_path(path, _HOW)
    try:
        kind = os.fstat(fd).st_mode
        if stat.S_ISBLK(kind):
            return _signature(fd)
        if not stat.S_ISREG(kind) or _is_marked(fd) or _is_locked(fd) or not _has_data(fd):
            return None
        return _signature(fd) or "data that zramfs has not put there"
    finally:
        os.close(fd)


def mark(path: Path) -> None:
    """Marks a regular file as a backing store's, where its file system can."""
    with contextlib.suppress(OSError):
        fd = safe_paths.open_path(path, _HOW)
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                os.setxattr(fd, _MARK, b"1")
        finally:
            os.close(fd)


def _is_marked(fd: int) -> bool:
    with contextlib.suppress(OSError):
        return bool(os.getxattr(fd, _MARK))
    return False


def _is_locked(fd: int) -> bool:
    """As a backing store in use is."""
    asked = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked)
    return bool(struct.unpack("hhqqi4x", answer)[0] == fcntl.F_WRLCK)


def _has_data(fd: int) -> bool:
    try:
        start = os.lseek(fd, 0, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return False
        start = 0  # a file system that cannot tell
    return any(os.pread(fd, _LOOK, start))


def _signature(fd: int) -> str | None:
    """What blkid finds at its places."""
    done = programs.run(["blkid", "-p", "-o", "export", f"/proc/self/fd/{fd}"], pass_fds=[fd])
    # Where it finds several at once, it says nothing but 8.
    if done.returncode == 8:
        return "signatures of several file systems or partition tables"
    found = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    if kind := found.get("TYPE"):
        return f"a signature of {kind}"
    return f"a partition table ({found['PTTYPE']})" if "PTTYPE" in found else None
