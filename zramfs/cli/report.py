# SPDX-License-Identifier: Apache-2.0
"""zramfs report"""
from __future__ import annotations

from pathlib import Path

import click

from zramfs.host import mounts

from . import completion
from .devices import tree
from .questions import ask_device

# A pool of 100 GiB has 51 200 pageblocks, a line of about 30 bytes each.
READ_TIMEOUT = 5.0
_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument("dir", shell_complete=completion.devices)
@click.option(
    "--output", type=_FILE, required=True, metavar="FILE",
    help="The picture (.png), or a page with it (.html).",
)
@click.option(
    "--before", type=_FILE, metavar="FILE.json",
    help="Draw an earlier report's figures beside the present ones.",
)
@click.option(
    "--data", type=_FILE, metavar="FILE.json", help="Where the raw figures go.  [default: beside FILE]",
)
def report(dir: str, output: Path, before: Path | None, data: Path | None) -> None:
    """Draw the pool of the device DIR: pageblocks, free memory by order, size classes by fullness.

    The raw figures go into a JSON file beside the picture. Give that file to a later report as
    --before, and the picture shows both.
    """
    from zramfs.views import report as reports
    from zramfs.views import sample

    if output.suffix.lower() not in reports.FORMATS:
        raise click.UsageError(f"expected --output to end with {' or '.join(reports.FORMATS)}, got {output}")
    data = data or output.with_suffix(".json")
    if output.resolve() == data.resolve():
        raise click.UsageError(f"--output and --data both name {output}")
    if before is not None and before.resolve() == data.resolve():
        raise click.UsageError(
            f"the figures of --before would be overwritten by the present ones in {data}; "
            "choose another --output or --data"
        )
    reports.expect_able()
    earlier = sample.from_json(before.read_text(), str(before)) if before else None
    directory = tree(dir)
    # Before matplotlib, whose libraries start threads: this forks.
    files = ask_device(directory, lambda: sample.texts(directory), READ_TIMEOUT)
    mount = mounts.mount_at(directory)
    name = mount.source if mount else directory.name
    now = sample.parse_sample(files, name, str(directory))
    reports.write_report(now, earlier, output)
    data.write_text(now.to_json(), encoding="utf-8")
