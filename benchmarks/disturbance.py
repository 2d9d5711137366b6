# SPDX-License-Identifier: Apache-2.0
"""What the compactor costs those who use the device while it works.

Each measurement begins with a full, dense device of which a random 30 % were just discarded, and the same
load: once with proactiveness 0 (the compactor never works), once with 100 (it begins when the load does).
The compactor takes a tenth of the time while a device is in use, so on 512 MiB it has work for about half
a second. Reads go over the whole device; writes, which would soon have filled all holes, over its first
half, and what is discarded then is 60 % of the other one.
"""
from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks import discard, load, peers
from benchmarks.load import MIB, PAGE, Row, Zone
from benchmarks.tools import BenchmarkError, Interrupt

ROWS = (
    Row("rand-read-1", "rand", "read", PAGE, 1), Row("rand-read-16", "rand", "read", PAGE, 16),
    Row("seq-read-1", "seq", "read", MIB, 1), Row("seq-write-1", "seq", "write", MIB, 1),
)
OFF, ON = 0, 100
TICKS = os.sysconf("SC_CLK_TCK")
SHARE = 0.30
# fio needs about 0.3 s before its first request.
START_SECONDS = 0.4
IDLE_SECONDS = 5.0
# A run in which the compactor got no CPU, on a busy machine, says nothing about it.
TRIES = 5


@dataclass(frozen=True)
class Run:
    """rate in bytes a second; p50 and p99 of the latency in microseconds; worked: share of the time
    that the compactor spent in slices; compacted, migrated: pool pages freed and pages moved meanwhile;
    elsewhere: share of all CPUs' time that other programs took, 0 to 1."""

    proactiveness: int
    rate: float
    p50: float
    p99: float
    worked: float
    compacted: int
    migrated: int
    elsewhere: float


@dataclass(frozen=True)
class Cost:
    """The runs of one row. p99 and loss are medians over repetitions."""

    row: str
    runs: tuple[Run, ...]

    def median(self, proactiveness: int, value: Callable[[Run], float]) -> float:
        return statistics.median(value(run) for run in self.runs if run.proactiveness == proactiveness)

    @property
    def p99_ratio(self) -> float:
        """With the compactor ÷ without."""
        return self.median(ON, lambda run: run.p99) / self.median(OFF, lambda run: run.p99)

    @property
    def loss(self) -> float:
        """Share of the throughput that is lost to the compactor."""
        return 1 - self.median(ON, lambda run: run.rate) / self.median(OFF, lambda run: run.rate)

    @property
    def elsewhere(self) -> float:
        """What other programs took of the CPUs: the mean of all runs."""
        return statistics.mean(run.elsewhere for run in self.runs)

    def as_json(self) -> dict[str, object]:
        return {"row": self.row, "p99_ratio": self.p99_ratio, "loss": self.loss,
                "runs": [asdict(run) for run in self.runs]}


@dataclass(frozen=True)
class Idle:
    """The daemon when nothing is to be won: CPU seconds, and slices of the compactor, in `seconds`."""

    seconds: float
    cpu: float
    slices: int


def measure(
    zone: Zone, algo: str, seconds: float, reps: int, interrupt: Interrupt, say: Callable[[str], None]
) -> tuple[list[Cost], Idle]:
    """All rows, with and without the compactor in turns, on one device."""
    with peers.serve("zramfs", zone.size, algo) as server:
        peer = peers.Peer("zramfs-file", server, server.path)
        runs: dict[Row, list[Run]] = {row: [] for row in ROWS}
        for rep in range(reps):
            for row in ROWS:
                say(f"run {rep + 1} of {reps}: {row.name}")
                for value in (OFF, ON) if rep % 2 == 0 else (ON, OFF):
                    for _ in range(TRIES):
                        found = _run(peer, row, zone, value, seconds, rep, interrupt)
                        if value == OFF or found.compacted:
                            break
                    runs[row].append(found)
        return [Cost(row.name, tuple(found)) for row, found in runs.items()], _idle(server, interrupt)


def _run(
    peer: peers.Peer, row: Row, zone: Zone, value: int, seconds: float, seed: int, interrupt: Interrupt
) -> Run:
    tree = peer.server.tree
    assert tree is not None
    proactiveness = tree / "memory/proactiveness"
    proactiveness.write_text(f"{OFF}\n")
    load.fill(peer, zone, interrupt)
    (tree / "control").write_text("compact\n")
    loaded, share, holed = zone, SHARE, zone
    if row.direction == "write":
        half = zone.size // 2 // MIB * MIB
        loaded, share = replace(zone, size=half), 2 * SHARE
        holed = replace(zone, offset=half, size=zone.size - half)
    discard.discard_random(peer.path, holed, share, seed, interrupt)
    before, cpus = compaction(peer.server), CpuClock(peer.server)
    begin = threading.Timer(START_SECONDS, proactiveness.write_text, (f"{value}\n",))
    begin.start()
    try:
        took = load.fio(peer, row, loaded, seconds, interrupt)
    finally:
        begin.join()
    after, elsewhere = compaction(peer.server), cpus.elsewhere()
    percentiles = took["clat_ns"]["percentile"]
    return Run(
        value,
        rate=took["io_bytes"] / took["runtime"] * 1000,
        p50=percentiles["50.000000"] / 1000,
        p99=percentiles["99.000000"] / 1000,
        worked=(after["time_ms"] - before["time_ms"]) / took["runtime"],
        compacted=int(after["pages_compacted"] - before["pages_compacted"]),
        migrated=int(after["pages_migrated"] - before["pages_migrated"]),
        elsewhere=elsewhere,
    )


class CpuClock:
    """Tells how much of the CPUs others take from its making on: the server, this process and its
    children are ours, all else on the machine is not."""

    def __init__(self, server: peers.Server) -> None:
        self._server = server
        self._began = self._look()

    def _look(self) -> tuple[float, float, float]:
        """Seconds: of all CPUs, of these not idle, of these ours."""
        # user nice system idle iowait irq softirq steal, in ticks
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        total, idle = sum(ticks) / TICKS, (ticks[3] + ticks[4]) / TICKS
        ours = load.server_cpu(self._server.pids) + sum(os.times()[:4])
        return total, total - idle, ours

    def elsewhere(self) -> float:
        """Share of all CPUs' time, 0 to 1."""
        total, busy, ours = (now - then for now, then in zip(self._look(), self._began, strict=True))
        return max(0.0, busy - ours) / total


def _idle(server: peers.Server, interrupt: Interrupt) -> Idle:
    """With the default of 20, as a device is when its load has ended."""
    assert server.tree is not None
    (server.tree / "memory/proactiveness").write_text("20\n")
    (server.tree / "control").write_text("compact\n")
    end = time.monotonic() + 30
    while _settling(server):
        interrupt.check()
        if time.monotonic() > end:
            raise BenchmarkError("the compactor still works 30 s after the load has ended")
    before, cpu, began = compaction(server), load.server_cpu(server.pids), time.monotonic()
    while time.monotonic() < began + IDLE_SECONDS:
        interrupt.check()
        time.sleep(0.2)
    return Idle(time.monotonic() - began, load.server_cpu(server.pids) - cpu,
                int(compaction(server)["slices"] - before["slices"]))


def _settling(server: peers.Server) -> bool:
    before = compaction(server)
    time.sleep(1.0)
    return compaction(server)["slices"] != before["slices"]


def compaction(server: peers.Server) -> dict[str, float]:
    """memory/compaction."""
    assert server.tree is not None
    lines = (server.tree / "memory/compaction").read_text().splitlines()
    return {name: float(value) for name, value in (line.split() for line in lines)}
