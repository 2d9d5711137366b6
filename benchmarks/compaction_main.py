# SPDX-License-Identifier: Apache-2.0
"""benchmarks/compaction: what the compactor gives back by itself, and what it costs meanwhile."""
from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks import disturbance, pages, returned, tables
from benchmarks.disturbance import OFF, ON, Cost, Idle
from benchmarks.load import Zone
from benchmarks.main import machine, selection, size_option
from benchmarks.results import Floor
from benchmarks.returned import Course
from benchmarks.tables import WIDTH, table, titled, told
from benchmarks.tools import Interrupt, LeftOutError

PARTS = ("returned", "disturbance")
QUIET = 0.1  # share of the CPUs that others may take


@dataclass
class Results:
    """options: as the run was started; left_out: what was not measured to the reason."""

    machine: dict[str, str | int]
    options: dict[str, object]
    left_out: dict[str, str] = field(default_factory=dict)
    courses: list[Course] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    idle: Idle | None = None

    def floors(self) -> list[Floor]:
        """What must hold, each judged by its worst case. A report, never the exit status."""
        found = []
        if ours := {course.data: course.unasked for course in self.courses if course.peer == "zramfs"}:
            data = min(ours, key=lambda data: ours[data])
            found.append(Floor("memory given back within 10 s, nobody asking", 0.25, False, ours[data], data))
        if self.costs:
            slowest = max((c for c in self.costs if "rand" in c.row), key=lambda cost: cost.p99_ratio)
            found.append(Floor(
                "p99 of 4 KiB random reads ÷ without compactor", 2.0, True, slowest.p99_ratio, slowest.row))
            loser = max((c for c in self.costs if "seq" in c.row), key=lambda cost: cost.loss)
            found.append(
                Floor("throughput of sequential I/O that is lost", 0.15, True, loser.loss, loser.row))
        return found

    def as_json(self) -> dict[str, object]:
        return {
            "machine": self.machine, "options": self.options, "left_out": self.left_out,
            "returned": [course.as_json() for course in self.courses],
            "disturbance": [cost.as_json() for cost in self.costs],
            "idle": asdict(self.idle) if self.idle else None,
            "floors": [asdict(floor) | {"reached": floor.reached} for floor in self.floors()],
        }


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--size", callback=size_option, default="512M", show_default=True, help="Bytes of each device.")
@click.option("--parts", callback=selection(PARTS), help=f"Which ones: {','.join(PARTS)}.  [both]")
@click.option("--data", callback=selection(pages.DATA), help="half, real: see README.md.  [both]")
@click.option("--algo", default="lz4", show_default=True,
              help="Of zramfs and kernel zram, as in zramfs create.")
@click.option("--reps", type=click.IntRange(1), default=5, show_default=True,
              help="Repetitions of the second part; its table shows medians.")
@click.option("--seconds", type=click.FloatRange(0.1), default=1.0, show_default=True,
              help="Length of one measurement of the second part.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path),
              default=Path("benchmark-results/compaction"), show_default=True,
              help="Directory for table.txt and results.json.")
def main(size: int, parts: list[str], data: list[str], algo: str, reps: int, seconds: float,
         output: Path) -> None:
    """Discard a random 30 % of the pages of a full device, and see how much memory comes back, of zramfs
    and of kernel zram; then see what reads and writes lose while zramfs compacts.
    """
    progress = Console(stderr=True)
    results = Results(machine(), {
        "size_mib": size >> 20, "parts": parts, "data": data, "algo": algo, "reps": reps, "seconds": seconds,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    })
    with told("benchmarks/compaction", progress):
        output.mkdir(parents=True, exist_ok=True)
        zones = [Zone(kind, pages.image(kind, size), 0, size) for kind in data]
        with Interrupt() as interrupt:
            if "returned" in parts:
                for zone in zones:
                    for kind in ("zram", "zramfs"):
                        progress.print(f"discarding 30 % of {kind} with {zone.data}", markup=False)
                        _course(results, kind, zone, algo, interrupt)
            if "disturbance" in parts:
                results.costs, results.idle = disturbance.measure(
                    zones[0], algo, seconds, reps, interrupt, lambda text: progress.print(text, markup=False))
    tables.write(output, lambda console: show(results, console), results.as_json())
    show(results, Console(width=WIDTH))
    click.echo(f"written: {output}/table.txt, results.json")


