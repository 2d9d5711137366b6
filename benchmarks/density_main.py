# SPDX-License-Identifier: Apache-2.0
"""benchmarks/density: how much memory the same data takes, in kernel zram and in zramfs."""
from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import click
from rich.console import Console

from benchmarks import density, tables
from benchmarks.corpora import CORPORA, corpus
from benchmarks.density import BASE, WAYS, Density
from benchmarks.load import Zone
from benchmarks.main import machine, selection, size_option
from benchmarks.tables import WIDTH, table, titled, told
from benchmarks.tools import Interrupt, LeftOutError


@dataclass
class Results:
    """options: as the run was started; left_out: what was not measured to the reason."""

    machine: dict[str, str | int]
    options: dict[str, object]
    left_out: dict[str, str] = field(default_factory=dict)
    cells: list[Density] = field(default_factory=list)

    def cell(self, way: str, data: str) -> Density | None:
        return next((cell for cell in self.cells if (cell.way, cell.data) == (way, data)), None)

    def as_json(self) -> dict[str, object]:
        return {"machine": self.machine, "options": self.options, "left_out": self.left_out,
                "density": [cell.as_json() for cell in self.cells]}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--size", callback=size_option, default="256M", show_default=True, help="Bytes of each corpus.")
@click.option("--data", callback=selection(CORPORA), help=f"Which ones: {','.join(CORPORA)}.  [all]")
@click.option("--ways", type=click.Choice(list(WAYS)), multiple=True, help="Repeatable.  [all]")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path),
              default=Path("benchmark-results/density"), show_default=True,
              help="Directory for table.txt and results.json.")
def main(size: int, data: list[str], ways: tuple[str, ...], output: Path) -> None:
    """Store the memory of a program, the image of a file system, and text, each in several ways, and say how
    much memory each takes.
    """
    progress = Console(stderr=True)
    chosen = list(ways) or list(WAYS)
    results = Results(machine(), {"size_mib": size >> 20, "data": data, "ways": chosen,
                                  "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                                  "load": round(os.getloadavg()[0], 1)})
    with told("benchmarks/density", progress):
        output.mkdir(parents=True, exist_ok=True)
        with Interrupt() as interrupt:
            for name in data:
                progress.print(f"data: {name}, {size >> 20} MiB (made once, then kept)", markup=False)
                zone = Zone(name, corpus(name, size), 0, size)
                for way in chosen:
                    interrupt.check()
                    progress.print(f"{way}: {name}", markup=False)
                    _cell(results, way, zone, interrupt)
    tables.write(output, lambda console: show(results, console), results.as_json())
    show(results, Console(width=WIDTH))
    click.echo(f"written: {output}/table.txt, results.json")


def _cell(results: Results, way: str, zone: Zone, interrupt: Interrupt) -> None:
    if way in results.left_out:
        return
    try:
        results.cells.append(density.measure(way, zone, interrupt))
    except LeftOutError as reason:
        results.left_out[way] = str(reason)


def show(results: Results, console: Console) -> None:
    facts = results.machine
    console.print(f"{facts['cpu']}, {facts['cpus']} CPUs, {facts['ram_mib']} MiB, Linux {facts['kernel']}; "
                  f"load {results.options['load']} at the start; {results.options['size_mib']} MiB of each "
                  "kind of data", soft_wrap=True, highlight=False)
    for name, why in results.left_out.items():
        console.print(f"left out: {name}: {why}", soft_wrap=True, markup=False, highlight=False)
    rows = table("", "data", "memory ÷ data", f"÷ {BASE}", "µs a page")
    for cell in results.cells:
        base = results.cell(BASE, cell.data)
        ratio = f"{cell.share / base.share:.2f}" if base else ""
        rows.add_row(cell.way, cell.data, f"{cell.share:.3f}", ratio,
                     "" if cell.page_us is None else f"{cell.page_us:.0f}")
    titled(console, "Memory that the same data takes, and the CPU time until it is stored so", rows)
