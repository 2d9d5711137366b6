# SPDX-License-Identifier: Apache-2.0
"""Mounting and unmounting FUSE connections through fusermount3, for root and for everybody.

Nothing here asks the mounted file system anything, so nothing hangs on a server that does not answer.
"""
from __future__ import annotations

import errno
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

from zramfs.errors import ZramfsError

from . import system_calls
from .mounts import mount_at, mounts

TIMEOUT = 30.0  # seconds for fusermount3, which may wait for a parent directory that does not answer


class MountError(ZramfsError):
    """fusermount3 refused; the sentence holds its own words."""


def mount_file(path: str | os.PathLike[str], *, options: Mapping[str, str | bool]) -> int:
    """Mounts a FUSE connection on an existing file or directory; returns its /dev/fuse descriptor.

    options: mount options by name; True stands alone, False is left out, text follows "=". Besides
    fsname and subtype fusermount3 takes default_permissions, max_read, allow_other (an ordinary
    user needs user_allow_other in /etc/fuse.conf), ro, noexec, noatime, sync and dirsync, and sets
    nosuid and nodev by itself. Nobody answers yet: until a server reads the descriptor, whoever
    touches the path waits.

    Raises MountError: EINVAL for auto_unmount (its helper would unmount under a server that is being
    replaced) or an unknown option, ENOENT for a missing path or fusermount3, EPERM and so on; EXDEV if
    somebody put a link in the path's place meanwhile, and then what was mounted behind it is taken away.
    """
    if options.get("auto_unmount"):
        raise MountError(errno.EINVAL, "expected mount options without auto_unmount, which would end the "
                                       "mount when one of its processes ends; use unmount")
    point = _absolute(path)
    words = [name if value is True else f"{name}={_escape(value)}" for name, value in options.items()
             if value is not False]
    before = {mount.id for mount in mounts()}
    ours, theirs = socket.socketpair()
    with ours, theirs:
        _fusermount(
            ["-o", ",".join(words), "--", str(point)] if words else ["--", str(point)],
            what=f"mounting {point}", pass_fds=(theirs.fileno(),),
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
        )
        theirs.close()
        ours.settimeout(TIMEOUT)
        # Not socket.recv_fds: it drops its flags, and a descriptor that a child inherits keeps the
        # connection alive after the server.
        _, control, _, _ = ours.recvmsg(1, socket.CMSG_LEN(struct.calcsize("i")), socket.MSG_CMSG_CLOEXEC)
    if not control:
        raise MountError(errno.EIO, f"fusermount3 reported success for {point}, but passed no descriptor")
    fd: int = struct.unpack("i", control[0][2])[0]
    if mount_at(point) is None:
        os.close(fd)
        _take_away_strays(before, str(options.get("fsname")))
        raise MountError(
            errno.EXDEV, f"{point} was something else when it was mounted on; nothing is mounted now")
    return fd


def _take_away_strays(before: set[int], source: str) -> None:
    for mount in mounts():
        if mount.id not in before and mount.source == source and mount.fstype.startswith("fuse"):
            unmount(mount.mountpoint, lazy=True)


def unmount(path: str | os.PathLike[str], lazy: bool = False) -> None:
    """Unmounts; the connection ends with the last user of the mount. lazy: takes the mount out of
    the directories at once, and users keep what they have open.

    Raises MountError: EBUSY if it is in use (never when lazy), EINVAL if nothing is mounted there.
    """
    point = _absolute(path)
    if os.geteuid() == 0:
        # Without a program: a daemon has to end also where it cannot start one.
        try:
            return system_calls.unmount(point, lazy=lazy)
        except OSError as error:
            if error.errno != errno.EPERM:  # a container's root need not be allowed to
                raise MountError(error.errno, f"unmounting {point}: {error.strerror}") from None
    _fusermount(["-u", *(["-z"] if lazy else []), "--", str(point)], what=f"unmounting {point}")


def is_mounted(path: str | os.PathLike[str]) -> bool:
    """True if path itself is a mount point in this process's mount namespace."""
    return mount_at(_absolute(path)) is not None


def _absolute(path: str | os.PathLike[str]) -> Path:
    """With links resolved in all but the last name, which a FUSE server may have to answer for."""
    parent, name = os.path.split(os.path.abspath(path))
    return Path(os.path.realpath(parent), name)


def _escape(value: str | bool) -> str:
    return str(value).replace("\\", "\\\\").replace(",", "\\,")


def _fusermount(words: list[str], *, what: str, **how: object) -> None:
    program = shutil.which("fusermount3") or shutil.which("fusermount3", path="/usr/bin:/bin")
    if program is None:
        raise MountError(errno.ENOENT, f"{what} needs fusermount3, which is not installed; "
                                       "on Debian: apt-get install fuse3")
    try:
        done = subprocess.run(
            [program, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=TIMEOUT, **how,
        )
    except subprocess.TimeoutExpired:
        raise MountError(errno.ETIMEDOUT, f"{what}: fusermount3 has not ended within {TIMEOUT:g} s") from None
    if done.returncode:
        reason = done.stderr.strip() or f"fusermount3 ended with {done.returncode}"
        raise MountError(_errno(reason), f"{what}: {reason}")


def _errno(reason: str) -> int:
    """The number of the error whose text ends fusermount3's message; EINVAL if none does."""
    text = reason.rpartition(": ")[2]
    return next((number for number in errno.errorcode if os.strerror(number) == text), errno.EINVAL)
