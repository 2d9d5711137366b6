# SPDX-License-Identifier: Apache-2.0
"""What the same data costs in memory, stored in different ways: all of it, with tables and overhead.

Kernel zram counts as in memory.py. A zramfs device counts by the resident set of its daemon, less that of the
same daemon just created.
"""
from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import load, memory, peers, returned
from benchmarks.load import Zone
from benchmarks.tools import Interrupt

BASE = "zram lz4"
# A dictionary takes a minute to train, and recompression at level 9 takes 0.1 ms a page.
LONG_SECONDS = 600.0


@dataclass(frozen=True)
class Density:
    """One way to store one corpus. bytes: of the data, all pages; resident: of RAM that it costs; cpu:
    seconds of all the processes until it is stored so."""

    way: str
    data: str
    bytes: int
    resident: int
    cpu: float

    @property
    def share(self) -> float:
        """Memory used ÷ data."""
        return self.resident / self.bytes

    @property
    def page_us(self) -> float:
        """Microseconds of CPU a page."""
        return self.cpu * 1e6 / (self.bytes / load.PAGE)

    def as_json(self) -> dict[str, object]:
        return asdict(self) | {"share": self.share, "page_us": self.page_us}


def _kernel(way: str, zone: Zone, interrupt: Interrupt) -> Density:
    with peers.serve("zram", zone.size, way.partition(" ")[2]) as server:
        took = load.fill(peers.Peer("zram", server, server.path), zone, interrupt)
        used, stored = memory.mm_stat(server)
    tables = stored // load.PAGE * memory.KERNEL_TABLE_BYTES
    return Density(way, zone.data, zone.size, used + tables, took.client_cpu)


def _ours(way: str, zone: Zone, interrupt: Interrupt) -> Density:
    return _stored(way, zone, way.partition(" ")[2], (), interrupt)


def _recompressed(way: str, zone: Zone, interrupt: Interrupt) -> Density:
    """With a dictionary trained on another device with the same data, whose CPU time is not counted."""
    with tempfile.TemporaryDirectory(prefix="zramfs-benchmark-dictionary-") as scratch:
        dictionary = Path(scratch, "dictionary")
        with peers.serve("zramfs", zone.size, "lz4") as server:
            load.fill(peers.Peer("zramfs-file", server, server.path), zone, interrupt)
            peers.cli("train", server.tree, "--output", dictionary, "--algo", "zstd:9", seconds=LONG_SECONDS)
        # No file, no gain: plain recompression is then the best there is.
        known = f":dict={dictionary}" if dictionary.exists() else ""
        return _stored(way, zone, "lz4", ("--recomp-algo", f"zstd:9{known}"), interrupt)


def _stored(way: str, zone: Zone, algo: str, options: tuple[str, ...], interrupt: Interrupt) -> Density:
    with tempfile.TemporaryDirectory(prefix="zramfs-benchmark-", ignore_cleanup_errors=True) as scratch, \
            peers.zramfs(Path(scratch), zone.size, algo, *options) as server:
        empty = memory.resident(server.pids)
        before = load.server_cpu(server.pids)
        took = load.fill(peers.Peer("zramfs-file", server, server.path), zone, interrupt)
        if options:
            returned.attribute(server, "recompress", "priority=1")
            returned.attribute(server, "compact", "1")
        cpu = took.client_cpu + load.server_cpu(server.pids) - before
        return Density(way, zone.data, zone.size, memory.resident(server.pids) - empty, cpu)


WAYS: dict[str, Callable[[str, Zone, Interrupt], Density]] = {
    BASE: _kernel,
    "zram lzo-rle": _kernel,
    "zram zstd": _kernel,
    "zramfs lz4": _ours,
    "zramfs zstd:3": _ours,
    "zramfs lz4, then zstd:9 with a dictionary": _recompressed,
}


def measure(way: str, zone: Zone, interrupt: Interrupt) -> Density:
    """Raises LeftOutError when this machine cannot have it."""
    return WAYS[way](way, zone, interrupt)
