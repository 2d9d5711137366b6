# SPDX-License-Identifier: Apache-2.0
"""umount2(2), swapoff(2) and the release of a loop device, without a program.

A daemon whose cgroup has no process left (pids.max), or a machine without memory, cannot start umount,
losetup or swapoff. What these do must work all the same, because data depends on it.
"""
from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from pathlib import Path

_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_LOOP_CLR_FD = 0x4C01
# What fork(2) and clone(2) say where no process or thread can be started.
NO_PROCESS = (errno.EAGAIN, errno.ENOMEM)

_libc = ctypes.CDLL(None, use_errno=True)


def unmount(point: str | os.PathLike[str], *, lazy: bool = False) -> None:
    """OSError: EPERM without CAP_SYS_ADMIN, EBUSY if it is in use (never when lazy), EINVAL if nothing is
    mounted there. lazy: users keep what they have open."""
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)
    _call(_libc.umount2, point, ctypes.c_int(flags))


def end_swap(device: str) -> None:
    """Brings every page back. OSError: EPERM, EINVAL (no swap area), ENOMEM.

    The kernel makes the process that is in this call the first one that it kills for want of memory, whatever
    its oom_score_adj is. So a process that serves the area may call it only where memory suffices by far.
    """
    _call(_libc.swapoff, device)


def release_loop(device: str) -> None:
    """At once, or with the last user of the loop device. OSError: ENXIO if it stands on nothing."""
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _LOOP_CLR_FD)
    finally:
        os.close(fd)


def _call(function: ctypes._CFuncPtr, path: str | os.PathLike[str], *more: ctypes.c_int) -> None:
    if function(os.fsencode(path), *more):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(Path(path)))
