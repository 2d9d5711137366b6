# SPDX-License-Identifier: Apache-2.0
"""Who has locked a directory with flock(2).

The kernel gives the pids as this pid namespace knows them, and takes the lock away with the process. So a
lock tells who serves a device better than a pid in a file.
"""
from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

from .mounts import device_of, mount_id

_TRIES = 3
_PAUSE = 0.01  # seconds


def holders(directory: Path) -> list[int]:
    """Processes of this pid namespace with a lock on `directory`; of a process outside it nothing is seen."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        inode = os.fstat(fd).st_ino
        # Not st_dev, which is another number on btrfs.
        number = mount_id(f"/proc/self/fdinfo/{fd}")
    finally:
        os.close(fd)
    dev = None if number is None else device_of(number)
    found = []
    with contextlib.suppress(OSError), open("/proc/locks", encoding="utf-8") as lines:
        for line in lines:
            # 1: FLOCK ADVISORY READ PID MAJOR:MINOR:INODE START END; "->" before FLOCK: it waits for one
            fields = line.split()
            if fields[1] == "FLOCK" and dev is not None and _is_on(fields[5], dev, inode):
                found.append(int(fields[4]))
    return [pid for pid in found if pid > 0]


def _is_on(place: str, dev: str, inode: int) -> bool:
    major, minor, number = place.split(":")
    return f"{int(major, 16)}:{int(minor, 16)}" == dev and int(number) == inode


def is_locked(directory: Path, patience: float = 0.0) -> bool:
    """Whether any process has a lock on it, of whatever pid namespace. Another one that looks at the same
    time has it for a moment, and is not meant; nor is one that lets go within `patience` seconds."""
    end, tries = time.monotonic() + patience, 0
    while tries < _TRIES or time.monotonic() < end:
        if not _try_lock(directory):
            return False
        time.sleep(_PAUSE)
        tries += 1
    return True


def _try_lock(directory: Path) -> bool:
    """True if somebody has it."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
