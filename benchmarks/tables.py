# SPDX-License-Identifier: Apache-2.0
"""What a run shows: tables of results on the screen and in a file, and why it ended early."""
from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.tools import BenchmarkError, Interrupted, LeftOutError
from zramfs.errors import ZramfsError

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


@contextlib.contextmanager
def told(program: str, progress: Console) -> Iterator[None]:
    """A failure and a signal end the program with a sentence, and with the exit status of a shell."""
    try:
        yield
    except Interrupted as signal:
        progress.print(f"{signal}: ended before the results were complete; everything is taken down")
        sys.exit(128 + signal.number)
    except (BenchmarkError, LeftOutError, ZramfsError) as error:
        progress.print(f"{program}: {error}", markup=False, style="red")
        sys.exit(1)
