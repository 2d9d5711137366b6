# SPDX-License-Identifier: Apache-2.0
"""The size of a file system on a loop device: larger while it is mounted, and smaller where it can be.

ext4 becomes smaller only while nobody has it mounted, btrfs only while it is, and xfs never.
"""
from __future__ import annotations

import errno
import os
import time
from pathlib import Path

from zramfs.errors import ZramfsError
from zramfs.host import mounts, programs, safe_paths
from zramfs.host.machine import Machine
from zramfs.host.programs import run
from zramfs.text.sizes import format_size

from .ramdisk import PACKAGE

_LARGER = {"ext4": "resize2fs", "xfs": "xfs_growfs", "btrfs": "btrfs"}
_LEAST_BTRFS = 256 << 20  # to which the kernel makes one smaller
_E2FSCK_SOUND = (0, 1)  # 1: something was mended
# btrfs gives back what the governor withholds in a thread, and what was deleted with its next commit.
_TRIES, _PAUSE = 5, 1.0


def expect_able(fs: str, size: int, *, smaller: bool) -> None:
    """Raises ZramfsError(ENOENT) without the programs, EOPNOTSUPP where the file system can't do it, EINVAL
    for a size that is too small for it."""
    if fs == "btrfs" and smaller and size < _LEAST_BTRFS:
        raise ZramfsError(
            errno.EINVAL, f"btrfs takes at least {format_size(_LEAST_BTRFS)} when it becomes smaller, got "
            f"{format_size(size)}; nothing was changed")
    if fs not in _LARGER or smaller and fs == "xfs":
        raise ZramfsError(
            errno.EOPNOTSUPP, f"{fs} cannot be made {'smaller' if smaller else 'larger'}" + (
                ": copy its files to a smaller RAM disk" if fs == "xfs" else ""))
    needed = [_LARGER[fs], *(["e2fsck"] if fs == "ext4" and (smaller or not grows_mounted(fs)) else [])]
    programs.expect(dict.fromkeys(needed, PACKAGE[fs]), f"another size of {fs}")


def grows_mounted(fs: str) -> bool:
    """The kernel lets ext4 grow live for CAP_SYS_RESOURCE only, which root of a container may not have."""
    return fs != "ext4" or Machine().capable("CAP_SYS_RESOURCE")


def grow_mounted(fs: str, device: str, place: Path) -> None:
    """To the size of the device. Without effect where it has that. Raises ZramfsError with what the program
    said."""
    if fs == "btrfs":
        _resize_btrfs("max", device, place)
    else:
        # Both find the mount by the device, so a directory that is renamed meanwhile leads nowhere else.
        _expect_done([_LARGER[fs], device])


def shrink_mounted(size: int, device: str, place: Path) -> None:
    """Of btrfs, to `size` bytes: its data moves to the front. Takes as long as that takes. Raises
    ZramfsError, and then the file system has the size that it had."""
    for left in reversed(range(_TRIES)):
        try:
            return _resize_btrfs(str(size), device, place)
        except ZramfsError as error:
            if left == 0 or "No space left" not in str(error):
                raise
        time.sleep(_PAUSE)


def resize_unmounted(size: int, device: str) -> None:
    """Of ext4, to `size` bytes. Raises ZramfsError with what the program said; the file system is whole."""
    _expect_done(["e2fsck", "-f", "-p", device], sound=_E2FSCK_SOUND)
    _expect_done(["resize2fs", device, f"{size // 1024}K"])


def _resize_btrfs(size: str, device: str, place: Path) -> None:
    fd = safe_paths.open_path(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        number = mounts.mount_id(f"/proc/self/fdinfo/{fd}")
        if not any(each.id == number and each.source == device for each in mounts.mounts()):
            raise ZramfsError(errno.EXDEV, f"{device} is not what is mounted on {place} any more")
        target = f"/proc/self/fd/{fd}"
        command = ["btrfs", "filesystem", "resize", size, target]
        _expect_done(command, pass_fds=[fd], shown={target: str(place)})
    finally:
        os.close(fd)


def _expect_done(
    command: list[str], *, sound: tuple[int, ...] = (0,), pass_fds: list[int] | None = None,
    shown: dict[str, str] | None = None,
) -> None:
    done = run(command, pass_fds=pass_fds or [])
    if done.returncode in sound:
        return
    said = " ".join((done.stderr or done.stdout).split())
    text = f"`{' '.join(command)}` failed: {said}"
    for name, meant in (shown or {}).items():
        text = text.replace(name, meant)
    raise ZramfsError(errno.EIO, text)
