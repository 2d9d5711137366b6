# SPDX-License-Identifier: Apache-2.0
"""Messages on stderr and tables on stdout."""
from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn

Value = str | int | float | None


def say(message: str) -> None:
    """A result or an error. A message that is neither begins with `note: ` or `warning: `."""
    print(f"zramfs: {message}", file=sys.stderr, flush=True)


def print_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool], least: Sequence[int], *,
    show_headings: bool,
) -> None:
    """Columns one space apart, as util-linux prints them. They are not cut on a narrow terminal. least: the
    least width of each column. A column is never narrower than its heading, even without headings."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=show_headings, header_style="", padding=(0, 1, 0, 0), pad_edge=False)
    for heading, to_right, width in zip(headings, right, least, strict=True):
        table.add_column(heading, justify="right" if to_right else "left", no_wrap=True,
                         min_width=max(width, len(heading)))
    for row in rows:
        table.add_row(*row)
    # rich fits a table into the console by cutting cells, so the console is as wide as the table.
    shown = [headings, *rows]
    width = sum(max(least[i], *(len(row[i]) for row in shown)) + 1 for i in range(len(headings)))
    console = Console(width=width + 1, color_system=None, markup=False, highlight=False, emoji=False)
    with console.capture() as capture:
        console.print(table)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def print_raw(headings: Sequence[str], rows: Sequence[Sequence[str]], *, show_headings: bool) -> None:
    """One space between the cells, blanks inside cells as \\x20. An empty cell prints nothing."""
    for row in [headings, *rows] if show_headings else rows:
        print(" ".join("".join(map(_escape, cell)) for cell in row))


def _escape(character: str) -> str:
    plain = character.isprintable() and character not in " \\"
    return character if plain else f"\\x{ord(character):02x}"


def print_json(name: str, headings: Sequence[str], rows: Sequence[Sequence[Value]]) -> None:
    """{name: [{heading in lower case: value}]}, as util-linux's --json."""
    keys = [heading.lower() for heading in headings]
    print_object({name: [dict(zip(keys, row, strict=True)) for row in rows]})


def print_object(value: Mapping[str, Any]) -> None:
    """As JSON. docs/zramfs.schema.json has the shape of each command's."""
    print(json.dumps(value, indent=3, ensure_ascii=False))


def leave(number: int, _frame: FrameType | None) -> NoReturn:
    """A handler of signals that ends the command as a shell reports it, when what is open has been closed: a
    child that waits for a device would keep that in use."""
    raise SystemExit(128 + number)
