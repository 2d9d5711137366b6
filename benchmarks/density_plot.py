# SPDX-License-Identifier: Apache-2.0
"""Draws benchmarks/density.png from benchmarks/density.json, which benchmarks/density has written.

    .venv/bin/python benchmarks/density_plot.py [RESULTS.JSON [PICTURE.PNG]]

A panel for each kind of data, a bar for each way to store it: memory ÷ data. The figure at the end of a bar
is how many times as much data as kernel zram with lz4 the way holds in the same memory. Prints the table for
results.md, which a test holds to density.json.
"""
from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend without a display has to be chosen first)

HERE = Path(__file__).resolve().parent
BASE = "zram lz4"
KERNEL, SIMULATED, OURS = "#c0392b", "#e6a79f", "#1b6ca8"
TITLES = {"process": "memory of a program", "image": "image of a file system", "text": "text"}


@dataclass(frozen=True)
class Bar:
    """share: memory ÷ data; capacity: data in the same memory ÷ that of BASE."""

    way: str
    share: float
    capacity: float

    @property
    def colour(self) -> str:
        if self.way.startswith("zramfs"):
            return OURS
        return SIMULATED if self.way.endswith("simulated") else KERNEL


def panels(results: dict) -> dict[str, list[Bar]]:
    """The bars of each kind of data, in the order of the results. ValueError for a kind without BASE."""
    found: dict[str, list[Bar]] = {}
    for data in dict.fromkeys(cell["data"] for cell in results["density"]):
        cells = {cell["way"]: cell["share"] for cell in results["density"] if cell["data"] == data}
        if BASE not in cells:
            raise ValueError(f"expected {BASE} among the ways of {data}, found {', '.join(cells)}")
        found[data] = [Bar(way, share, cells[BASE] / share) for way, share in cells.items()]
    if not found:
        raise ValueError("expected results of benchmarks/density, found none")
    return found


def table(shown: dict[str, list[Bar]]) -> list[str]:
    """Lines of Markdown: memory ÷ data, and in brackets the same divided by that of BASE."""
    lines = [f"| | {' | '.join(shown)} |", "| --- |" + " --- |" * len(shown)]
    for bars in zip(*shown.values(), strict=True):
        cells = (f"{bar.share:.3f} ({1 / bar.capacity:.2f})".replace("0.", ".") for bar in bars)
        lines.append(f"| {bars[0].way} | {' | '.join(cells)} |")
    return lines


def draw(shown: dict[str, list[Bar]], target: Path) -> None:
    """One panel beside the other."""
    figure, axes = plt.subplots(1, len(shown), figsize=(11, 3.8), sharey=True, squeeze=False)
    for axis, (data, bars) in zip(axes[0], shown.items(), strict=True):
        axis.barh([bar.way for bar in bars], [bar.share for bar in bars], color=[bar.colour for bar in bars])
        for place, bar in enumerate(bars):
            axis.text(bar.share, place, f" {bar.capacity:.2f}×", va="center", fontsize="small")
        axis.set_xlim(0, 1.25 * max(bar.share for bar in bars))
        axis.set_title(TITLES.get(data, data), fontsize="medium")
        axis.set_xlabel("memory ÷ data")
        axis.grid(alpha=0.3, axis="x")
        axis.set_axisbelow(True)
    axes[0, 0].invert_yaxis()  # shared: once for all panels
    figure.tight_layout()
    figure.savefig(target, dpi=80)
    plt.close(figure)


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "density.json"
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else HERE / "density.png"
    shown = panels(json.loads(source.read_text(encoding="utf-8")))
    draw(shown, target)
    print("\n".join(table(shown)))


if __name__ == "__main__":
    main()
