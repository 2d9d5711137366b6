# SPDX-License-Identifier: Apache-2.0
"""Images that a device is made from, and that it is saved into at its end."""
from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from zramfs.errors import ZramfsError
from zramfs.host import safe_paths
from zramfs.image.reader import ImageReader
from zramfs.model.config import DeviceConfig
from zramfs.text.sizes import format_size

from . import ramdisk
from .device_state import State
from .ramdisk import FileSystem

Top = TypeVar("Top")

SLOW_DISK = 10 << 20  # bytes a second: a card or a busy disk; others give ten times as much


def with_image(config: DeviceConfig) -> DeviceConfig:
    """At least as large as the image that the device is filled from. Raises ZramfsError for what is no image
    that this version reads."""
    if config.restore is None:
        return config
    with ImageReader(config.restore) as image:
        return replace(config, size=max(config.size, image.head.disksize))


def time_to_restore(config: DeviceConfig) -> float:
    """Seconds, from a slow disk."""
    return os.stat(config.restore).st_size / SLOW_DISK if config.restore else 0.0


def with_kept(
    config: DeviceConfig, on_top: Top, say: Callable[[str], None]
) -> tuple[DeviceConfig, Top]:
    """Of a RAM disk that keeps an image: the image, if there is one, takes the place of a new file system.
    Raises ZramfsError: ENOENT for a missing directory."""
    keep = config.keep
    if keep is None or not isinstance(on_top, FileSystem):
        return config, on_top
    with safe_paths.parent_of(keep) as (directory, name):
        try:
            os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return config, on_top
    found = with_image(replace(config, restore=keep))
    if found.size != config.size:
        say(f"note: {keep} has {format_size(found.size)}, and so has the device, not "
            f"{format_size(config.size)}")
    return found, replace(on_top, is_there=True)


def save_before_end(state: State, *, force: bool, say: Callable[[str], None] | None) -> None:
    """Saves a device whose file system is unmounted into the image that it keeps. force: it may end without.
    Raises ZramfsError when that fails, and the device can't end without a loss."""
    if state.keep is None or state.pid == os.getpid() or state.phase != "ready" or not state.alive():
        return
    tree = Path(state.directory)
    if say:
        say(f"saving {state.where} to {state.keep}")
    try:
        ramdisk.send_command(tree, "save")
    except OSError as error:
        if error.errno == errno.ENODATA:  # somebody has switched it off by `keep=off`
            return
        reason = os.strerror(error.errno or errno.EIO)
        if not force:
            raise ZramfsError(
                error.errno or errno.EIO, f"{state.where} could not be saved to {state.keep}: {reason} (the "
                "log says more), so it goes on. Make room there and stop it again, or stop it with --force, "
                "which loses what was written since the last save") from None
        if say:
            say(f"warning: {state.where} could not be saved to {state.keep}: {reason}; it ends all the same")
        ramdisk.send_command(tree, "keep=off")
