# SPDX-License-Identifier: Apache-2.0
"""zramfs abort"""
from __future__ import annotations

import click

from zramfs.host import mounts, paths
from zramfs.lifecycle import abort as aborting
from zramfs.lifecycle import rundir

from . import completion
from .devices import no_device
from .output import say


@click.command()
@click.argument("dir", shell_complete=completion.devices)
@click.option("--force", is_flag=True, help="Abort swap in use, too: programs with pages there are killed.")
def abort(dir: str, force: bool) -> None:
    """Cut the device DIR off from everybody who waits for it, when it does not answer: its data is gone.

    Every process that hangs in a read or a write gets an error at once. Nothing is asked of the daemon,
    which ends as soon as it runs. `zramfs stop DIR` cleans up then. A device that answers needs no
    abort: stop ends it in order.
    """
    if found := rundir.find(dir):
        ended = aborting.abort_device(found, force=force)
        state = found.read()
        where = state.where if state else dir
    else:
        place = paths.resolve(dir)
        mount = mounts.mount_at(place)
        if mount is None or mount.fstype != mounts.FSTYPE:
            raise no_device(dir)
        ended, where = aborting.abort_foreign(place), str(place)
    listed = ", ".join(f"{each.mountpoint} (connection {each.dev.partition(':')[2]})" for each in ended)
    say(f"aborted {listed}; once the daemon has ended, `zramfs stop {where}` cleans up")
