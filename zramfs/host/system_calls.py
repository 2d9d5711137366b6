# SPDX-License-Identifier: Apache-2.0
"""System calls that Python 3.11 does not have: mount, umount2, setns, statx.

All take paths as the kernel does, so /proc/self/fd/N names what a descriptor is open on. Errors are OSError
with the call's errno.
"""
from __future__ import annotations

import ctypes
import os
import struct

_LIBC = ctypes.CDLL(None, use_errno=True)

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_SYNCHRONOUS, MS_DIRSYNC, MS_NOATIME = 1, 2, 4, 8, 16, 128, 1024
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
CLONE_NEWNS, CLONE_NEWPID = 0x20000, 0x20000000
# <linux/stat.h>, and the place of stx_dev_major and stx_dev_minor in struct statx, of 256 bytes
_AT_FDCWD, _AT_NO_AUTOMOUNT, _AT_STATX_DONT_SYNC = -100, 0x800, 0x4000
_STATX_SIZE, _STATX_DEV = 256, 136


def mount(source: str, target: str, fstype: str, flags: int, data: str) -> None:
    """mount(2). data: the file system's own options, separated by commas."""
    words = [os.fsencode(word) for word in (source, target, fstype)]
    _expect_zero(_LIBC.mount(*words, ctypes.c_ulong(flags), os.fsencode(data)), target)


def unmount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _expect_zero(_LIBC.umount2(os.fsencode(target), flags), target)


def enter_namespace(fd: int, kind: int) -> None:
    """setns(2), for a process with one thread. kind: CLONE_NEWNS; CLONE_NEWPID, for its later children."""
    _expect_zero(_LIBC.setns(fd, kind), None)


def device_of(path: str) -> str:
    """"major:minor" of the file system that `path` is on, from what the kernel has cached: a FUSE server that
    does not answer is not asked."""
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    _expect_zero(
        _LIBC.statx(_AT_FDCWD, os.fsencode(path), _AT_NO_AUTOMOUNT | _AT_STATX_DONT_SYNC, 0, buffer), path)
    major, minor = struct.unpack_from("II", buffer, _STATX_DEV)
    return f"{major}:{minor}"


def _expect_zero(result: int, path: str | None) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
