# SPDX-License-Identifier: Apache-2.0
"""FUSE connections as the kernel lists them: ended by a write to their file `abort`.

An abort answers every request that waits with an error, whatever the server does, and is the one way out when
it does nothing. The files are those of fusectl. Where that is not mounted root mounts it in a mount namespace
of a child process, which nobody else sees and which ends with the child.
"""
from __future__ import annotations

import errno
import os
from functools import partial
from pathlib import Path

from zramfs.errors import ZramfsError

from . import bounded, system_calls
from .mounts import Mount, mount_at

PLACE = Path("/sys/fs/fuse/connections")
TIMEOUT = 10.0  # seconds; it took 1 ms with 64 requests waiting


def abort_connection(mount: Mount) -> None:
    """Ends the connection behind a mount of FUSE. For a process of one thread. Raises ZramfsError: EPERM for
    the connection of another user, and where fusectl is not mounted and cannot be; ENOENT if it is gone."""
    number = mount.dev.partition(":")[2]  # the kernel names a connection by the minor number of its mount
    there = mount_at(PLACE)
    try:
        if there is not None and there.fstype == "fusectl":
            bounded.call(partial(_write, number), TIMEOUT)
        elif os.geteuid() == 0:
            bounded.call(partial(_write_apart, number), TIMEOUT)
        else:
            raise ZramfsError(
                errno.EPERM, f"fusectl is not mounted on {PLACE}, and only root can do that: sudo zramfs "
                f"abort, or as root: mount -t fusectl fusectl {PLACE}")
    except TimeoutError:
        raise ZramfsError(
            errno.ETIMEDOUT, f"the abort of connection {number} has not returned for {TIMEOUT:g} s") from None
    except OSError as error:
        if isinstance(error, ZramfsError):
            raise
        raise ZramfsError(
            error.errno or errno.EIO,
            f"connection {number} ({mount.source} on {mount.mountpoint}) cannot be aborted: "
            f"{error.strerror}") from None


def _write(number: str) -> None:
    fd = os.open(PLACE / number / "abort", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, b"1")
    finally:
        os.close(fd)


def _write_apart(number: str) -> None:
    """In a child process."""
    system_calls.leave_namespace(system_calls.CLONE_NEWNS)
    # Or the mount would spread to the namespace that was left.
    system_calls.mount("none", "/", "", system_calls.MS_REC | system_calls.MS_PRIVATE, "")
    system_calls.mount("fusectl", str(PLACE), "fusectl", 0, "")
    _write(number)
