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
    least width of each column. A column is never narrower than its heading, even without headings.

    Not by rich, whose tables take 30 ms to load: half of what `zramfs status` may cost."""
    lines = [list(headings), *([_visible(cell) for cell in row] for row in rows)]
    widths = [max(least[i], *(_width(line[i]) for line in lines)) for i in range(len(headings))]
    for line in lines if show_headings else lines[1:]:
        cells = []
        for cell, width, to_right in zip(line, widths, right, strict=True):
            blanks = " " * (width - _width(cell))
            cells.append(blanks + cell if to_right else cell + blanks)
        sys.stdout.write(" ".join(cells).rstrip() + "\n")


def _visible(cell: str) -> str:
    """A terminal obeys control characters, and a path may hold any of them; so they are shown as \\x1b, as
    util-linux does."""
    return cell if cell.isprintable() else "".join(map(_escape_control, cell))


def _escape_control(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x20 or 0x7f <= number < 0xa0 else character


def _width(text: str) -> int:
    """Columns of a terminal: a character of East Asia takes two of them."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def print_raw(headings: Sequence[str], rows: Sequence[Sequence[str]], *, show_headings: bool) -> None:
    """One space between the cells, blanks inside cells as \\x20. An empty cell prints nothing."""
    for row in [headings, *rows] if show_headings else rows:
        print(" ".join("".join(map(_escape, cell)) for cell in row))


def _escape(character: str) -> str:
    plain = character.isprintable() and character not in " \\"
    return character if plain else f"\\x{ord(character):02x}"


def print_object(value: Mapping[str, Any]) -> None:
    """As JSON. docs/zramfs.schema.json has the shape of each command's."""
    print(json.dumps(value, indent=3, ensure_ascii=False))


def leave(number: int, _frame: FrameType | None) -> NoReturn:
    """A handler of signals that ends the command as a shell reports it, when what is open has been closed: a
    child that waits for a device would keep that in use."""
    raise SystemExit(128 + number)
