# SPDX-License-Identifier: Apache-2.0
"""Draws benchmarks/results.png from the table in benchmarks/results.md.

    .venv/bin/python benchmarks/results_plot.py

Each row of the table is a line of the picture. A point says how fast a server is, divided by kernel zram in
the same row; right of 1 it is faster. The table is the only place where the figures stand.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend without a display has to be chosen first)

HERE = Path(__file__).resolve().parent
# The first four cells of a row: data and row, zramfs file / loop, kernel zram, nbdkit file / loop.
ROW = re.compile(
    r"^\| (half|real) ([a-z]+-[a-z]+-\d+) \| ([\d.]+) / ([\d.]+) \| ([\d.]+) \| ([\d.]+) / ([\d.]+) \|"
)
SERVERS = (
    ("zramfs, file", "#1b6ca8", "o"),
    ("zramfs, loop", "#7fb2d9", "s"),
    ("nbdkit, loop", "#7f8c8d", "x"),
)
TITLES = {"half": "half compressible pages", "real": "pages of an ext4 image"}


@dataclass(frozen=True)
class Row:
    """values: of SERVERS, as multiples of kernel zram."""

    data: str
    name: str
    values: tuple[float, ...]


def rows(text: str) -> list[Row]:
    """The rows of the table. ValueError if there are none."""
    found = []
    for line in text.splitlines():
        if match := ROW.match(line):
            file, loop, zram, _, nbdkit = (float(number) for number in match.groups()[2:])
            found.append(Row(match[1], match[2], (file / zram, loop / zram, nbdkit / zram)))
    if not found:
        raise ValueError(
            "expected a table with rows such as '| half seq-write-1 | 1696 / 1858 | ...', found none"
        )
    return found


def draw(table: list[Row], target: Path) -> None:
    """One panel for each kind of data."""
    kinds = list(dict.fromkeys(row.data for row in table))
    figure, axes = plt.subplots(1, len(kinds), figsize=(10, 3.6), sharex=True, sharey=True, squeeze=False)
    for kind, axis in zip(kinds, axes[0], strict=True):
        shown = [row for row in table if row.data == kind]
        for i, (label, colour, marker) in enumerate(SERVERS):
            places = range(len(shown))
            axis.plot(
                [row.values[i] for row in shown], places, marker, color=colour, label=label, markersize=7
            )
        axis.axvline(1, color="#c0392b", linewidth=1)
        axis.set_yticks(range(len(shown)), [row.name for row in shown])
        axis.set_xscale("log")
        axis.set_xticks([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2], minor=False)
        axis.minorticks_off()
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_title(TITLES[kind], fontsize="medium")
        axis.set_xlabel("rate ÷ kernel zram (red line)")
        axis.grid(alpha=0.3)
    axes[0, 0].invert_yaxis()  # shared: once for all panels
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(labels), fontsize="small", loc="upper center", frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(target, dpi=100)
    plt.close(figure)


def main() -> None:
    draw(rows((HERE / "results.md").read_text(encoding="utf-8")), HERE / "results.png")


if __name__ == "__main__":
    main()
