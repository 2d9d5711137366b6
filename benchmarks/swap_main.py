# SPDX-License-Identifier: Apache-2.0
"""benchmarks/swap: how fast pages go to swap and come back, on zramfs and on the kernel's zram."""
from __future__ import annotations

import contextlib
import io
import json
import statistics
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import swapping
from benchmarks.main import machine, size_option
from benchmarks.tables import told
from benchmarks.tools import BenchmarkError, Interrupt, built, need

MIB = 1 << 20
PEERS = ("zram", "zramfs")
PASSES = 3  # of verifying
SECONDS = 600  # for one program; the slowest of ours took 30
PAGE_CLUSTER = Path("/proc/sys/vm/page-cluster")


@dataclass(frozen=True)
class Run:
    """One program on one peer. out, back: MiB/s of the program's memory, written once and verified in
    order; random: pages/s, verified in a random order."""

    peer: str
    page_cluster: int
    out: float
    back: float
    random: float


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--size", callback=size_option, default="1G", show_default=True, help="Memory of the program.")
@click.option("--limit", callback=size_option, default="200M", show_default=True,
              help="Of its memory cgroup: the rest is in swap.")
@click.option("--page-cluster", "clusters", default="3", show_default=True,
              help="Values of vm.page-cluster, separated by commas; the old one is restored.")
@click.option("--algo", default="lz4", show_default=True, help="As in zramfs swap.")
@click.option("--reps", type=click.IntRange(1), default=3, show_default=True, help="Medians are shown.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path),
              default=Path("benchmark-results/swap"), show_default=True,
              help="Directory for table.txt and results.json.")
def main(size: int, limit: int, clusters: str, algo: str, reps: int, output: Path) -> None:
    """Let a program use more memory than its cgroup allows, with the rest on the kernel's zram and on zramfs
    in turns. A third of its pages is incompressible, a third half random, a third one repeated word; all are
    verified. Other swap areas of the machine stay as they are, below.
    """
    progress = Console(stderr=True)
    runs: list[Run] = []
    try:
        values = [int(word) for word in clusters.split(",")]
    except ValueError:
        raise click.UsageError(
            f"expected numbers separated by commas for --page-cluster, got {clusters!r}") from None
    with told("benchmarks/swap", progress):
        for program in ("mkswap", "swapon", "swapoff"):
            need(program, "util-linux and mount")
        output.mkdir(parents=True, exist_ok=True)
        with Interrupt() as interrupt, _page_cluster() as set_cluster:
            for rep in range(reps):
                for value in values:
                    set_cluster(value)
                    for peer in PEERS if rep % 2 else reversed(PEERS):
                        interrupt.check()
                        progress.print(f"run {rep + 1} of {reps}: {peer}, page-cluster {value}", markup=False)
                        runs.append(_run(peer, value, size, limit, algo))
    facts = machine()
    page = io.StringIO()
    for console in (Console(width=110, file=page, color_system=None), Console(width=110)):
        console.print(
            f"{facts['cpu']}, {facts['cpus']} CPUs, Linux {facts['kernel']}; {size // MIB} MiB in a "
            f"cgroup of {limit // MIB} MiB, {algo}; medians of {reps}", highlight=False, soft_wrap=True)
        console.print(_table(runs, values))
    (output / "table.txt").write_text("".join(f"{line.rstrip()}\n" for line in page.getvalue().splitlines()))
    (output / "results.json").write_text(json.dumps(
        {"machine": facts, "size": size, "limit": limit, "algo": algo, "runs": [asdict(run) for run in runs]},
        indent=1) + "\n")
    click.echo(f"written: {output}/table.txt, results.json")


def _table(runs: list[Run], clusters: list[int]) -> Table:
    table = Table(box=box.SIMPLE)
    for heading in ("page-cluster", "row", *PEERS, "zramfs ÷ zram"):
        table.add_column(heading, justify="right")
    for value in clusters:
        for row, unit in (("out", "MiB/s"), ("back", "MiB/s"), ("random", "pages/s")):
            kernel, ours = (
                statistics.median(
                    getattr(run, row) for run in runs if (run.peer, run.page_cluster) == (peer, value))
                for peer in PEERS
            )
            table.add_row(str(value), f"{row} {unit}", f"{kernel:.0f}", f"{ours:.0f}", f"{ours / kernel:.2f}")
    return table


@contextlib.contextmanager
def _page_cluster() -> Iterator:
    before = PAGE_CLUSTER.read_text()
    try:
        yield lambda value: PAGE_CLUSTER.write_text(str(value))
    finally:
        PAGE_CLUSTER.write_text(before)


def _run(peer: str, cluster: int, size: int, limit: int, algo: str) -> Run:
    with swapping.area(peer, 2 * size, algo), swapping.group(limit) as group:
        words = swapping.within(group, built("swap_fill"), size // MIB, PASSES, "random")
        said = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=False,
                              start_new_session=True)
        if said.returncode:
            raise BenchmarkError(
                f"the program on {peer} ended with {said.returncode}: {said.stdout}{said.stderr}")
    rows = [[float(word) for word in line.split()] for line in said.stdout.splitlines()]
    pages = size // 4096 // 4
    return Run(peer, cluster, size / MIB / rows[0][1], size / MIB / statistics.median(row[2] for row in rows),
               pages / statistics.median(row[3] for row in rows))
