# SPDX-License-Identifier: Apache-2.0
"""System calls that Python 3.11 does not have: mount, umount2, swapoff, setns, unshare, statx, and the
release of a loop device.

A daemon whose cgroup has no process left (pids.max), or a machine without memory, cannot start umount,
losetup or swapoff. What these do must work all the same, because data depends on it. Paths are as the kernel
takes them, so /proc/self/fd/N names what a descriptor is open on. Errors are OSError with the call's errno.
"""
from __future__ import annotations

import errno
import fcntl
import functools
import os
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ctypes

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_SYNCHRONOUS, MS_DIRSYNC, MS_NOATIME = 1, 2, 4, 8, 16, 128, 1024
MS_REC, MS_PRIVATE = 1 << 14, 1 << 18
CLONE_NEWNS, CLONE_NEWPID = 0x20000, 0x20000000
# <linux/stat.h>, and the place of stx_dev_major and stx_dev_minor in struct statx, of 256 bytes
_AT_FDCWD, _AT_NO_AUTOMOUNT, _AT_STATX_DONT_SYNC = -100, 0x800, 0x4000
_STATX_SIZE, _STATX_DEV = 256, 136
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_LOOP_CLR_FD, _LOOP_SET_CAPACITY = 0x4C01, 0x4C07
# What fork(2) and clone(2) say where no process or thread can be started.
NO_PROCESS = (errno.EAGAIN, errno.ENOMEM)


@functools.cache
def _library() -> tuple[ModuleType, ctypes.CDLL]:
    """ctypes, and libc. Here, because it takes 2 ms to load, and most commands make none of these calls. A
    daemon has it: trio loads it."""
    import ctypes

    return ctypes, ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: str, fstype: str, flags: int, data: str) -> None:
    """mount(2). data: the file system's own options, separated by commas."""
    words = [os.fsencode(word) for word in (source, target, fstype)]
    ctypes, libc = _library()
    _expect_zero(libc.mount(*words, ctypes.c_ulong(flags), os.fsencode(data)), target)


def enter_namespace(fd: int, kind: int) -> None:
    """setns(2), for a process with one thread. kind: CLONE_NEWNS; CLONE_NEWPID, for its later children."""
    _expect_zero(_library()[1].setns(fd, kind), None)


def leave_namespace(kind: int) -> None:
    """unshare(2), for a process with one thread: it gets a namespace of its own. kind: CLONE_NEWNS."""
    _expect_zero(_library()[1].unshare(kind), None)


def device_of(path: str) -> str:
    """"major:minor" of the file system that `path` is on, from what the kernel has cached: a FUSE server that
    does not answer is not asked."""
    ctypes, libc = _library()
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    flags = _AT_NO_AUTOMOUNT | _AT_STATX_DONT_SYNC
    _expect_zero(libc.statx(_AT_FDCWD, os.fsencode(path), flags, 0, buffer), path)
    major, minor = struct.unpack_from("II", buffer, _STATX_DEV)
    return f"{major}:{minor}"


def unmount(point: str | os.PathLike[str], *, lazy: bool = False) -> None:
    """OSError: EPERM without CAP_SYS_ADMIN, EBUSY if it is in use (never when lazy), EINVAL if nothing is
    mounted there. lazy: users keep what they have open."""
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)
    _call(_library()[1].umount2, point, flags)


def end_swap(device: str) -> None:
    """Brings every page back. OSError: EPERM, EINVAL (no swap area), ENOMEM.

    The kernel makes the process that is in this call the first one that it kills for want of memory, whatever
    its oom_score_adj is. So a process that serves the area may call it only where memory suffices by far.
    """
    _call(_library()[1].swapoff, device)


def release_loop(device: str) -> None:
    """At once, or with the last user of the loop device. OSError: ENXIO if it stands on nothing."""
    _loop_call(device, _LOOP_CLR_FD)


def set_loop_capacity(device: str) -> None:
    """Has a loop device, which may be in use, take the size of its file. OSError: ENXIO as above."""
    _loop_call(device, _LOOP_SET_CAPACITY)


def _loop_call(device: str, number: int) -> None:
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, number)
    finally:
        os.close(fd)


def _call(function: Callable[..., int], path: str | os.PathLike[str], *more: int) -> None:
    _expect_zero(function(os.fsencode(path), *more), str(Path(path)))


def _expect_zero(result: int, path: str | None) -> None:
    if result:
        number = _library()[0].get_errno()
        raise OSError(number, os.strerror(number), path)
