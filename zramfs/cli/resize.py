# SPDX-License-Identifier: Apache-2.0
"""zramfs resize"""
from __future__ import annotations

import click

from zramfs.configuration import settings
from zramfs.lifecycle.resize import resize_device, resize_unmounted
from zramfs.lifecycle.rundir import Rundir
from zramfs.text.sizes import format_size

from . import completion
from .devices import device
from .options import DEVICE_SIZE
from .output import say


@click.command()
@click.argument("dir", shell_complete=completion.devices)
@click.argument("size", type=DEVICE_SIZE, shell_complete=completion.one_of(("512M", "1G", "2G", "4G", "8G")))
@click.option("--unmount", is_flag=True,
              help="Where ext4 must not be mounted for it, unmount it for that moment; nobody may use it.")
@click.option("--discard", is_flag=True,
              help="Make a plain device smaller although data is stored behind the new end, which is lost.")
def resize(dir: str, size: int, unmount: bool, discard: bool) -> None:
    """Make the device DIR larger or smaller while it is in use, and the file system on it too.

    SIZE is rounded up to 2 MiB. Every file system becomes larger without a pause. btrfs becomes
    smaller without one, ext4 only with --unmount, xfs never. A swap device keeps its size. mem_limit
    stays as it is. When a step fails, says what has which size.
    """
    found = device(dir)
    if unmount:
        now = resize_unmounted(found, size, say, discard=discard)
    else:
        now = resize_device(found, size, say, discard=discard)
    say(f"{dir} has {format_size(now)}")
    _compare_with_configuration(found, now)


def _compare_with_configuration(found: Rundir, now: int) -> None:
    """What is configured is what the next start makes."""
    configured = settings.load_configuration().devices.get(found.name)
    if configured is None or configured.settings is None:
        return
    wanted = configured.settings.config.size
    if wanted != now:
        say(f"note: the next `zramfs up` makes {found.name} with {format_size(wanted)} again, as it is "
            "configured in /etc/zramfs; change zram-size there")
