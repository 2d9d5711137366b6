# SPDX-License-Identifier: Apache-2.0
"""Directories that no device may be mounted on, because of what the mount would hide."""
from __future__ import annotations

import errno
import os
import pwd
import sys
from pathlib import Path

import zramfs
from zramfs.errors import ZramfsError
from zramfs.host import in_use, mounts

from . import rundir

# Every command needs these, also the one that is to take the mount away.
_NEEDED = ("/proc", "/sys", "/dev", "/usr", "/bin", "/lib", "/etc")
_SYSTEM = (
    "/boot", "/home", "/root", "/run", "/sbin", "/usr/local", "/usr/share", "/var", "/var/lib", "/var/log",
)
# Programs and what they load: no directory below these is anybody's to mount on.
_PROGRAMS = (
    "/bin", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/sbin", "/sys",
    "/usr/bin", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libexec", "/usr/sbin",
)
_FOR_ALL = ("/tmp", "/var/tmp", "/dev/shm")
_MODE_FOR_ALL = 0o1777


def hides(directory: Path) -> str | None:
    """Why no device may be mounted on `directory`, whatever is in it; None when one may."""
    what = _hidden(directory)
    return f"expected a directory to mount on, got {directory}, which {what}" if what else None


def _hidden(directory: Path) -> str | None:
    bases = rundir.bases()
    python = [Path(os.__file__).parent, Path(zramfs.__file__).parent]
    if _holds(directory, [*map(Path, _NEEDED), *bases]):
        return "would hide what zramfs itself needs"
    if any(directory.is_relative_to(base) for base in bases):
        return "is where zramfs keeps its run directories"
    if _holds(directory, [*python, *map(Path, (sys.prefix, sys.base_prefix, sys.executable))]) or any(
            directory.is_relative_to(place) for place in python):
        return "would hide the Python that zramfs runs on"
    if _holds(directory, [*map(Path, _SYSTEM), *_home()]) or any(
            directory.is_relative_to(place) for place in _PROGRAMS):
        return "would hide what the system needs"
    return None


def _holds(directory: Path, places: list[Path]) -> bool:
    return any(place.is_relative_to(directory) for place in places)


def _home() -> list[Path]:
    """Of this user; / is nobody's."""
    try:
        home = Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        return []
    return [home] if home != Path("/") else []


def needs_mode(directory: Path, mode: int | None) -> str | None:
    """Why `directory` needs another mode than `mode` of what is mounted there; None when it does not. mode
    None: as mkfs or the device has it, for one user."""
    if str(directory) not in _FOR_ALL or mode is not None and mode & _MODE_FOR_ALL == _MODE_FOR_ALL:
        return None
    got = "none" if mode is None else f"{mode:04o}"
    return (f"everybody writes to {directory}, so a file system there needs mode = {_MODE_FOR_ALL:o} "
            f"(--mode {_MODE_FOR_ALL:o}), got {got}")


def expect_allowed(directory: Path, mode: int | None = None) -> None:
    """Raises ZramfsError(EINVAL) for what must never be hidden. mode: of the root directory of a file system
    there; see needs_mode()."""
    if reason := hides(directory) or needs_mode(directory, mode):
        raise ZramfsError(errno.EINVAL, reason)


def expect_idle(directory: Path) -> None:
    """Raises ZramfsError(EBUSY) if somebody uses a file that a mount on `directory` would hide."""
    if not _is_empty(directory) and (phrases := in_use.holders_below(directory)):
        listed = "".join(f"\n  {phrase}" for phrase in phrases)
        raise ZramfsError(
            errno.EBUSY, f"{directory} is in use, and a mount there would hide it; take an empty directory, "
            f"or stop these first:{listed}")


def _is_empty(directory: Path) -> bool:
    """True also for one that is not there, or cannot be read: claim_place() says so; and for one on FUSE,
    whose server may not answer."""
    mount = mounts.mount_at(directory)
    if mount is not None and mount.fstype.startswith("fuse"):
        return True
    try:
        return not os.listdir(directory)
    except OSError:
        return True
