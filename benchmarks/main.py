# SPDX-License-Identifier: Apache-2.0
"""The command line of the benchmark, and the order in which things are measured."""
from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from rich.console import Console

from benchmarks import load, memory, pages, peers, report
from benchmarks.load import ROWS, Row, Sample, Zone
from benchmarks.peers import NAMES, Peer, kind_of
from benchmarks.results import Cell, Results
from benchmarks.tables import told
from benchmarks.tools import BenchmarkError, Interrupt, LeftOutError, need
from zramfs.text import sizes


def selection(names: tuple[str, ...]) -> Callable[[click.Context, click.Parameter, str | None], list[str]]:
    """A callback for an option that takes names, or beginnings of names, separated by commas."""

    def choose(context: click.Context, option: click.Parameter, value: str | None) -> list[str]:
        if value is None:
            return list(names)
        chosen: set[str] = set()
        for word in value.split(","):
            # zram is a name, not the beginning of zramfs-file.
            hits = {n for n in names if n == word} or {n for n in names if n.startswith(word + "-")}
            if not hits:
                raise click.BadParameter(f"{word!r} is none of {' '.join(names)}, nor the beginning of one")
            chosen |= hits
        return [name for name in names if name in chosen]

    return choose


def size_option(context: click.Context, option: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    try:
        size = sizes.parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    if size < 8 << 20 or size % (1 << 20):
        raise click.BadParameter(f"expected whole MiB, at least 8, not {size} bytes")
    return size


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="About 3 minutes: --size 256M --reps 1 --seconds 1.")
@click.option("--size", callback=size_option, help="Bytes of each kind of data on each peer.  [512M]")
@click.option("--reps", type=click.IntRange(1), help="Repetitions; the tables show medians.  [3]")
@click.option("--seconds", type=click.FloatRange(0.1), help="Length of one measurement.  [2]")
@click.option("--peers", "names", callback=selection(NAMES), help=f"Which ones: {','.join(NAMES)}; "
              "zramfs means both of its, and so on.  [all]")
@click.option("--rows", callback=selection(tuple(row.name for row in ROWS)),
              help=f"Which ones: {','.join(row.name for row in ROWS)}; rand means all of rand-*.  [all]")
@click.option("--data", callback=selection(pages.DATA), help="half, real: see README.md.  [both]")
@click.option("--algo", default="lz4", show_default=True,
              help="Of zramfs and kernel zram, as in zramfs create.")
@click.option("--memory/--no-memory", "with_memory", default=True, help="Compare memory, too.  [yes]")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), default=Path("benchmark-results"),
              show_default=True, help="Directory for table.txt, results.json and plot.png.")
def main(quick: bool, size: int | None, reps: int | None, seconds: float | None, names: list[str],
         rows: list[str], data: list[str], algo: str, with_memory: bool, output: Path) -> None:
    """Compare zramfs with kernel zram, nbdkit's compressed memory disk, and an empty FUSE server."""
    size = size or (256 << 20 if quick else 512 << 20)
    reps = reps or (1 if quick else 3)
    seconds = seconds or (1.0 if quick else 2.0)
    results = Results(machine(), {
        "size_mib": size >> 20, "reps": reps, "seconds": seconds, "algo": algo, "peers": names, "rows": rows,
        "data": data, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    })
    progress = Console(stderr=True)
    with told("benchmarks/run", progress):
        output.mkdir(parents=True, exist_ok=True)
        with Interrupt() as interrupt:
            measure(results, [r for r in ROWS if r.name in rows], names, data, size, reps, seconds, algo,
                    interrupt, progress)
            if with_memory and not {"zramfs", "zram"} <= {kind_of(name) for name in names}:
                results.left_out["memory"] = "it compares zramfs with zram, which --peers does not name both"
            elif with_memory:
                compare_memory(results, data, size, algo, interrupt, progress)
    write(results, output)
    screen = Console()
    screen.width = max(screen.width, report.WIDTH)
    report.show(results, screen)
    click.echo(f"written: {output}/table.txt, results.json" + (", plot.png" if results.cells else ""))


