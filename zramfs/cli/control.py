# SPDX-License-Identifier: Apache-2.0
"""zramfs control"""
from __future__ import annotations

import errno
import os
import sys
from functools import partial
from pathlib import Path

import click

from zramfs.errors import ZramfsError
from zramfs.host import bounded

from . import completion
from .options import tree
from .questions import ask_device


@click.command()
@click.argument("dir", shell_complete=completion.devices)
@click.argument("commands", nargs=-1, metavar="[COMMAND]...", shell_complete=completion.commands)
def control(dir: str, commands: tuple[str, ...]) -> None:
    """Send each COMMAND to the device DIR, or without one show its state and its commands.

    A COMMAND is a line such as compact or mem_limit=2G. Put it in quotes if it has blanks. When one
    fails, the others are not sent.
    """
    for command in commands:
        if "\n" in command or not command.strip():
            raise click.UsageError(f"expected a command of one line, got {command!r}")
    directory = tree(dir)
    file = directory / "control"
    if not commands:
        sys.stdout.write(ask_device(directory, file.read_text, bounded.ANSWER_TIMEOUT))
        return
    for command in commands:
        try:
            # No time limit: packing a large pool takes minutes.
            ask_device(directory, partial(_write_line, file, command), None)
        except ZramfsError:
            raise
        except OSError as error:
            reason = _reason(directory, command, error)
            raise ZramfsError(error.errno or errno.EIO, f"{command}: {reason}") from None


def _write_line(file: Path, command: str) -> None:
    fd = os.open(file, os.O_WRONLY)
    try:
        os.write(fd, command.encode() + b"\n")
    finally:
        os.close(fd)


def _reason(directory: Path, command: str, error: OSError) -> str:
    """The sentence in `control` about a command that write(2) could only answer with an errno."""
    try:
        text: str = ask_device(directory, (directory / "control").read_text, bounded.ANSWER_TIMEOUT)
    except OSError:
        text = ""
    for line in text.splitlines():
        if line.startswith("last error") and f" {command.strip()}: " in line:
            return line.split(f" {command.strip()}: ", 1)[1]
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"
