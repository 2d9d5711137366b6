# SPDX-License-Identifier: Apache-2.0
"""`zramfs status --details`: what lies where on a device, and what each step has won and cost."""
from __future__ import annotations

import errno
import sys
from collections.abc import Mapping
from typing import Any

from zramfs.errors import ZramfsError
from zramfs.model.contents import KINDS, REST, STEPS
from zramfs.text.sizes import PAGE, format_size, format_time

from .output import print_table

Contents = dict[str, Any]


def parse_contents(text: str, where: str) -> Contents | None:
    """Of the file memory/contents below `where`; None for a device that is not set up, or whose daemon has no
    such file. Raises ZramfsError(EBADMSG)."""
    try:
        lines = {name: int(value) for name, value in (line.split() for line in text.splitlines())}
        return _contents(lines) if lines else None
    except (ValueError, KeyError) as error:
        raise ZramfsError(
            errno.EBADMSG, f"{where}/memory/contents does not read as expected ({error!r}); is its daemon of "
            "another version?") from None


def _contents(lines: Mapping[str, int]) -> Contents:
    return {
        "kinds": [{"kind": name, "pages": lines[f"{name}_pages"], "bytes": lines[f"{name}_bytes"]}
                  for name in KINDS],
        "rest": lines[f"{REST}_bytes"],
        "steps": [{"step": name, "pages": lines[f"step_{name}_pages"],
                   "bytes_saved": lines[f"step_{name}_bytes_saved"],
                   "cpu_seconds": lines[f"step_{name}_cpu_ms"] / 1000}
                  # A daemon of another version may know fewer.
                  for name in STEPS if f"step_{name}_pages" in lines],
    }


def print_contents(name: str, contents: Contents, in_bytes: bool) -> None:
    """Two tables: kinds with a page, and steps that were taken."""
    size = str if in_bytes else format_size
    kinds = [each for each in contents["kinds"] if each["pages"]]
    pages = sum(each["pages"] for each in kinds)
    rows = [[each["kind"], str(each["pages"]), size(each["pages"] * PAGE), size(each["bytes"]),
             _ratio(each["pages"] * PAGE, each["bytes"]), KINDS[each["kind"]]] for each in kinds]
    memory = sum(each["bytes"] for each in kinds) + contents["rest"]
    rows += [
        [REST, "", "", size(contents["rest"]), "", "headers, and room between and behind the objects"],
        ["all", str(pages), size(pages * PAGE), size(memory), _ratio(pages * PAGE, memory), ""],
    ]
    sys.stdout.write(f"\n{name}\n")
    print_table(["KIND", "PAGES", "DATA", "MEMORY", "RATIO", ""], rows,
                [False, True, True, True, True, False], [0, 0, 5, 5, 0, 0], show_headings=True)
    if steps := [each for each in contents["steps"] if each["cpu_seconds"] or each["pages"]]:
        print_table(["STEP", "PAGES", "SAVED", "CPU", ""], [
            [each["step"], str(each["pages"]), size(each["bytes_saved"]), format_time(each["cpu_seconds"]),
             STEPS[each["step"]]] for each in steps], [False, True, True, True, False], [0, 0, 5, 5, 0],
            show_headings=True)


def json_of(contents: Mapping[str, Contents | None]) -> list[dict[str, Any]]:
    """contents: by the names of the devices."""
    return [{"name": name, **(each or {"kinds": None, "rest": None, "steps": None})}
            for name, each in contents.items()]


def _ratio(data: int, memory: int) -> str:
    return f"{data / memory:.2f}" if memory else "-"
