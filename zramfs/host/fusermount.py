# SPDX-License-Identifier: Apache-2.0
"""Mounting and unmounting FUSE connections: root by system calls, everybody else through fusermount3.

Root mounts on a descriptor of the very directory or file that safe_paths has opened, so that a user who may
rename something on the way cannot choose another one. fusermount3 takes paths only; for an ordinary user it
mounts where that user could change things anyway.
Nothing here asks the mounted file system anything, so nothing hangs on a server that does not answer.
"""
from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zramfs.errors import ZramfsError

from . import programs, safe_paths, system_calls
from .mounts import mount_at, mounts

TIMEOUT = 30.0  # seconds for fusermount3, which may wait for a parent directory that does not answer
_FLAGS = {
    "ro": system_calls.MS_RDONLY, "noexec": system_calls.MS_NOEXEC, "noatime": system_calls.MS_NOATIME,
    "sync": system_calls.MS_SYNCHRONOUS, "dirsync": system_calls.MS_DIRSYNC,
}
_DATA = ("default_permissions", "allow_other", "max_read")  # what the kernel's FUSE takes as text


class MountError(ZramfsError):
    """The kernel or fusermount3 refused; the sentence holds fusermount3's own words."""


def mount_file(path: str | os.PathLike[str], *, options: Mapping[str, str | bool]) -> int:
    """Mounts a FUSE connection on an existing file or directory; returns its /dev/fuse descriptor.

    options: mount options by name; True stands alone, False is left out, text follows "=". They are fsname,
    subtype, default_permissions, max_read, allow_other (an ordinary user needs user_allow_other in
    /etc/fuse.conf), ro, noexec, noatime, sync and dirsync; nosuid and nodev always hold. Nobody answers yet:
    until a server reads the descriptor, whoever touches the path waits.

    Raises MountError: EINVAL for auto_unmount (its helper would unmount under a server that is being
    replaced) or an unknown option, ENOENT for a missing path or fusermount3, EPERM and so on; for an ordinary
    user EXDEV if somebody put a link in the path's place meanwhile, and then what was mounted behind it is
    taken away. ZramfsError(ELOOP) for a link that root must not follow.
    """
    if options.get("auto_unmount"):
        raise MountError(errno.EINVAL, "expected mount options without auto_unmount, which would end the "
                                       "mount when one of its processes ends; use unmount")
    wanted = {name: value for name, value in options.items() if value is not False}
    if os.geteuid() == 0:
        return _mount_directly(Path(os.path.abspath(path)), wanted)
    return _mount_by_program(_absolute(path), wanted)


def _mount_directly(point: Path, options: Mapping[str, str | bool]) -> int:
    for name in options:
        if name not in (*_FLAGS, *_DATA, "fsname", "subtype"):
            raise MountError(errno.EINVAL, f"mounting {point}: unknown option {name!r}")
    flags = system_calls.MS_NOSUID | system_calls.MS_NODEV
    for name in options.keys() & _FLAGS.keys():
        flags |= _FLAGS[name]
    subtype = options.get("subtype")
    fuse = None
    try:
        place = safe_paths.open_path(point, os.O_PATH)
        try:
            fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
            data = [f"fd={fuse}", f"rootmode={stat.S_IFMT(os.fstat(place).st_mode):o}",
                    f"user_id={os.getuid()}", f"group_id={os.getgid()}",
                    *(name if options[name] is True else f"{name}={options[name]}"
                      for name in _DATA if name in options)]
            system_calls.mount(
                str(options.get("fsname", "/dev/fuse")), f"/proc/self/fd/{place}",
                f"fuse.{subtype}" if subtype else "fuse", flags, ",".join(data))
        finally:
            os.close(place)
    except OSError as error:
        if fuse is not None:
            os.close(fuse)
        if isinstance(error, ZramfsError):
            raise
        raise MountError(error.errno or errno.EIO, f"mounting {point}: {error.strerror}") from None
    return fuse


def _mount_by_program(point: Path, options: Mapping[str, str | bool]) -> int:
    import socket  # 2 ms; root needs none

    words = [name if value is True else f"{name}={_escape(value)}" for name, value in options.items()]
    before = {mount.id for mount in mounts()}
    ours, theirs = socket.socketpair()
    with ours, theirs:
        _fusermount(
            ["-o", ",".join(words), "--", str(point)] if words else ["--", str(point)],
            what=f"mounting {point}", pass_fds=(theirs.fileno(),),
            env={**programs.environment(), "_FUSE_COMMFD": str(theirs.fileno())},
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
    if os.geteuid() != 0:
        point = _absolute(path)
        _fusermount(["-u", *(["-z"] if lazy else []), "--", str(point)], what=f"unmounting {point}")
        return
    try:
        unmount_exactly(path, lazy=lazy)
    except ZramfsError:
        raise
    except OSError as error:
        raise MountError(error.errno or errno.EIO, f"unmounting {path}: {error.strerror}") from None


def unmount_exactly(path: str | os.PathLike[str], *, lazy: bool = False) -> None:
    """umount2(2) of what is mounted on `path` itself, for root, behind no link that root must not follow.

    Raises OSError: EBUSY, EINVAL if nothing is mounted there.
    """
    with safe_paths.parent_of(os.path.abspath(path)) as (parent, name):
        system_calls.unmount(f"/proc/self/fd/{parent}/{name}", lazy=lazy)


def unmount_without_proc(path: Path) -> None:
    """As unmount_exactly(), in a process that has entered another mount namespace, whose /proc may be that of
    other pids: no link at all is followed, and the process's directory is another afterwards."""
    os.chdir("/")
    for name in path.parts[1:-1]:
        fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        os.fchdir(fd)
        os.close(fd)
    system_calls.unmount(path.name)


def is_mounted(path: str | os.PathLike[str]) -> bool:
    """True if path itself is a mount point in this process's mount namespace."""
    return mount_at(_absolute(path)) is not None


def _absolute(path: str | os.PathLike[str]) -> Path:
    """With links resolved in all but the last name, which a FUSE server may have to answer for."""
    parent, name = os.path.split(os.path.abspath(path))
    return Path(os.path.realpath(parent), name)


def _escape(value: str | bool) -> str:
    return str(value).replace("\\", "\\\\").replace(",", "\\,")


def _fusermount(words: list[str], *, what: str, **how: Any) -> None:
    program = programs.find("fusermount3")
    if program is None:
        from .package_managers import advise_install

        raise MountError(errno.ENOENT, f"{what} needs fusermount3, which is not installed; to get it: "
                                       f"{advise_install(programs.find, 'fuse3')}")
    import subprocess  # here, as in programs

    try:
        done = subprocess.run(
            [program, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=TIMEOUT, **{"env": programs.environment(), **how},
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
