# SPDX-License-Identifier: Apache-2.0
"""What the same data costs in memory, stored in different ways: all of it, with tables and overhead.

Kernel zram counts as in memory.py. A zramfs device counts by the resident set of its daemon, less that of the
same daemon just created.
"""
from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import load, memory, peers, returned, simulated
from benchmarks.in_use import in_use
from benchmarks.load import Zone
from benchmarks.packing import APART_SECONDS, AUTO, MAX, Packing, come_to_rest, control, pack
from benchmarks.tools import Interrupt, LeftOutError

BASE = "zram lz4"
KERNEL_ZSTD = "zram zstd"
IN_USE = 0.20
# A dictionary takes a minute to train, and recompression at level 9 takes 0.1 ms a page.
LONG_SECONDS = 600.0


@dataclass(frozen=True)
class Density:
    """One way to store one corpus. bytes: of the data, all pages; resident: of RAM that it costs; cpu:
    seconds of all the processes until it is stored so, None where they do other work beside."""

    way: str
    data: str
    bytes: int
    resident: int
    cpu: float | None

    @property
    def share(self) -> float:
        """Memory used ÷ data."""
        return self.resident / self.bytes

    @property
    def page_us(self) -> float | None:
        """Microseconds of CPU a page."""
        return None if self.cpu is None else self.cpu * 1e6 / (self.bytes / load.PAGE)

    def as_json(self) -> dict[str, object]:
        return asdict(self) | {"share": self.share, "page_us": self.page_us}


def _kernel(way: str, zone: Zone, interrupt: Interrupt) -> Density:
    with peers.serve("zram", zone.size, way.partition(" ")[2]) as server:
        took = load.fill(peers.Peer("zram", server, server.path), zone, interrupt)
        used, stored = memory.mm_stat(server)
    tables = stored // load.PAGE * memory.KERNEL_TABLE_BYTES
    return Density(way, zone.data, zone.size, used + tables, took.client_cpu)


def _kernel_zstd(way: str, zone: Zone, interrupt: Interrupt) -> Density:
    """Measured where the kernel offers zstd, and otherwise worked out, under a name that says so."""
    try:
        return _kernel(way, zone, interrupt)
    except LeftOutError:
        found = simulated.kernel_zram(zone.image, zone.size, "zstd", interrupt)
        return Density(f"{way}, simulated", zone.data, zone.size, found.pool + found.tables, found.cpu)


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
    with device(zone, algo, *options) as server:
        empty = memory.resident(server.pids)
        before = load.server_cpu(server.pids)
        took = load.fill(peers.Peer("zramfs-file", server, server.path), zone, interrupt)
        if options:
            returned.attribute(server, "recompress", "priority=1")
            returned.attribute(server, "compact", "1")
        cpu = took.client_cpu + load.server_cpu(server.pids) - before
        return Density(way, zone.data, zone.size, memory.resident(server.pids) - empty, cpu)


def _packed(way: str, zone: Zone, interrupt: Interrupt) -> Density:
    """At rest, with all of it packed."""
    packing = PACKINGS[way]
    return _at_rest(way, zone, packing, lambda server: pack(server, packing, interrupt), interrupt)


def _at_max(way: str, zone: Zone, interrupt: Interrupt) -> Density:
    """At rest, as density `max` leaves it."""
    return _at_rest(way, zone, Packing(MAX), lambda server: come_to_rest(server, interrupt), interrupt)


def _at_rest(
    way: str, zone: Zone, packing: Packing, settle: Callable[[peers.Server], None], interrupt: Interrupt
) -> Density:
    """settle: has the device make itself small, and returns when it is done."""
    with device(zone, "lz4", *packing.options) as server:
        empty = memory.resident(server.pids)
        before = load.server_cpu(server.pids)
        took = load.fill(peers.Peer("zramfs-file", server, server.path), zone, interrupt)
        settle(server)
        cpu = took.client_cpu + load.server_cpu(server.pids) - before
        return Density(way, zone.data, zone.size, memory.resident(server.pids) - empty, cpu)


def _in_use(way: str, zone: Zone, interrupt: Interrupt) -> Density:
    """The steps of density `auto`, while a random part of the pages is in use before, meanwhile and after."""
    packing = Packing(AUTO, dense=True)
    with device(zone, "lz4", *packing.options) as server:
        control(server, "access_times=on")
        empty = memory.resident(server.pids)
        load.fill(peers.Peer("zramfs-file", server, server.path), zone, interrupt)
        filled = time.monotonic()
        time.sleep(APART_SECONDS)
        with in_use(server.path, zone, IN_USE) as use:
            use.wait_rounds(1)
            pack(server, packing, interrupt, filled)
            use.wait_rounds(1)
            return Density(way, zone.data, zone.size, memory.resident(server.pids) - empty, None)


@contextlib.contextmanager
def device(zone: Zone, algo: str, *options: str) -> Iterator[peers.Server]:
    """A zramfs device as large as the zone; options: of `zramfs create`."""
    with tempfile.TemporaryDirectory(prefix="zramfs-benchmark-", ignore_cleanup_errors=True) as scratch, \
            peers.zramfs(Path(scratch), zone.size, algo, *options) as server:
        yield server


PACKINGS = {
    f"zramfs, units zstd:{AUTO}": Packing(AUTO),
    f"zramfs, units zstd:{MAX}": Packing(MAX),
}
WAYS: dict[str, Callable[[str, Zone, Interrupt], Density]] = {
    BASE: _kernel,
    "zram lzo-rle": _kernel,
    KERNEL_ZSTD: _kernel_zstd,
    "zramfs lz4": _ours,
    "zramfs zstd:3": _ours,
    "zramfs lz4, then zstd:9 with a dictionary": _recompressed,
    **dict.fromkeys(PACKINGS, _packed),
    "zramfs, density max": _at_max,
    f"zramfs, density auto, {IN_USE:.0%} in use": _in_use,
}


def measure(way: str, zone: Zone, interrupt: Interrupt) -> Density:
    """Raises LeftOutError when this machine cannot have it."""
    return WAYS[way](way, zone, interrupt)