def measure(results: Results, rows: list[Row], names: list[str], data: list[str], size: int, reps: int,
            seconds: float, algo: str, interrupt: Interrupt, progress: Console) -> None:
    """All rows on all peers. Within a row the peers take turns, and each turn begins with another one,
    so that a machine that changes its speed treats all alike."""
    need("fio", "fio")
    zones = [Zone(kind, image(kind, size, progress), i * size, size) for i, kind in enumerate(data)]
    samples: dict[tuple[str, Row, str], list[Sample]] = {}
    with everybody(names, size * len(zones), algo, results.left_out) as present:
        for peer in present:
            progress.print(f"{peer.name}: {peer.path}", markup=False, soft_wrap=True)
        interrupt.check()
        # Two peers of one server share its storage.
        for peer in {peer.server.kind: peer for peer in present}.values():
            for zone in zones:
                progress.print(f"filling {peer.server.kind} with {zone.data}", markup=False)
                load.fill(peer, zone, interrupt)
        turn = 0
        for rep in range(reps):
            for zone in zones:
                for row in rows:
                    progress.print(f"run {rep + 1} of {reps}: {zone.data} {row.name}", markup=False)
                    for i in range(len(present)):
                        peer = present[(i + turn) % len(present)]
                        interrupt.check()
                        samples.setdefault((zone.data, row, peer.name), []).append(
                            load.measure(peer, row, zone, seconds, interrupt))
                    turn += 1
        results.cells += [
            Cell(row, zone.data, peer.name, tuple(samples[zone.data, row, peer.name]))
            for zone in zones for row in rows for peer in present
        ]


def compare_memory(results: Results, data: list[str], size: int, algo: str, interrupt: Interrupt,
                   progress: Console) -> None:
    """Memory of zramfs and kernel zram with the same data, on fresh devices of their own."""
    for kind in data:
        interrupt.check()
        progress.print(f"memory: {kind}", markup=False)
        try:
            zone = Zone(kind, image(kind, size, progress), 0, size)
            results.memory.append(memory.compare(zone, algo, interrupt))
        except LeftOutError as reason:
            results.left_out["memory"] = str(reason)
            return


def image(kind: str, size: int, progress: Console) -> Path:
    progress.print(f"data: {kind}, {size >> 20} MiB (made once, then kept)", markup=False)
    return pages.image(kind, size)


@contextlib.contextmanager
def everybody(names: list[str], size: int, algo: str, left_out: dict[str, str]) -> Iterator[list[Peer]]:
    """All peers that this machine can have, up at once and idle but the one that is measured; the
    others are entered into left_out with the reason."""
    found: dict[str, Peer] = {}
    with contextlib.ExitStack() as stack:
        for kind in dict.fromkeys(kind_of(name) for name in names):
            wanted = [name for name in names if kind_of(name) == kind]
            try:
                server = stack.enter_context(peers.serve(kind, size, algo))
            except LeftOutError as reason:
                left_out.update(dict.fromkeys(wanted, str(reason)))
                continue
            for name in wanted:
                try:
                    looped = name.endswith("-loop")
                    path = stack.enter_context(peers.loop(server.path)) if looped else server.path
                except LeftOutError as reason:
                    left_out[name] = str(reason)
                    continue
                found[name] = Peer(name, server, path)
        if not found:
            reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
            raise BenchmarkError(f"no peer is left to measure ({reasons})")
        yield [found[name] for name in names if name in found]


def machine() -> dict[str, str | int]:
    cpu = "unknown CPU"
    with contextlib.suppress(OSError, StopIteration):
        cpu = next(line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                   if line.startswith("model name"))
    return {"cpu": cpu, "cpus": os.cpu_count() or 0, "ram_mib": sizes.total_ram() >> 20,
            "kernel": platform.release()}


def write(results: Results, output: Path) -> None:
    """table.txt, results.json and, if any row was measured, plot.png."""
    (output / "table.txt").write_text(report.text(results), encoding="utf-8")
    (output / "results.json").write_text(json.dumps(results.as_json(), indent=1) + "\n", encoding="utf-8")
    if results.cells:
        report.plot(results, output / "plot.png")
