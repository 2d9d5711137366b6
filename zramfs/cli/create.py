# SPDX-License-Identifier: Apache-2.0
"""zramfs create, zramfs ramdisk"""
from __future__ import annotations

from typing import Any

import click

from zramfs.host import safe_paths
from zramfs.lifecycle import claim, images, start
from zramfs.lifecycle import ramdisk as file_systems

from . import completion
from .options import (
    DEVICE_SIZE,
    Value,
    density_option,
    described,
    device_options,
    expect_file_system,
    expect_kept,
    file_system_options,
    lock_option,
    name_option,
    over_contents,
    standby_option,
)
from .output import say
from .save import say_restored


@click.command()
@click.argument("dir", shell_complete=completion.directories)
@click.option(
    "--size", type=DEVICE_SIZE, metavar="SIZE",
    help="Size of the device: 512M, 4G, 50% (of the RAM). Without it, set it up later: zram/disksize.",
)
@name_option
@device_options
@density_option("device")
@over_contents
@lock_option
@standby_option
@click.option(
    "--restore", type=Value("restore"), metavar="FILE", shell_complete=completion.files,
    help="Fill it from an image that save has made. Its size is that of the image if --size is not larger.")
@click.option("--allow-other", is_flag=True, help="Let other users in.")
@click.option("--foreground", is_flag=True, help="Stay attached until the device ends.")
def create(dir: str, name: str | None, foreground: bool, **values: Any) -> None:
    """Make a device on the directory DIR, with the block device as DIR/disk.

    Returns when the device is ready.
    """
    new, config = claim.claim_place(
        safe_paths.resolve(dir), "device", images.with_image(described(**values)), say=say, name=name)
    if foreground:
        start.serve_in_foreground(new, config, say)
    else:
        start.start_device(new, config, say=say)
    if config.restore:
        say_restored(config.directory)


@click.command()
@click.argument("dir", shell_complete=completion.directories)
@click.option(
    "--size", type=DEVICE_SIZE, metavar="SIZE", required=True,
    help="Size of the RAM disk: 512M, 4G, 50% (of the RAM).",
)
@click.option(
    "--fs", type=click.Choice(sorted(file_systems.MKFS)), default="ext4", show_default=True,
    help="File system.",
)
@name_option
@file_system_options
@device_options
@density_option("ramdisk")
@over_contents
@lock_option
@standby_option
@click.option(
    "--keep", type=Value("keep"), metavar="FILE", shell_complete=completion.files,
    help="Restore it from this image if there is one, and save it there when it is stopped.")
@click.option(
    "--keep-every", type=Value("keep_every"), metavar="AGE", default="0",
    help="Save it there again and again: 15min, 1h.  [default: only when it is stopped]")
def ramdisk(
    dir: str, name: str | None, fs: str, label: str | None, mkfs: tuple[str, ...], options: str,
    mode: int | None, **values: Any,
) -> None:
    """Make a device, put a file system on it and mount that on the directory DIR. Needs root.

    Returns when files can be written.
    """
    wanted = described(**values)
    place = safe_paths.resolve(dir)
    top = file_systems.FileSystem(fs, place, options, mode, label=label, mkfs=mkfs)
    expect_kept(wanted)
    expect_file_system(top, wanted.size)
    file_systems.expect_able(fs)
    wanted, top = images.with_kept(wanted, top, say)
    new, config = claim.claim_place(place, "ramdisk", wanted, say=say, name=name, mode=mode)
    start.start_device(new, config, top, say)
