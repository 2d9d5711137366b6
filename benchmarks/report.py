# SPDX-License-Identifier: Apache-2.0
"""The results for people: tables (rich) and a picture (matplotlib)."""
from __future__ import annotations

import io
import math
from pathlib import Path

import matplotlib
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.load import Row
from benchmarks.results import Results

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend without a display has to be chosen first)

COLOURS = {
    "zramfs-file": "#1b6ca8", "zramfs-loop": "#7fb2d9", "zram": "#c0392b",
    "nbdkit-file": "#7f8c8d", "nbdkit-loop": "#bfc9ca", "empty-file": "#2e7d32", "empty-loop": "#a5d6a7",
}
WIDTH = 118


def show(results: Results, console: Console) -> None:
    """Print all tables."""
    machine = results.machine
    console.print(f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['ram_mib']} MiB, Linux "
                  f"{machine['kernel']}; medians of {results.options['reps']} runs of "
                  f"{results.options['seconds']} s over {results.options['size_mib']} MiB of each data, "
                  f"{results.options['algo']}", soft_wrap=True, highlight=False)
    for name, why in results.left_out.items():
        console.print(f"left out: {name}: {why}", soft_wrap=True, markup=False, highlight=False)
    if results.cells:
        _titled(console, "Rates: MB/s of 1 MiB requests, thousands a second of 4 KiB requests",
                _rates(results))
        if any(results.ratios()):
            _titled(console, "zramfs ÷ others (nbdkit and empty: on the same mount)", _ratios(results))
        _titled(console, "CPU seconds for 10⁹ bytes: server / server and load generator", _cpu(results))
    if results.memory:
        _titled(console, "Memory for the same data (MiB), and the rate of its first fill (MB/s)",
                _memory(results))
    _titled(console, "Floors", _floors(results))


def text(results: Results) -> str:
    """The tables as plain text."""
    page = io.StringIO()
    show(results, Console(width=WIDTH, file=page, color_system=None))
    return "".join(f"{line.rstrip()}\n" for line in page.getvalue().splitlines())


def _titled(console: Console, title: str, table: Table) -> None:
    console.print()
    console.print(title, style="bold", highlight=False)
    console.print(table)


def _rates(results: Results) -> Table:
    table = _table("data", "row")
    peers = results.peers()
    for peer in peers:
        table.add_column(peer, justify="right")
    for data, row in results.rows():
        cells = [results.cell(row, data, peer) for peer in peers]
        table.add_row(data, row.name, *(_rate(row, cell.rate) if cell else "" for cell in cells))
    return table


def _ratios(results: Results) -> Table:
    found = {(r.data, r.row, r.peer, r.against): r.value for r in results.ratios()}
    table = _table("data", "row")
    pairs = list(dict.fromkeys((peer, against) for _, _, peer, against in found))
    for peer, against in pairs:
        table.add_column(f"{peer} ÷ {against.partition('-')[0]}", justify="right")
    for data, row in results.rows():
        values = [found.get((data, row, *pair)) for pair in pairs]
        table.add_row(data, row.name, *("" if v is None else f"{v:.2f}" for v in values))
    return table


def _cpu(results: Results) -> Table:
    table = _table("data", "row")
    peers = results.peers()
    for peer in peers:
        table.add_column(peer, justify="right")
    for data, row in results.rows():
        shown = []
        for peer in peers:
            cell = results.cell(row, data, peer)
            if cell is None:
                shown.append("")
            else:
                shown.append(f"{_seconds(cell.server_cpu)} / {_seconds(cell.cpu)}")
        table.add_row(data, row.name, *shown)
    return table


def _memory(results: Results) -> Table:
    table = _table("data")
    for column in ("stored", "zramfs empty", "zramfs full", "difference", "kernel pool", "its tables",
                   "zramfs ÷ kernel", "fill zramfs", "fill kernel"):
        table.add_column(column, justify="right")
    for m in results.memory:
        sizes = (m.stored, m.empty, m.full, m.full - m.empty, m.kernel_pool, m.kernel_tables)
        table.add_row(m.data, *(f"{size / 2**20:.1f}" for size in sizes), f"{m.ratio:.3f}",
                      f"{m.zramfs_fill / 1e6:.0f}", f"{m.kernel_fill / 1e6:.0f}")
    return table


def _floors(results: Results) -> Table:
    table = _table("floor")
    for column in ("bound", "worst here", "where", ""):
        table.add_column(column)
    for floor in results.floors():
        verdict = {True: "reached", False: "NOT reached", None: "not measured"}[floor.reached]
        table.add_row(floor.text, f"{'≤' if floor.at_most else '≥'} {floor.bound:g}",
                      "" if floor.value is None else f"{floor.value:.2f}", floor.where, verdict)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _seconds(cpu: float | None) -> str:
    if cpu is None:
        return "–"
    return f"{cpu:.2f}" if cpu < 10 else f"{cpu:.0f}"


def _rate(row: Row, rate: float) -> str:
    if row.pattern == "seq":
        return f"{rate / 1e6:.0f}"
    return f"{rate / row.block / 1e3:.1f}"


def plot(results: Results, target: Path) -> None:
    """One picture, a panel for each kind of data and of pattern; rates on a logarithmic axis, as the
    slowest peer is a hundredth of the fastest."""
    panels = list(dict.fromkeys((data, row.pattern) for data, row in results.rows()))
    figure, axes = plt.subplots(len(panels), 1, figsize=(10, 3.2 * len(panels)), squeeze=False)
    peers = results.peers()
    for (data, pattern), axis in zip(panels, axes[:, 0], strict=True):
        rows = [row for d, row in results.rows() if d == data and row.pattern == pattern]
        lowest = math.inf
        for i, peer in enumerate(peers):
            heights = []
            for row in rows:
                cell = results.cell(row, data, peer)
                unit = 1e6 if pattern == "seq" else row.block * 1e3
                heights.append(cell.rate / unit if cell else math.nan)
            lowest = min([lowest, *(height for height in heights if height == height)])
            places = [x + (i - (len(peers) - 1) / 2) * 0.8 / len(peers) for x in range(len(rows))]
            axis.bar(places, heights, 0.8 / len(peers), label=peer, color=COLOURS[peer])
        axis.set_yscale("log", subs=[2, 5])
        # Bars of a logarithmic axis stand on a power of ten, wherever the data begin.
        axis.set_ylim(bottom=10 ** math.floor(math.log10(lowest / 2)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.set_xticks(range(len(rows)), [row.name for row in rows])
        axis.set_ylabel("MB/s" if pattern == "seq" else "1000 requests/s")
        size = "1 MiB sequential" if pattern == "seq" else "4 KiB random"
        axis.set_title(f"{size}, {'half compressible pages' if data == 'half' else 'pages of an ext4 image'}")
        axis.grid(axis="y", which="major", alpha=0.3)
    axes[0, 0].legend(ncols=len(peers), fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.12))
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    plt.close(figure)
