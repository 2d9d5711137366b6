# SPDX-License-Identifier: Apache-2.0
"""What density `auto` costs the users of a device: python -m benchmarks.foreground [MIB]

Two devices hold the same: MIB of cold data (an ext4 image and text, 512), with which `auto` is busy for
minutes, and 256 MiB beside it, in which fio runs the rows of benchmarks/run. One has density off, the other
one auto. Memory is short for both, by a limit little above what they take, so that the steps of auto come at
a sixth of their ages and go on while the device is busy. The two take turns, and the other one is stopped
meanwhile.
"""
from __future__ import annotations

import contextlib
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import density, load, pages, peers
from benchmarks.corpora import corpus
from benchmarks.load import MIB, ROWS, Row, Zone
from benchmarks.packing import control, metric
from benchmarks.tools import Interrupt

USED = 256 * MIB
MODES = ("off", "auto")
TURNS = 4
SECONDS = 3.0
# mem_limit by what is taken: memory is short with less than a tenth of it left. fio needs some of that, since
# the sizes of its pages vary.
MARGIN = 1.08
# A sixth of a minute, until the first step is due, and one look more.
UNTIL_AT_WORK = 12.0


@dataclass(frozen=True)
class Turn:
    """rate: bytes a second; p99: of the latency, us; density_cpu: seconds that the steps of density took."""

    rate: float
    p99: float
    density_cpu: float


def density_cpu(server: peers.Server) -> float:
    """Seconds of all steps so far."""
    return metric(server, "density_cpu_seconds_total")


@contextlib.contextmanager
def stopped(server: peers.Server) -> Iterator[None]:
    """Its daemon stands still."""
    for pid in server.pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in server.pids:
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def filled(mode: str, zones: list[Zone], interrupt: Interrupt) -> Iterator[peers.Server]:
    """A device of that density that holds the zones."""
    size = zones[-1].offset + zones[-1].size
    with density.device(Zone("all", Path(), 0, size), "lz4", "--recomp-algo", "zstd:3") as server:
        for zone in zones:
            load.fill(peers.Peer("zramfs-file", server, server.path), zone, interrupt)
        assert server.tree
        taken = int((server.tree / "zram/mm_stat").read_text().split()[2])
        control(server, f"mem_limit={int(taken * MARGIN)}")
        control(server, f"density={mode}")
        yield server


def turn(server: peers.Server, row: Row, zone: Zone, interrupt: Interrupt) -> Turn:
    before = density_cpu(server)
    took = load.fio(peers.Peer("zramfs-file", server, server.path), row, zone, SECONDS, interrupt)
    latency = took["clat_ns"]["percentile"]["99.000000"] / 1e3
    return Turn(took["bw_bytes"], latency, density_cpu(server) - before)


def measure(
    servers: dict[str, peers.Server], row: Row, zone: Zone, interrupt: Interrupt
) -> dict[str, list[Turn]]:
    found: dict[str, list[Turn]] = {mode: [] for mode in MODES}
    for number in range(TURNS):
        for mode in MODES if number % 2 else reversed(MODES):
            with stopped(servers[MODES[1 - MODES.index(mode)]]):
                found[mode].append(turn(servers[mode], row, zone, interrupt))
    return found


def report(row: Row, found: dict[str, list[Turn]]) -> None:
    rate = {mode: statistics.median(each.rate for each in turns) for mode, turns in found.items()}
    p99 = {mode: statistics.median(each.p99 for each in turns) for mode, turns in found.items()}
    share = sum(each.density_cpu for each in found["auto"]) / (TURNS * SECONDS)
    print(f"{row.name:14} off {rate['off'] / 1e6:7.1f} MB/s, auto {rate['auto'] / 1e6:7.1f}: "
          f"{rate['auto'] / rate['off']:.2f};  p99 {p99['off']:6.0f} us, {p99['auto']:6.0f}: "
          f"{p99['auto'] / p99['off']:.2f};  density took {100 * share:.1f} % of a core", flush=True)


def main() -> None:
    half = (int(sys.argv[1]) if len(sys.argv) > 1 else 512) * MIB // 2
    used = Zone("half", pages.image("half", USED), 2 * half, USED)
    zones = [*(Zone(name, corpus(name, half), number * half, half)
               for number, name in enumerate(("image", "text"))), used]
    with Interrupt() as interrupt, contextlib.ExitStack() as stack:
        print(f"load {os.getloadavg()[0]:.1f}", flush=True)
        servers = {mode: stack.enter_context(filled(mode, zones, interrupt)) for mode in MODES}
        time.sleep(UNTIL_AT_WORK)
        for row in ROWS:
            interrupt.check()
            report(row, measure(servers, row, used, interrupt))


if __name__ == "__main__":
    main()
