# SPDX-License-Identifier: Apache-2.0
"""zramfs control"""
from __future__ import annotations

import errno
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from zramfs.device.commands import COMMANDS
from zramfs.errors import ZramfsError
from zramfs.host import bounded
from zramfs.views import scrape

from . import completion
from .devices import tree
from .output import print_object
from .questions import ask_device

ROW = 13  # characters of a row's name in `control`, with the blanks behind it


@click.command()
@click.argument("dir", shell_complete=completion.devices)
@click.argument("commands", nargs=-1, metavar="[COMMAND]...", shell_complete=completion.commands)
@click.option("-J", "--json", "as_json", is_flag=True, help="The state as JSON, after the commands.")
def control(dir: str, commands: tuple[str, ...], as_json: bool) -> None:
    """Send each COMMAND to the device DIR, or without one show its state and its commands.

    A COMMAND is a line such as compact or mem_limit=2G. Put it in quotes if it has blanks. When one
    fails, the others are not sent.
    """
    for command in commands:
        if "\n" in command or not command.strip():
            raise click.UsageError(f"expected a command of one line, got {command!r}")
    directory = tree(dir)
    file = directory / "control"
    if not commands and not as_json:
        sys.stdout.write(ask_device(directory, file.read_text, bounded.ANSWER_TIMEOUT))
    for command in commands:
        send(directory, command)
    if as_json:
        text, metrics = ask_device(directory, partial(_read_both, directory), bounded.ANSWER_TIMEOUT)
        print_object(state_values(text, metrics, str(directory)))


def send(directory: Path, command: str) -> None:
    """One command. Raises ZramfsError with the device's reason."""
    try:
        # No time limit: packing a large pool takes minutes.
        ask_device(directory, partial(_write_line, directory / "control", command), None)
    except ZramfsError:
        raise
    except OSError as error:
        reason = _reason(directory, command, error)
        raise ZramfsError(error.errno or errno.EIO, f"{command}: {reason}") from None


def _read_both(directory: Path) -> list[str]:
    return [(directory / name).read_text() for name in ("control", "metrics")]


def state_values(control_text: str, metrics: str, where: str) -> dict[str, Any]:
    """The file `control` as values for JSON, with all numbers of `metrics`. Raises ZramfsError(EBADMSG)."""
    rows: dict[str, str] = {}
    for line in control_text.partition("\n\n")[0].splitlines():
        rows[line[:ROW].rstrip()] = line[ROW:]
    scraped = scrape.parse_metrics(metrics, where)
    error = rows.pop("last error", "none")
    return {
        "name": scraped.device,
        "directory": where,
        "last_error": None if error == "none" else error,
        "state": rows,
        "metrics": [{"name": name, "labels": dict(sample.labels), "value": sample.value}
                    for name, samples in scraped.all_samples() for sample in samples],
        "commands": [{"name": command.name, "usage": command.usage, "summary": command.summary}
                     for command in COMMANDS.values()],
    }


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
