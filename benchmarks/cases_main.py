# SPDX-License-Identifier: Apache-2.0
"""benchmarks/cases: what density is worth to a RAM disk and to swap, in two real cases."""
from __future__ import annotations

import dataclasses
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import click
from rich.console import Console

from benchmarks import cases, tables
from benchmarks.cases import WAYS, Outcome, Way
from benchmarks.main import machine, selection, size_option
from benchmarks.tables import WIDTH, table, titled, told
from benchmarks.tools import BenchmarkError, Interrupt, LeftOutError, need

CASES = ("tree", "swap")
TITLES = {"tree": "A source tree, unpacked and compiled on the device, then compared and loaded",
          "swap": "A program that is larger than its memory cgroup, and mostly uses a fifth of its memory"}
MIB = 1 << 20
SWAPS = Path("/proc/swaps")


@dataclass
class Results:
    """options: as the run was started; left_out: case and way to the reason; load: of the machine at the
    start."""

    machine: dict[str, str | int]
    options: dict[str, object]
    load: float
    left_out: dict[str, str] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)

    def median(self, case: str, way: str) -> Outcome | None:
        """Each figure's own median over the repetitions."""
        some = [each for each in self.outcomes if (each.case, each.way) == (case, way)]
        if not some:
            return None
        middle = {name: statistics.median(getattr(each, name) for each in some)
                  for name in ("fill", "use", "client", "server", "machine", "packing")}
        looks = {name: cases.Look(*(round(statistics.median(getattr(getattr(each, name), part) for each in
        some))
                                    for part in ("stored", "resident"))) for name in ("rest", "after")}
        return dataclasses.replace(some[0], **middle, **looks)

    def as_json(self) -> dict[str, object]:
        return {"machine": self.machine, "options": self.options, "load": self.load,
                "left_out": self.left_out, "outcomes": [each.as_json() for each in self.outcomes]}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--cases", "names", callback=selection(CASES), help=f"Which ones: {','.join(CASES)}.  [both]")
@click.option("--tree", callback=size_option, default="96M", show_default=True,
              help="Bytes of the source tree.")
@click.option("--size", callback=size_option, default="1G", show_default=True, help="Memory of the program.")
@click.option("--limit", callback=size_option, default="300M", show_default=True,
              help="Of its memory cgroup.")
@click.option("--uses", type=click.IntRange(1), default=1_000_000, show_default=True,
              help="Pages that the program uses.")
@click.option("--ways", type=click.Choice([way.name for way in WAYS]), multiple=True,
              help="Repeatable.  [all]")
@click.option("--reps", type=click.IntRange(1), default=3, show_default=True, help="Medians are shown.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path),
              default=Path("benchmark-results/cases"), show_default=True,
              help="Directory for table.txt and results.json.")
def main(names: list[str], tree: int, size: int, limit: int, uses: int, ways: tuple[str, ...], reps: int,
         output: Path) -> None:
    """Build a source tree on a RAM disk, and run a program that is larger than its memory cgroup, each on
    kernel zram and on zramfs in turns. Wants root, and no other swap area.
    """
    progress = Console(stderr=True)
    chosen = [way for way in WAYS if not ways or way.name in ways]
    results = Results(machine(), {
        "cases": names, "tree_mib": tree // MIB, "size_mib": size // MIB, "limit_mib": limit // MIB,
        "uses": uses, "ways": [way.name for way in chosen], "reps": reps,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }, os.getloadavg()[0])
    with told("benchmarks/cases", progress):
        if os.getuid():
            raise LeftOutError("file systems, swap and memory cgroups need root (try sudo)")
        if "swap" in names:
            _expect_no_swap()
        output.mkdir(parents=True, exist_ok=True)
        with Interrupt() as interrupt:
            for rep in range(reps):
                for case in names:
                    # Turn by turn another way is the first.
                    for way in chosen[rep % len(chosen):] + chosen[:rep % len(chosen)]:
                        interrupt.check()
                        progress.print(f"run {rep + 1} of {reps}: {case}, {way.name}", markup=False)
                        _measure(results, case, way, tree, size, limit, uses, interrupt)
    tables.write(output, lambda console: show(results, console), results.as_json())
    show(results, Console(width=WIDTH))
    click.echo(f"written: {output}/table.txt, results.json")


def _expect_no_swap() -> None:
    """What is measured goes to the area of the highest priority, and other programs of the machine go there
    too."""
    for program in ("mkswap", "swapon", "swapoff"):
        need(program, "util-linux and mount")
    areas = [line.split()[0] for line in SWAPS.read_text().splitlines()[1:]]
    if areas:
        raise BenchmarkError(f"expected a machine without swap, found {' '.join(areas)}; end it with "
                             "swapoff, or leave the case out with --cases tree")


def _measure(results: Results, case: str, way: Way, tree: int, size: int, limit: int, uses: int,
             interrupt: Interrupt) -> None:
    place = f"{case}, {way.name}"
    if place in results.left_out:
        return
    try:
        results.outcomes.append(cases.tree(way, tree, interrupt) if case == "tree"
                                else cases.swap(way, size, limit, uses, interrupt))
    except LeftOutError as reason:
        results.left_out[place] = str(reason)


def show(results: Results, console: Console) -> None:
    facts, options = results.machine, results.options
    console.print(
        f"{facts['cpu']}, {facts['cpus']} CPUs, {facts['ram_mib']} MiB, Linux {facts['kernel']}; load "
        f"{results.load:.1f} at the start; a tree of {options['tree_mib']} MiB; a program of "
        f"{options['size_mib']} MiB in {options['limit_mib']} MiB; medians of {options['reps']}",
        soft_wrap=True, highlight=False)
    for name, why in results.left_out.items():
        console.print(f"left out: {name}: {why}", soft_wrap=True, markup=False, highlight=False)
    for case in CASES:
        found = [each for way in WAYS if (each := results.median(case, way.name))]
        if not found:
            continue
        base = results.median(case, WAYS[0].name)
        rows = table("", "stored", "memory", "÷ stored", "÷ zram", "after", "fill", "use", "client", "server",
                     "all CPUs", "pack")
        for each in found:
            rows.add_row(
                each.way, f"{each.rest.stored / MIB:.0f}", f"{each.rest.resident / MIB:.0f}",
                f"{each.rest.resident / each.rest.stored:.3f}",
                f"{each.rest.resident / base.rest.resident:.2f}" if base else "",
                f"{each.after.resident / MIB:.0f}",
                f"{each.fill:.1f}", f"{each.use:.1f}", f"{each.client:.1f}", f"{each.server:.1f}",
                f"{each.machine:.1f}", f"{each.packing:.1f}")
        titled(console, f"{TITLES[case]} (MiB; seconds)", rows)
