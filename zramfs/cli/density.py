# SPDX-License-Identifier: Apache-2.0
"""zramfs density"""
from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import click

from zramfs.errors import ZramfsError
from zramfs.host import bounded
from zramfs.model.estimate import DEFAULT_SAMPLE, ERRORS, LEVEL, Estimate, parse_sample
from zramfs.text.sizes import PAGE, format_size

from . import completion
from .control import send
from .devices import tree
from .output import print_object, print_table
from .questions import ask_device


def _sample(_ctx: click.Context, _param: click.Parameter, text: str) -> int:
    try:
        return parse_sample(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command()
@click.argument("dir", shell_complete=completion.devices)
@click.option(
    "--sample", default=format_size(DEFAULT_SAMPLE), metavar="SIZE", show_default=True, callback=_sample,
    help="Pages to try it on; as many as there are, if they are fewer.",
)
@click.option("-J", "--json", "as_json", is_flag=True, help="As JSON.")
def density(dir: str, sample: int, as_json: bool) -> None:
    """Say how dense the device DIR would be if all its pages were recompressed, shared and made units of.

    Pages are compressed for trial only, and nothing on the device is changed. It may be in use. The error
    given comes from the choice of the sample: with a larger one it is smaller.
    """
    directory = tree(dir)
    send(directory, f"estimate={sample}")
    text = ask_device(directory, (directory / "memory/estimate").read_text, bounded.ANSWER_TIMEOUT)
    found = parse_estimate(text, directory)
    if as_json:
        print_object(as_values(found))
        return
    rows = [_row("now", found.data, found.memory, 0, found.ratio)]
    if found.is_worth:
        rows.append(_row("then", found.data, found.after, ERRORS * found.error, found.ratio_after))
    print_table(["", "DATA", "MEMORY", "RATIO"], rows, [False, True, True, True], [0, 5, 5, 0],
                show_headings=True)
    click.echo("\n".join(sentences(found)))


def _row(name: str, data: int, memory: int, error: int, ratio: float | None) -> list[str]:
    return [name, format_size(data), format_size(memory) + (f" ± {format_size(error)}" if error else ""),
            f"{ratio:.2f}" if ratio else "-"]


def parse_estimate(text: str, directory: Path) -> Estimate:
    """Of memory/estimate. Raises ZramfsError(EBADMSG)."""
    try:
        lines = dict(line.split() for line in text.splitlines())
        return Estimate(**{name: int(lines[name]) for name in Estimate.__slots__})
    except (ValueError, KeyError) as error:
        raise ZramfsError(
            errno.EBADMSG, f"{directory}/memory/estimate does not read as expected ({error!r}); was the "
            "device reset meanwhile, or is its daemon of another version?") from None


def as_values(found: Estimate) -> dict[str, Any]:
    return {
        "data": found.data, "memory": found.memory, "ratio": found.ratio,
        "after": {"memory": found.after, "error": found.error, "ratio": found.ratio_after},
        "saved": found.saved, "is_worth": found.is_worth, "cpu_seconds": found.cpu_ns / 1e9,
        "sample": {"pages": found.sampled_pages, "groups": found.sampled_groups, "of_groups": found.groups,
                   "unit_pages": found.unit_pages, "shared_pages": found.shared_pages,
                   "cpu_seconds": found.own_ns / 1e9},
        "level": LEVEL, "taken_at": found.taken_at,
    }


def sentences(found: Estimate) -> list[str]:
    """What it would take, and what it is said from."""
    if not found.sampled_pages:
        return ["There is nothing on the device that takes memory."]
    where = ("all groups of 16 pages" if found.sampled_groups == found.groups
             else f"{found.sampled_groups} of {found.groups} groups of 16 pages, chosen by lot")
    said = [f"Tried on {format_size(found.sampled_pages * PAGE)} of data in {where}."]
    if not found.is_worth:
        return ["There is nothing to win: the pages would take as much as they do.", *said]
    share = 100 / found.sampled_pages
    cost = (f"It would take {_seconds(found.cpu_ns)} of CPU. {share * found.unit_pages:.0f} % of the pages "
            f"would be in units (zstd {LEVEL}), and {share * found.shared_pages:.0f} % would share an "
            "object.")
    return [cost, *said]


def _seconds(ns: int) -> str:
    seconds = ns / 1e9
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
