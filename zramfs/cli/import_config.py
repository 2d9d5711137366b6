# SPDX-License-Identifier: Apache-2.0
"""zramfs import"""
from __future__ import annotations

import errno
import sys

import click

from zramfs.configuration import files, importing
from zramfs.errors import ZramfsError

from .output import say


@click.command("import")
@click.option("-n", "--dry-run", is_flag=True, help="Show what would be written, and write nothing.")
@click.option("--force", is_flag=True, help="Replace files of these names in /etc/zramfs.")
@click.option("--from", "tools", type=click.Choice(list(importing.TOOLS)), multiple=True,
              help="Take only what this tool has configured; may be given twice.  [default: both]")
def import_config(dry_run: bool, force: bool, tools: tuple[str, ...]) -> int:
    """Take over the devices that zram-generator and zram-tools have configured, as /etc/zramfs/NAME.conf.

    What has no counterpart here is said, with file, line and key. A device that would be another one
    than before is left out, and the exit status is 1. No file is replaced without --force, nothing is
    started or stopped, and no program of a configuration is run.
    """
    top = files.root()
    plan = importing.make_plan(top, tools or list(importing.TOOLS))
    for complaint in [*plan.complaints, *(each for device in plan.devices for each in device.complaints)]:
        print(complaint, file=sys.stderr, flush=True)
    if not plan.devices and not plan.complaints:
        raise ZramfsError(
            errno.ENOENT, "nothing to import: zram-generator.conf is in none of its places, and "
            "/etc/default/zramswap is not there")
    if dry_run:
        for device in plan.sound:
            print(f"# {importing.target(top, device)}\n{device.text()}")
    elif plan.sound:
        written = importing.write_files(plan, top, replace=force)
        for file in written:
            say(f"wrote {file}")
        if written:
            say("note: `zramfs check-config` says what the files mean, `zramfs up` starts the devices")
        else:
            say("note: the files are there already, with the same text")
    for sentence in importing.old_services(top, plan):
        say(f"warning: {sentence}")
    if not plan.is_complete:
        left = [device.name for device in plan.devices if device not in plan.sound]
        say(f"left out, because of what is wrong above: {', '.join(left)}")
    return int(not plan.is_complete)
