# SPDX-License-Identifier: Apache-2.0
"""zramfs swap"""
from __future__ import annotations

import itertools
from typing import Any

import click

from zramfs.lifecycle import claim, rundir, start
from zramfs.lifecycle import swap as areas
from zramfs.model.config import DEFAULT_RESERVE
from zramfs.text import sizes

from .options import DEVICE_SIZE, NAME, density_option, described, device_options
from .output import say


class _Size(click.ParamType):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return sizes.parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command()
@click.argument("name", required=False, type=NAME)
@click.option(
    "--size", type=DEVICE_SIZE, metavar="SIZE", required=True,
    help="Size of the swap area before compression: 512M, 4G, 50% (of the RAM).",
)
@click.option(
    "--priority", type=click.IntRange(0, areas.MAX_PRIORITY), default=areas.DEFAULT_PRIORITY,
    metavar="NUMBER", show_default=True, help="Swap areas of a higher priority are filled first.",
)
@click.option(
    "--discard", type=click.Choice(areas.DISCARDS), default="both", show_default=True,
    help="When the kernel tells the device what it no longer needs: once for the whole area, for "
         "pages as they are freed, or both.",
)
@click.option(
    "--reserve", type=_Size(), default=DEFAULT_RESERVE, metavar="SIZE",
    help="Memory kept ready, so that storing a page never waits for any.  [default: 16M]",
)
@click.option(
    "--min-free", type=_Size(), metavar="SIZE",
    help="Raise vm.min_free_kbytes to this until the device is stopped.  [default: by the RAM, 16M to 64M]",
)
@click.option("--force", is_flag=True, help="Go on without what keeps the machine from hanging.")
@click.option("--foreground", is_flag=True, help="Stay attached until the device ends.")
@device_options
@density_option("swap")
def swap(
    name: str | None, priority: int, discard: str, reserve: int, min_free: int | None, force: bool,
    foreground: bool, **values: Any,
) -> None:
    """Make a device and swap on it, NAME or else the first free of swap0, swap1 and so on. Needs root.

    Prints the name that it chose. Its process is locked in memory and keeps memory ready, and the
    kernel is told to keep more memory free. Without these a machine short of memory hangs, so this
    refuses if one of them is not possible. `zramfs stop NAME` brings every page back and undoes it all.
    """
    areas.expect_able()
    wanted = described(reserve=reserve, forced=force, **values)
    if wanted.size < areas.MIN_SIZE:
        raise click.UsageError(f"expected a size of at least {areas.MIN_SIZE} bytes, got {wanted.size}")
    if (trouble := areas.trouble_with(wanted.primary)) and not force:
        raise click.UsageError(trouble)
    new, config = claim.claim_place(None, "swap", wanted, say=say, name=name or _free_name())
    on_top = areas.Swap(priority, discard, min_free, force)
    if foreground:
        start.serve_in_foreground(new, config, say, on_top)
    else:
        start.start_device(new, config, on_top, say)
    if name is None:
        click.echo(new.name)


def _free_name() -> str:
    taken = {each.name for each in rundir.rundirs()}
    return next(name for number in itertools.count() if (name := f"swap{number}") not in taken)
