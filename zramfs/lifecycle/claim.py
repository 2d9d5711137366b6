# SPDX-License-Identifier: Apache-2.0
"""A run directory for a new device, and what is there in its place already."""
from __future__ import annotations

import errno
import os
import stat
import time
from datetime import datetime
from pathlib import Path

from zramfs.errors import ZramfsError
from zramfs.host import mounts, paths, process, safe_paths
from zramfs.lifecycle.stop import (
    END_TIMEOUT,
    Say,
    clean_up,
    expect_unserved,
    expect_unused,
    remove_rundir,
)
from zramfs.model.config import DeviceConfig
from zramfs.text.kernel_numbers import page_align

from . import mount_points, rundir
from .rundir import Rundir, State

_PAUSE = 0.02  # seconds between two looks whether a device has ended


def claim_place(
    directory: Path | None, kind: str, config: DeviceConfig, *, say: Say, name: str | None = None,
    mode: int | None = None,
) -> tuple[Rundir, DeviceConfig]:
    """A run directory for a new device, and the device's description with its place in it.

    directory: where the tree goes, or the file system of a RAM disk; None for swap. It is made if only its
    last part is missing. kind: as State.kind. name: of the device; None = its directory's, escaped. mode: of
    the root directory of a RAM disk's file system.
    Cleans up what a dead daemon left there, and says so. Raises ZramfsError: EBUSY when a device is there,
    ENOTDIR, ENOENT, EPERM; EINVAL and EBUSY for what a mount would hide.
    """
    if directory is not None:
        mount_points.expect_allowed(directory, mode)
    base = rundir.bases()[0]
    new = Rundir(base / (name or paths.escape(directory or Path("swap"))))
    inside = directory is None
    directory = directory or new.tree
    end = time.monotonic() + END_TIMEOUT
    while True:
        with rundir.locked(base):
            if not _ending(new, directory, end, say):
                made = []
                if not inside:
                    mount_points.expect_idle(directory)
                    made = _make_directory(directory)
                _make_rundir(new, directory, kind, config, made)
                tree = directory if kind == "device" else new.tree
                return new, config.at(tree, new.path, new.name)
        time.sleep(_PAUSE)


def _make_rundir(new: Rundir, directory: Path, kind: str, config: DeviceConfig, made: list[str]) -> None:
    try:
        # Others pass through to `disk` of a device that they may use.
        mode = 0o711 if config.allow_other else 0o700
        os.mkdir(new.path, mode)
        os.chmod(new.path, mode)
        if kind in ("ramdisk", "swap"):
            new.tree.mkdir(0o700)
        new.write(_first_state(new, directory, kind, config, made))
    except BaseException:
        remove_rundir(new, made)
        raise


def _first_state(new: Rundir, directory: Path, kind: str, config: DeviceConfig, made: list[str]) -> State:
    start_time = process.process_start(os.getpid())
    assert start_time is not None
    is_ramdisk = kind == "ramdisk"
    return State(
        name=new.name,
        directory=str(new.tree if is_ramdisk else directory),
        disk=str(new.disk),
        kind=kind,
        phase="starting",
        pid=os.getpid(),
        pid_start=start_time,
        boot_id=process.boot_id(),
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        threads=config.threads,
        made=made,
        mountpoint=str(directory) if is_ramdisk else None,
        keep=str(config.keep) if config.keep else None,
        # That of a plain device changes without a command of the command line (reset, disksize).
        size=None if kind == "device" else page_align(config.size),
    )


def _ending(new: Rundir, directory: Path, end: float, say: Say) -> bool:
    """True while the device on `directory` is on its way out; raises EBUSY when one is there to stay,
    cleans up one whose daemon died."""
    for other in rundir.rundirs():
        state = other.read()
        if other.path != new.path and (state is None or str(directory) not in state.places()):
            continue
        if state is None or not state.alive():
            expect_unserved(other, state)
            message = rundir.stale_message(other, state)
            expect_unused(other, state)
            clean_up(other, state)
            say(message)
        elif state.phase == "ready" and mounts.mount_at(Path(state.directory)) is None:
            if time.monotonic() > end:
                raise ZramfsError(
                    errno.EBUSY,
                    f"the tree of the device on {directory} was unmounted, but its daemon (pid {state.pid}) "
                    f"has not ended within {END_TIMEOUT:g} s: something still uses {state.disk}; "
                    f"`zramfs stop {directory}` says what",
                )
            return True
        else:
            what = "is just being started" if state.phase == "starting" else "is there"
            raise ZramfsError(
                errno.EBUSY,
                f"a zramfs device {what} on {state.where} (daemon pid {state.pid}, since {state.created}); "
                f"use another {'name' if state.kind == 'swap' else 'directory'}, or "
                f"`zramfs stop {state.where}` first",
            )
    if foreign := rundir.foreign_mount(directory):
        raise ZramfsError(errno.EBUSY, f"{foreign}; or use another directory")
    return False


def _make_directory(directory: Path) -> list[str]:
    """The list of directories that were made."""
    try:
        safe_paths.make_directory(directory)
    except FileExistsError:
        if not stat.S_ISDIR(os.lstat(directory).st_mode):
            raise ZramfsError(errno.ENOTDIR, f"{directory} is not a directory; a device needs one") from None
        return []
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise
        number = error.errno or errno.EIO
        raise ZramfsError(
            number, f"{directory} does not exist and could not be created: {os.strerror(number)}") from None
    return [str(directory)]
