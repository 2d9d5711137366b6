# SPDX-License-Identifier: Apache-2.0
"""zramfs create, zramfs ramdisk"""
from __future__ import annotations

import click

from .. import lifecycle
from .. import ramdisk as file_systems
from ..config import DeviceConfig
from .options import DEVICE_SIZE, device_options, directory
from .output import say


@click.command()
@click.argument("dir")
@click.option(
    "--size", type=DEVICE_SIZE, metavar="SIZE",
    help="Size of the device: 512M, 4G, 50% (of the RAM). Without it, set it up later through zram/disksize.",
)
@device_options
@click.option("--allow-other", is_flag=True, help="Let other users in.")
@click.option("--foreground", is_flag=True, help="Stay attached until the device ends.")
def create(
    dir: str, size: int | None, algo: tuple[str, int | None], mem_limit: int, threads: int,
    allow_other: bool, foreground: bool,
) -> None:
    """Make a device on the directory DIR, with the block device as DIR/disk.

    Returns when the device is ready.
    """
    place = directory(dir)
    new = lifecycle.claim(place, "device", threads=threads, shared=allow_other, say=say)
    config = DeviceConfig(
        directory=place, rundir=new.path, size=size or 0, algo=algo[0], level=algo[1],
        mem_limit=mem_limit, threads=threads, name=new.name, allow_other=allow_other,
    )
    if foreground:
        lifecycle.run(new, config, say)
    else:
        lifecycle.start(new, config)


@click.command()
@click.argument("dir")
@click.option(
    "--size", type=DEVICE_SIZE, metavar="SIZE", required=True,
    help="Size of the RAM disk: 512M, 4G, 50% (of the RAM).",
)
@click.option("--fs", type=click.Choice(sorted(file_systems.MKFS)), default="ext4", show_default=True,
              help="File system.")
@device_options
def ramdisk(
    dir: str, size: int, fs: str, algo: tuple[str, int | None], mem_limit: int, threads: int
) -> None:
    """Make a device, put a file system on it and mount that on the directory DIR. Needs root.

    Returns when files can be written.
    """
    file_systems.expect_able(fs)
    place = directory(dir)
    new = lifecycle.claim(place, "ramdisk", threads=threads, shared=False, say=say)
    config = DeviceConfig(
        directory=new.tree, rundir=new.path, size=size, algo=algo[0], level=algo[1],
        mem_limit=mem_limit, threads=threads, name=new.name,
    )
    lifecycle.start(new, config, fs=fs, mountpoint=place)
