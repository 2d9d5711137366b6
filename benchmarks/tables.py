# SPDX-License-Identifier: Apache-2.0
"""Tables of results, on the screen and in a file."""
from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

WIDTH = 118


def table(*columns: str) -> Table:
    """Names on the left, numbers on the right."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left", no_wrap=True)
    return made


def titled(console: Console, title: str, rows: Table) -> None:
    console.print()
    console.print(title, style="bold", highlight=False)
    console.print(rows)


def write(output: Path, show: Callable[[Console], None], found: dict[str, object]) -> None:
    """table.txt and results.json in `output`."""
    page = io.StringIO()
    show(Console(width=WIDTH, file=page, color_system=None))
    (output / "table.txt").write_text("".join(f"{line.rstrip()}\n" for line in page.getvalue().splitlines()))
    (output / "results.json").write_text(json.dumps(found, indent=1) + "\n")
