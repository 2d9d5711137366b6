# SPDX-License-Identifier: Apache-2.0
"""zramfs log"""
from __future__ import annotations

import errno
import re
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from zramfs.errors import ZramfsError

from . import completion
from .devices import device
from .output import print_object

MOST = 8 << 20  # bytes: twice what watch_log lets a log become
# As host/log.py has them written.
_ENTRY = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(?P<ms>\d{3}) (?P<level>[A-Z]+) (?P<logger>\S+): "
    r"(?P<message>.*)", re.ASCII)


@click.command()
@click.argument("dir", shell_complete=completion.devices)
@click.option("-n", "--lines", type=click.IntRange(0), metavar="NUMBER",
              help="Only the last NUMBER entries.  [default: all]")
@click.option("-J", "--json", "as_json", is_flag=True, help="As JSON.")
def log(dir: str, lines: int | None, as_json: bool) -> None:
    """Show what the daemon of the device DIR has said: refused commands, failures, its end.

    The log of a daemon that failed stays until the device is stopped. A service writes to the journal
    instead: journalctl -u zramfs@NAME.
    """
    found = device(dir)
    entries = parse_log(_text(found.log))
    if lines is not None:
        entries = entries[len(entries) - lines:] if lines < len(entries) else entries
    if as_json:
        print_object({"device": found.name, "entries": entries})
        return
    for entry in entries:
        head = f"{entry['time']} {entry['level']} {entry['logger']}: " if entry["time"] else ""
        print(f"{head}{entry['message']}")
    sys.stdout.flush()


def _text(file: Path) -> str:
    try:
        with open(file, "rb") as content:
            data = content.read(MOST)
    except FileNotFoundError:
        raise ZramfsError(
            errno.ENOENT, f"{file} is not there: a service and a device in the foreground write no log file; "
            "of a service see journalctl") from None
    return data.decode("utf-8", errors="replace")


def parse_log(text: str) -> list[dict[str, Any]]:
    """The entries, in order: time (ISO 8601, with the offset of this machine), level, logger and message.
    Lines that follow an entry, as of a trace, belong to its message. Those before the first entry are one of
    their own, without time, level and logger: what was said before, or without, the log."""
    found: list[dict[str, Any]] = []
    for line in text.removesuffix("\n").split("\n") if text else []:
        if match := _ENTRY.fullmatch(line):
            words = {key: match[key] for key in ("level", "logger", "message")}
            found.append({"time": _time(match), **words})
        elif found:
            found[-1]["message"] += f"\n{line}"
        else:
            found.append({"time": None, "level": None, "logger": None, "message": line})
    return found


def _time(match: re.Match[str]) -> str | None:
    try:
        there = datetime.strptime(f"{match['time']}.{match['ms']}", "%Y-%m-%d %H:%M:%S.%f")
    except ValueError:
        return None
    return there.astimezone().isoformat(timespec="milliseconds")
