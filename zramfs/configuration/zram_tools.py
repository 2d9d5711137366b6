# SPDX-License-Identifier: Apache-2.0
"""Reads /etc/default/zramswap of zram-tools, as its script zramswap (at a6bea43) takes it.

The file is a piece of shell script. Nothing of it is run: a line that is more than one plain assignment is an
error, because nobody knows what it would set.
"""
from __future__ import annotations

import os
import re
from pathlib import Path

from . import files
from .files import Complaint, Entry
from .foreign import ForeignDevice, put_algorithms

TOOL = "zram-tools"
FILE = "etc/default/zramswap"
NAME = "zramswap"  # zram-generator may have a zram0, too
_ASSIGNMENT = re.compile(
    r"""(?:export\s+)?(?P<name>[A-Za-z_]\w*)="""
    r"""(?:"(?P<double>[^"$`\\]*)"|'(?P<single>[^'\\]*)'|(?P<bare>[^\s"'$`\\;&|<>()]*))(?:\s+\#.*)?""",
    re.ASCII | re.VERBOSE)
# Names before version 0.3.3, and the present ones.
_OLD_NAMES = {"PERCENTAGE": "PERCENT", "ALLOCATION": "SIZE"}
_DEFAULTS = {"ALGO": "lz4", "SIZE": "256", "PRIORITY": "100", "PERCENT": ""}
_WHOLE = re.compile(r"[1-9][0-9]{0,8}")


def read_devices(top: Path, complaints: list[Complaint]) -> list[ForeignDevice]:
    """The one device of zram-tools, or none. complaints: about a file that cannot be read."""
    file = top / FILE
    if not os.path.lexists(file):
        return []
    text = files.read_text(file, complaints)
    if text is None:
        return []
    device = ForeignDevice(NAME, TOOL, [file])
    entries = {name: Entry(file, 1, name, value) for name, value in _DEFAULTS.items()}
    for number, raw in enumerate(text.split("\n"), 1):
        line = raw.strip()
        if line and not line.startswith("#"):
            _take_line(device, entries, Entry(file, number, "", line))
    _translate(device, entries)
    return [device]


def _take_line(device: ForeignDevice, entries: dict[str, Entry], line: Entry) -> None:
    match = _ASSIGNMENT.fullmatch(line.value)
    if match is None:
        device.refuse(line, f"expected NAME=VALUE, got {line.value!r}; zramfs runs nothing of this "
                      "shell script: write the value itself")
        return
    name = _OLD_NAMES.get(match["name"], match["name"])
    value = match["double"] or match["single"] or match["bare"] or ""
    entry = Entry(line.file, line.line, match["name"], value)
    if name not in _DEFAULTS:
        device.warn(entry, "is left out; the number of threads is `threads = NUMBER` here"
                    if name == "CORES" else "unknown variable, left out")
        return
    # An empty value is as none: the script has ${SIZE:=256}.
    if value or name == "PERCENT":
        entries[name] = entry


def _translate(device: ForeignDevice, entries: dict[str, Entry]) -> None:
    percent, size, priority = entries["PERCENT"], entries["SIZE"], entries["PRIORITY"]
    given = percent if percent.value else size
    # Bash takes a leading 0 for octal.
    if not _WHOLE.fullmatch(given.value):
        device.refuse(given, f"expected a whole number above 0 without a leading 0, got {given.value!r}")
    else:
        expression = f"ram * {given.value} / 100" if percent.value else given.value
        device.put("zram-size", expression, given)
    if re.fullmatch(r"[0-9]{1,5}|-1", priority.value):
        device.put("swap-priority", str(int(priority.value)), priority)
    else:
        device.refuse(priority, f"expected a priority from 0 to 32767, got {priority.value!r}")
    if re.fullmatch(r"[A-Za-z0-9-]+", entries["ALGO"].value):
        put_algorithms(device, entries["ALGO"])
    else:
        device.refuse(entries["ALGO"], f"expected the name of an algorithm, got {entries['ALGO'].value!r}")
