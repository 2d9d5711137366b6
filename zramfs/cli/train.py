# SPDX-License-Identifier: Apache-2.0
"""zramfs train"""
from __future__ import annotations

import base64
import errno
import os
import random
from dataclasses import asdict
from pathlib import Path

import click

from zramfs.codecs.spec import parse_spec
from zramfs.errors import ZramfsError
from zramfs.host import bounded
from zramfs.model.config import Algorithm
from zramfs.text import sizes

from . import completion
from .devices import tree
from .output import print_object, say
from .questions import ask_device

READ_TIMEOUT = 120.0  # seconds for the sample: a page takes about 0.2 ms
LEAST_SAMPLE = 64  # train.LEAST, whose module loads the compressors
DEFAULT_SAMPLE = 5000  # pages, 20 MB: the trainer wants a hundred times the dictionary, zstd(1) says


def _expect_writable(output: Path) -> None:
    if not os.access(output.absolute().parent, os.W_OK | os.X_OK):
        raise ZramfsError(
            errno.EACCES, f"expected {output} in a directory that can be written to; "
            f"{output.absolute().parent} is none")


def _parsed(algo: str, size: str) -> tuple[Algorithm, int]:
    """Raises click.UsageError."""
    from zramfs.codecs import train as training

    try:
        chosen, most = parse_spec(algo), sizes.parse_size(size)
        training.expect_size(most, chosen.name)
        if chosen.name == "none" or chosen.dictionary:
            raise ValueError(f"--algo takes zstd, lz4 or lz4hc with a level, not {algo!r}")
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    return chosen, most


@click.command()
@click.argument("dir", shell_complete=completion.devices)
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, metavar="FILE",
    help="Where the dictionary goes.",
)
@click.option(
    "--algo", default="zstd", metavar="ALGO[:LEVEL]", show_default=True,
    help="What it is for: zstd, lz4 or lz4hc.", shell_complete=completion.one_of(("lz4", "lz4hc", "zstd")),
)
@click.option("--size", default="64K", metavar="SIZE", show_default=True, help="Limit on the dictionary.")
@click.option(
    "--sample", type=click.IntRange(min=LEAST_SAMPLE, max=1 << 20), default=DEFAULT_SAMPLE, metavar="NUMBER",
    show_default=True, help="Pages to train on and to judge by.",
)
@click.option("-J", "--json", "as_json", is_flag=True, help="What it would win, as JSON.")
def train(dir: str, output: Path, algo: str, size: str, sample: int, as_json: bool) -> None:
    """Train a dictionary on a sample of the pages of the device DIR, and say what it would win.

    The pages are read without counting as used, and nothing on the device is changed. If the
    dictionary wins nothing on pages that it was not trained on, no file is written.
    """
    from zramfs.codecs import train as training

    chosen, most = _parsed(algo, size)
    directory = tree(dir)
    _expect_writable(output)  # before a minute's work, not after it

    def take() -> list:
        found = training.sample(directory, sample, random.Random())
        return [[base64.b64encode(page).decode() for page in found.pages], found.stored]

    # A device that hangs is found out at once, and not after the time that a sample may take.
    ask_device(directory, (directory / "zram/disksize").read_text, bounded.ANSWER_TIMEOUT)
    pages, stored = ask_device(directory, take, READ_TIMEOUT)
    taken = training.Sample([base64.b64decode(page) for page in pages], stored)
    assert chosen.level is not None
    dictionary, verdict = training.train(taken, chosen.name, chosen.level, most)
    wins = verdict.won > 0 and verdict.bytes_won > 0
    if not as_json:
        click.echo("\n".join(verdict.lines()))
    if wins:
        training.write(dictionary, output)
    if as_json:
        figures = {**asdict(verdict), "won": verdict.won, "bytes_won": verdict.bytes_won}
        print_object({"output": str(output.absolute()) if wins else None, **figures})
    if not wins:
        raise ZramfsError(
            errno.EINVAL,
            f"a dictionary would lose, so {output} was not written; device and pages stay as they are")
    say(f"note: {output}: {len(dictionary)} bytes, which contain pieces of the device's data; to use it: "
        f"--recomp-algo {chosen.name}:{chosen.level}:dict={output.absolute()}")