def _course(results: Results, kind: str, zone: Zone, algo: str, interrupt: Interrupt) -> None:
    try:
        results.courses.append(returned.measure(kind, zone, algo, interrupt))
    except LeftOutError as reason:
        results.left_out[kind] = str(reason)


def show(results: Results, console: Console) -> None:
    """Print all tables."""
    facts = results.machine
    console.print(f"{facts['cpu']}, {facts['cpus']} CPUs, {facts['ram_mib']} MiB, Linux {facts['kernel']}; "
                  f"devices of {results.options['size_mib']} MiB, {results.options['algo']}",
                  soft_wrap=True, highlight=False)
    for name, why in results.left_out.items():
        console.print(f"left out: {name}: {why}", soft_wrap=True, markup=False, highlight=False)
    if results.courses:
        titled(console, "Memory of the full device that is given back, seconds after a random 30 % of its "
               "pages were discarded", _returned(results))
    if results.costs:
        titled(console, f"Reads and writes on such a device, compactor off and at work: medians of "
               f"{results.options['reps']} runs of {results.options['seconds']} s", _costs(results))
        if max(cost.elsewhere for cost in results.costs) > QUIET:
            console.print("Other programs ran meanwhile (the last column: their share of the CPUs): these "
                          "figures say little. Measure again when nothing else runs.", soft_wrap=True,
                          highlight=False)
    if results.idle:
        idle = results.idle
        console.print(f"\nWhen nothing is to be won: {idle.cpu:.2f} s of CPU and {idle.slices} slices in "
                      f"{idle.seconds:.1f} s", highlight=False)
    if found := results.floors():
        rows = table("floor", "bound", "worst", "where", "")
        for floor in found:
            bound = f"{'≤' if floor.at_most else '≥'} {floor.bound:g}"
            verdict = "reached" if floor.reached else "NOT reached"
            rows.add_row(floor.text, bound, f"{floor.value:.2f}", floor.where, verdict)
        titled(console, "Floors", rows)


def _returned(results: Results) -> Table:
    rows = table("", "data", "full MiB", *(f"{seconds:g} s" for seconds in returned.SECONDS),
                 "after\n`compact`", "pool then\nMiB", "discards\ntook")
    for course in results.courses:
        rows.add_row(
            "kernel zram" if course.peer == "zram" else "zramfs", course.data, _mib(course.full.resident),
            *(f"{100 * course.returned(point):.1f} %" for point in course.points),
            _mib(course.points[-1].used), f"{course.discarding:.1f} s",
        )
    return rows


def _costs(results: Results) -> Table:
    rows = table("", "p50 µs\noff", "\nat work", "p99 µs\noff", "\nat work", "ratio", "MB/s\noff",
                 "\nat work", "loss", "compactor's\ntime", "pages\nfreed", "pages\nmoved", "other\nload")
    for cost in results.costs:
        latency = [f"{cost.median(value, of):.0f}" for of in (lambda run: run.p50, lambda run: run.p99)
                   for value in (OFF, ON)]
        rates = [f"{cost.median(value, lambda run: run.rate) / 1e6:.0f}" for value in (OFF, ON)]
        rows.add_row(
            cost.row, *latency, f"{cost.p99_ratio:.2f}", *rates, f"{100 * cost.loss:.1f} %",
            f"{100 * cost.median(ON, lambda run: run.worked):.1f} %",
            *(f"{cost.median(ON, of):.0f}" for of in (lambda run: run.compacted, lambda run: run.migrated)),
            f"{100 * cost.elsewhere:.0f} %",
        )
    return rows


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"
