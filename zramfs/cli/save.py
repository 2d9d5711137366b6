# SPDX-License-Identifier: Apache-2.0
"""zramfs save"""
from __future__ import annotations

from pathlib import Path

import click

from zramfs.host import bounded
from zramfs.text.sizes import format_size

from . import completion
from .control import send
from .devices import tree
from .options import Value
from .output import say
from .questions import ask_device


@click.command()
@click.argument("dir", shell_complete=completion.devices)
@click.argument("file", type=Value("restore"), shell_complete=completion.files)
@click.option("--rate", type=Value("rate"), metavar="SIZE", help="Write at most so much a second: 20M.")
@click.option("--force", is_flag=True, help="Replace FILE even if it is no image.")
def save(dir: str, file: Path, rate: int | None, force: bool) -> None:
    """Save the device DIR, as it is at this moment, into FILE, while it is in use.

    Returns when FILE is on the disk. `create --restore` and `ramdisk --keep` make a device of it again. What
    is written while it is saved is not in it; a file system on the device is frozen for a moment before. An
    older FILE is replaced when the new one is whole.
    """
    words = [f"rate={rate}"] if rate else []
    directory = tree(dir)
    send(directory, " ".join(["save", *words, *(["force"] if force else []), str(file)]))
    say(f"{dir} is saved in {file}, which has {format_size(file.stat().st_size)}")


def say_restored(directory: Path) -> None:
    """What became of the image that a device was filled from."""
    text: str = ask_device(directory, (directory / "control").read_text, bounded.ANSWER_TIMEOUT)
    for line in text.partition("\n\n")[0].splitlines():
        name, _, rest = line.partition(" ")
        if name == "restored":
            say(("warning: " if "lost" in rest or "damaged" in rest or "missing" in rest else "")
                + f"restored {rest.strip()}")
