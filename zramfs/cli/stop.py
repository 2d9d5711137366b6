# SPDX-License-Identifier: Apache-2.0
"""zramfs stop"""
from __future__ import annotations

import click

from zramfs.lifecycle.stop import stop_device

from . import completion
from .devices import device
from .output import say


@click.command()
@click.argument("dir", shell_complete=completion.devices)
@click.option(
    "--force", is_flag=True,
    help="End swap even if memory may not take what is in it, and a RAM disk even if it cannot be saved.")
def stop(dir: str, force: bool) -> None:
    """End the device DIR and free its memory: its data is gone, unless it is kept in an image.

    DIR is the directory given to create or ramdisk, or the device's name. Undoes all that those and
    swap did; every page in swap is brought back first. When something is in use, says what by whom,
    and changes nothing; and so when memory would not take what is in swap.
    """
    stop_device(device(dir), say, force=force)
