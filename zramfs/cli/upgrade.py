# SPDX-License-Identifier: Apache-2.0
"""zramfs upgrade"""
from __future__ import annotations

import click

from zramfs.lifecycle import rundir
from zramfs.lifecycle.rundir import Rundir
from zramfs.lifecycle.upgrade import expect_startable, upgrade_device

from . import completion
from .devices import device
from .output import say


@click.command()
@click.argument("dirs", nargs=-1, metavar="[DIR]...", shell_complete=completion.devices)
@click.option("--all", "is_all", is_flag=True, help="All devices of this user that are served.")
def upgrade(dirs: tuple[str, ...], is_all: bool) -> int:
    """Have the devices DIR served by the version of zramfs that this command is, while they are in use.

    Keeper, daemon and standby are replaced, and the data stays where it is. Whoever reads or writes waits for
    some milliseconds; a program that has a file of DIR other than disk open has to open it again. A device
    that this version cannot take over is left as it is, and one that it does not serve after all goes back
    to the version before. Needs Linux 6.9. The exit status is 1 if a device was not upgraded.
    """
    if bool(dirs) == is_all:
        raise click.UsageError("expected the directories of devices, or --all")
    chosen = [each for each in rundir.rundirs() if each.is_served()] if is_all else list(map(device, dirs))
    if not chosen:
        say("note: no device is there")
        return 0
    expect_startable()
    return max([_upgrade(each) for each in dict.fromkeys(chosen)])


def _upgrade(found: Rundir) -> int:
    state = found.read()
    where = state.where if state else found.name
    try:
        done = upgrade_device(found)
    except OSError as error:
        say(f"{where}: not upgraded: {error.strerror or error}")
        return 1
    print(f"{where}: {done.before} -> {done.after}, paused for {done.pause * 1000:.0f} ms", flush=True)
    if not done.has_tree:
        say(f"warning: {where}: its files do not answer yet; `zramfs log {where}` says why")
    return 0
