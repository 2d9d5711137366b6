# SPDX-License-Identifier: Apache-2.0
"""How fast pages of units are read through a mount: python -m benchmarks.units_mounted [MIB]

Of the corpora of benchmarks/density. The pages are stored with lz4, and read; then all of them are packed
into units, and read again. A cold page is one of a group of which nothing has been read before. All reads
have O_DIRECT, and one is under way at a time.
"""
from __future__ import annotations

import contextlib
import mmap
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import density, load, peers
from benchmarks.corpora import CORPORA, corpus
from benchmarks.load import PAGE, Zone
from benchmarks.packing import AUTO, MAX, Packing, control, pack
from benchmarks.tools import Interrupt

MIB = 1 << 20
GROUP = 16 * PAGE
MOST_COLD = 5000
PASSES = 5
SEED = 6


@dataclass(frozen=True)
class Reads:
    """cold, cold_last: us, median and 99th percentile; in_order: bytes a second, the best of PASSES; cpu:
    seconds of the daemon for 10^9 bytes in order; unpacked: how often a unit was unpacked for one pass."""

    cold: float
    cold_last: float
    in_order: float
    cpu: float
    unpacked: float


@contextlib.contextmanager
def direct(disk: Path) -> Iterator[int]:
    fd = os.open(disk, os.O_RDONLY | os.O_DIRECT)
    try:
        yield fd
    finally:
        os.close(fd)


def cold(disk: Path, size: int) -> list[float]:
    """us of each of at most MOST_COLD reads: one random page of each group, in a random order."""
    rng, took = random.Random(SEED), []
    groups = rng.sample(range(size // GROUP), min(size // GROUP, MOST_COLD))
    with direct(disk) as fd, mmap.mmap(-1, PAGE) as page:
        for group in groups:
            at = group * GROUP + rng.randrange(GROUP // PAGE) * PAGE
            began = time.perf_counter()
            os.preadv(fd, [page], at)
            took.append((time.perf_counter() - began) * 1e6)
    return took


def in_order(disk: Path, size: int) -> float:
    """Bytes a second, by 1 MiB."""
    with direct(disk) as fd, mmap.mmap(-1, MIB) as buffer:
        began = time.perf_counter()
        for at in range(0, size, MIB):
            os.preadv(fd, [buffer], at)
        return size / (time.perf_counter() - began)


def measure(server: peers.Server, size: int) -> Reads:
    # Pages that are read twice since they were marked come out of their units.
    control(server, "idle=all")
    took = cold(server.path, size)
    rates, before, unpacked = [], load.server_cpu(server.pids), of_units(server)["unpacked"]
    for _ in range(PASSES):
        control(server, "idle=all")
        rates.append(in_order(server.path, size))
    cpu = (load.server_cpu(server.pids) - before) / (PASSES * size) * 1e9
    now = of_units(server)
    unpacked = (now["unpacked"] - unpacked) / PASSES / max(1, now["units"])
    return Reads(statistics.median(took), statistics.quantiles(took, n=100)[98], max(rates), cpu, unpacked)


def of_units(server: peers.Server) -> dict[str, int]:
    assert server.tree is not None
    lines = (server.tree / "memory/units").read_text().splitlines()
    return {name: int(value) for name, value in map(str.split, lines)}


def report(name: str, size: int, interrupt: Interrupt) -> None:
    zone = Zone(name, corpus(name, size), 0, size)
    for packing in (None, Packing(AUTO), Packing(MAX)):
        with density.device(zone, "lz4", *(packing.options if packing else ())) as server:
            load.fill(peers.Peer("zramfs-file", server, server.path), zone, interrupt)
            if packing:
                pack(server, packing, interrupt)
            found = measure(server, size)
        how = f"units zstd:{packing.level}" if packing else "lz4"
        unpacked = f", each unit unpacked {found.unpacked:.2f} times" if packing else ""
        print(f"{name:8} {how:13} a cold page {found.cold:.0f} us (p99 {found.cold_last:.0f}), in order "
              f"{found.in_order / 1e9:.2f} GB/s, daemon {found.cpu:.2f} s a GB{unpacked}", flush=True)


def main() -> None:
    size = (int(sys.argv[1]) if len(sys.argv) > 1 else 128) * MIB
    with Interrupt() as interrupt:
        print(f"load {os.getloadavg()[0]:.1f}", flush=True)
        for name in CORPORA:
            interrupt.check()
            report(name, size, interrupt)


if __name__ == "__main__":
    main()
