# SPDX-License-Identifier: Apache-2.0
"""A file system on a loop device on `disk`, and the way back."""
from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zramfs.errors import ZramfsError
from zramfs.host import bounded, fusermount, mounts, programs, safe_paths
from zramfs.host.programs import run
from zramfs.text.sizes import format_size

from .device_state import State

# What comes after the program's name. The device is new, so it reads as zeros (nothing to discard or
# to zero), and what it holds dies with it (nothing to repair after a crash, so no second copies).
# Without journal and reserve an ext4 of 8 GiB has 474 MiB more room; copying 275 MiB of files made
# 1520 write requests instead of 1750 to 2130, and with half of them deleted 59 MiB stayed in memory
# instead of 60 to 93, which the journal held.
MKFS = {
    "ext4": ["-q", "-F", "-m", "0", "-O", "^has_journal", "-E", "nodiscard,assume_storage_prezeroed=1"],
    "xfs": ["-q", "-K"],
    "btrfs": ["-q", "-K", "-M", "-m", "single", "-d", "single"],
}
# Bytes; with less, mkfs only prints its usage (xfs), or refuses with a number of blocks. Measured with the
# options above: e2fsprogs 1.47, xfsprogs 6.1, btrfs-progs 6.2.
MIN_SIZE = {"ext4": 200 << 10, "xfs": 300 << 20, "btrfs": 45 << 20}
PACKAGE = {"ext4": "e2fsprogs", "xfs": "xfsprogs", "btrfs": "btrfs-progs"}
LABEL_LIMIT = {"ext4": 16, "xfs": 12, "btrfs": 255}  # bytes; all mkfs take it behind -L
_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878  # <linux/fs.h>

LET_GO_TIMEOUT = 30.0  # seconds: a thaw, and on btrfs a commit, with writes that take from the reserve
DEFAULT_OPTIONS = "discard"  # a deleted file gives its memory back


@dataclass(frozen=True)
class FileSystem:
    """What to make on the device, and where to mount it; options as mount(8) takes them, may be empty. mode,
    owner, group of the new root directory; None = as mkfs made it. mkfs: more words for mkfs, behind ours,
    so that of two that contradict each other the user's hold. is_there: it came with an image, and is only
    mounted."""

    type: str
    mountpoint: Path
    options: str = DEFAULT_OPTIONS
    mode: int | None = None
    owner: int | None = None
    group: int | None = None
    label: str | None = None
    mkfs: tuple[str, ...] = ()
    is_there: bool = False


def as_it_was(state: State, place: Path) -> FileSystem:
    """The file system that is on the device of `state` already, to be mounted again."""
    return FileSystem(state.fs or "auto", place, DEFAULT_OPTIONS if state.options is None else state.options)


def expect_able(fs: str) -> None:
    """Raises ZramfsError unless this process may set up loop devices and mount, and has the programs."""
    if os.geteuid() != 0:
        raise ZramfsError(
            errno.EPERM,
            "a RAM disk needs root, for its loop device and its mount (try sudo); without root, "
            "`zramfs create` gives you the same device as the file `disk`",
        )
    programs.expect(
        {"losetup": "mount", "mount": "mount", f"mkfs.{fs}": PACKAGE[fs]}, f"a RAM disk with {fs}")


def trouble_with_size(fs: str, size: int) -> str | None:
    """Why a device of `size` bytes is too small for the file system; None if it is not."""
    if size >= MIN_SIZE[fs]:
        return None
    smaller = [f"{name} {format_size(least)}" for name, least in MIN_SIZE.items() if least <= size]
    hint = f" ({', '.join(smaller)})" if smaller else ""
    return f"{fs} needs at least {format_size(MIN_SIZE[fs])}{hint}"


def trouble_with_label(fs: str, label: str) -> str | None:
    """Why the file system cannot be called that; None if it can."""
    # The kernel's tools pass labels on to udev and to paths below /dev/disk/by-label.
    if label and label.isprintable() and "/" not in label and len(label.encode()) <= LABEL_LIMIT[fs]:
        return None
    return f"expected a label of 1 to {LABEL_LIMIT[fs]} bytes without / for {fs}, got {label!r}"


def make_file_system(fs: str, device: str, label: str | None = None, more: Sequence[str] = ()) -> None:
    """more: words for mkfs behind ours. Raises ZramfsError with what mkfs said."""
    named = [] if label is None else ["-L", label]
    command = [f"mkfs.{fs}", *MKFS[fs], *named, *more, device]
    done = run(command)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise ZramfsError(errno.EIO, f"`{' '.join(command)}` failed: {said}")


