# SPDX-License-Identifier: Apache-2.0
"""Whether the file that a device is to write back to is one for that: writing back destroys what it holds.

This reads the file, so it is for check-config and for `up`. systemd's generator does without it: at that
time the file system with the file may not be mounted, or may not answer.
"""
from __future__ import annotations

import os
import stat
from pathlib import Path

from zramfs.host import signatures

from .files import Complaint
from .settings import ConfiguredDevice

BLOCK = 4096  # what write-back writes at once


def examine_backing_file(device: ConfiguredDevice) -> None:
    """Adds complaints to those about the device. After an error it has no settings."""
    if device.settings is None or (path := device.settings.config.writeback) is None:
        return
    try:
        trouble, is_error = _trouble_with(str(path))
    except FileNotFoundError:
        # A device may come later, and is waited for; `up` says so if it does not.
        return
    except OSError as error:
        trouble, is_error = f"{path} cannot be read: {error.strerror}", False
    if trouble is None:
        return
    entry = device.entries["writeback-device"]
    device.complaints.append(Complaint(entry.file, entry.line, entry.key, trouble, is_error))
    if is_error:
        device.settings = None


def _trouble_with(path: str) -> tuple[str | None, bool]:
    """A sentence or None, and whether it is an error. Raises OSError."""
    # O_NONBLOCK: a FIFO would wait for a writer.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        seen = os.fstat(fd)
        if stat.S_ISBLK(seen.st_mode):
            return None, False
        if not stat.S_ISREG(seen.st_mode):
            return f"expected a block device or a regular file, and {path} is neither", True
        if held := signatures.held_by(Path(path)):
            return (f"expected a block device, or a file that is there for this alone; {path} holds {held}, "
                    "which write-back would destroy"), True
        if seen.st_size < BLOCK:
            return (f"{path} has {seen.st_size} bytes, so it is no backing file: expected at least {BLOCK}; "
                    f"`fallocate -l 1G {path}` makes one"), True
        if stat.S_IMODE(seen.st_mode) & 0o077:
            return (f"{path} has the mode {stat.S_IMODE(seen.st_mode):04o}, so other users reach what is "
                    f"written back; `chmod 600 {path}`"), False
        return None, False
    finally:
        os.close(fd)
