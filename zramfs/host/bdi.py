# SPDX-License-Identifier: Apache-2.0
"""How much of what was written to a block device may wait in the page cache.

The kernel gives each device a share of the machine's page cache for data that is not yet written to it. A
file system promises room for such data before the device is asked for it, so whoever has little room wants
little of it to wait.
"""
from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

_PAUSE = 0.01  # seconds between two looks
_ALL = 100  # max_ratio of a device that nobody has bounded, in percent


def claim(device: str, timeout: float) -> int:
    """A descriptor that is locked as the one place from which `device` is bounded, until it is closed; -1
    where there is nothing to lock. Waits for whoever has claimed it before, at most for `timeout` seconds.
    After that the descriptor is not locked."""
    try:
        fd = os.open(_places(device)[0], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return -1
    end = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > end:
                return fd
        except OSError:  # no locks in /sys
            return fd
        time.sleep(_PAUSE)


def bound(device: str, nbytes: int) -> None:
    """Lets about `nbytes` written bytes wait for `device` ("/dev/loop0") or for the file system on it. The
    kernel takes it as a share of what may wait in all, so the bound moves with the machine's free memory.
    Raises OSError: ENOENT on a kernel before 6.2, EROFS where /sys is read-only."""
    for place in _places(device):
        (place / "max_bytes").write_text(str(nbytes), encoding="utf-8")
        # Without it the bound counts only when much waits for all devices together.
        (place / "strict_limit").write_text("1", encoding="utf-8")


def waiting(device: str) -> int | None:
    """The bound in bytes, as the kernel has it; None where it knows no such thing."""
    with contextlib.suppress(OSError, ValueError):
        return min(int((place / "max_bytes").read_text(encoding="utf-8")) for place in _places(device))
    return None


def release(device: str) -> None:
    """As for a device that nobody has bounded. Without effect where that fails: the device may be gone."""
    with contextlib.suppress(OSError):
        for place in _places(device):
            (place / "strict_limit").write_text("0", encoding="utf-8")
            (place / "max_ratio").write_text(str(_ALL), encoding="utf-8")


def _places(device: str) -> list[Path]:
    """That of the device, by which ext4 and xfs go, and that of a btrfs on it, which has one of its own."""
    name = Path(device).name
    number = Path(f"/sys/block/{name}/dev").read_text(encoding="utf-8").strip()
    own = [each.parent.parent / "bdi" for each in Path("/sys/fs/btrfs").glob(f"*/devices/{name}")]
    return [Path("/sys/class/bdi") / number, *own]
