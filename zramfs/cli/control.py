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


@click.command()
@click.argument("dir", shell_complete=completion.devices)
@click.argument("commands", nargs=-1, metavar="[COMMAND]...", shell_complete=completion.commands)
def control(dir: str, commands: tuple[str, ...]) -> None:
    """Send each COMMAND to the device DIR, or without one show its state and its commands.

    A COMMAND is a line such as compact or mem_limit=2G; one with blanks needs quotes. Stops at
    the first that fails.
    """
    for command in commands:
        if "\n" in command or not command.strip():
            raise click.UsageError(f"expected a command of one line, got {command!r}")
    file = tree(dir) / "control"
    if not commands:
        try:
            sys.stdout.write(bounded.call(file.read_text, bounded.ANSWER_TIMEOUT))
        except TimeoutError:
            raise ZramfsError(
                errno.ETIMEDOUT, f"{file} has not answered for {bounded.ANSWER_TIMEOUT:g} s"
            ) from None
        return
    for command in commands:
        try:
            # Packing a large pool takes as long as it takes.
            bounded.call(partial(_send, file, command), None)
        except OSError as error:
            reason = _reason(file, command, error)
            raise ZramfsError(error.errno or errno.EIO, f"{command}: {reason}") from None


def _send(file: Path, command: str) -> None:
    fd = os.open(file, os.O_WRONLY)
    try:
        os.write(fd, command.encode() + b"\n")
    finally:
        os.close(fd)


def _reason(file: Path, command: str, error: OSError) -> str:
    """The sentence `control` has for what write(2) could only answer with an errno."""
    try:
        text: str = bounded.call(file.read_text, bounded.ANSWER_TIMEOUT)
    except OSError:
        text = ""
    for line in text.splitlines():
        if line.startswith("last error") and f" {command.strip()}: " in line:
            return line.split(f" {command.strip()}: ", 1)[1]
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"