def mount(wanted: FileSystem, device: str) -> None:
    """Mounts on the very directory that is under the mount point's name at the begin; whoever may rename a
    directory on the way cannot choose another. Raises ZramfsError: with what mount said; EXDEV if something
    else is under that name at the end, and then nothing is mounted."""
    options = ["-o", wanted.options] if wanted.options else []
    command = ["mount", "-t", wanted.type, *options, "--", device, str(wanted.mountpoint)]
    point = safe_paths.open_path(wanted.mountpoint, os.O_PATH | os.O_DIRECTORY)
    try:
        # The dot, because the newer mount(2) calls of util-linux 2.39 follow no link at the end.
        target = f"/proc/self/fd/{point}/."
        done = run([command[0], "--no-canonicalize", *command[1:-1], target], pass_fds=[point])
    finally:
        os.close(point)
    if done.returncode:
        said = done.stderr.strip().replace(target, str(wanted.mountpoint))
        raise ZramfsError(errno.EIO, f"`{' '.join(command)}` failed: {said}")
    try:
        _set_owner(wanted, device)
    except OSError:
        detach_everywhere(device)
        raise


def _set_owner(wanted: FileSystem, device: str) -> None:
    """Of the new root directory alone. Raises ZramfsError(EXDEV) if that is not under its name."""
    fd = -1
    try:
        with contextlib.suppress(OSError):
            fd = safe_paths.open_path(wanted.mountpoint, os.O_RDONLY | os.O_DIRECTORY)
        number = mounts.mount_id(f"/proc/self/fdinfo/{fd}") if fd >= 0 else None
        if not any(each.id == number and each.source == device for each in mounts.mounts()):
            raise ZramfsError(
                errno.EXDEV,
                f"{device} was mounted on {wanted.mountpoint}, and something else is there now, so it was "
                "taken away again: somebody has renamed a directory on the way meanwhile")
        if wanted.owner is not None or wanted.group is not None:
            os.fchown(fd, *(-1 if each is None else each for each in (wanted.owner, wanted.group)))
        if wanted.mode is not None:
            os.fchmod(fd, wanted.mode)
    finally:
        if fd >= 0:
            os.close(fd)


def govern(tree: Path) -> None:
    """Has the daemon keep the new file system within the pool's limit. Raises ZramfsError."""
    try:
        send_command(tree, "govern=on")
    except OSError as error:
        raise ZramfsError(
            error.errno or errno.EIO, f"the file system cannot be kept within the limit: {error.strerror}; "
            f"the reason is in {tree.parent / 'log'}") from None


def let_go(tree: Path, timeout: float = LET_GO_TIMEOUT) -> bool:
    """Ends that, so that the next umount is the end of the file system. False if it is not done within
    `timeout` seconds: then it ends later, on xfs and btrfs not before the thaw of what somebody froze. For a
    process of one thread."""
    try:
        bounded.call(lambda: send_command(tree, "govern=off"), timeout)
    except OSError:  # TimeoutError is one
        return False
    return True


def send_command(tree: Path, line: str) -> None:
    """One line to `control`. Raises OSError with the daemon's errno."""
    fd = os.open(tree / "control", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, f"{line}\n".encode())
    finally:
        os.close(fd)


def mounted(device: str, mountpoint: Path) -> bool:
    """True if the file system on `device` is what stands on `mountpoint`."""
    mount = mounts.mount_at(mountpoint)
    return mount is not None and mount.source == device


def places(device: str) -> list[Path]:
    """Where the file system on `device` is mounted, the first mount first; they may have been renamed."""
    return [each.mountpoint for each in mounts.mounts() if each.source == device]


def detach_everywhere(device: str) -> None:
    """Takes the file system on `device` out of all directories, users or not."""
    for place in reversed(places(device)):
        with contextlib.suppress(OSError):
            fusermount.unmount_exactly(place, lazy=True)


def unmount(mountpoint: Path, *, lazy: bool = False) -> None:
    """Raises ZramfsError: EBUSY, or what umount2(2) said."""
    # Somebody who looks at every new mount (an indexer, a df) is gone in a moment.
    for pause in (0.1, 0.3, 0.6, 0):
        try:
            fusermount.unmount_exactly(mountpoint, lazy=lazy)
            return
        except OSError as error:
            if error.errno != errno.EBUSY or pause == 0:
                raise ZramfsError(
                    error.errno or errno.EIO, f"cannot unmount {mountpoint}: {error.strerror}") from None
        time.sleep(pause)


def thaw(mountpoint: Path) -> bool:
    """Ends the freeze of a file system (fsfreeze(8)); False if it was not frozen."""
    return _freeze_call(mountpoint, _FITHAW)


def freeze(mountpoint: Path) -> None:
    _freeze_call(mountpoint, _FIFREEZE)


def _freeze_call(mountpoint: Path, number: int) -> bool:
    with contextlib.suppress(OSError):
        fd = safe_paths.open_path(mountpoint, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, number, 0)
            return True
        finally:
            os.close(fd)
    return False
