# SPDX-License-Identifier: Apache-2.0
"""zramfs stop"""
from __future__ import annotations

import click

from .. import lifecycle
from .options import device
from .output import say


@click.command()
@click.argument("dir")
def stop(dir: str) -> None:
    """End the device DIR and free its memory: its data is gone.

    DIR is the directory given to create or ramdisk, or the device's name. Undoes all that those
    did. When something is in use, says what by whom, and changes nothing.
    """
    lifecycle.stop(device(dir), say)
