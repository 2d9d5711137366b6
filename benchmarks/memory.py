# SPDX-License-Identifier: Apache-2.0
"""Memory: what the same data, written once, costs zramfs and kernel zram.

zramfs       resident set of the daemon when full, less that of the same daemon just created
kernel zram  mem_used_total of mm_stat, and 24 bytes a stored page for its tables, which stand outside
"""
from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from benchmarks import load, peers
from benchmarks.tools import BenchmarkError, Interrupt

KERNEL_TABLE_BYTES = 24


@dataclass(frozen=True)
class Memory:
    """All in bytes, but fill rates in bytes a second. empty and full: resident set of the daemon."""

    data: str
    stored: int
    empty: int
    full: int
    kernel_pool: int
    kernel_tables: int
    zramfs_fill: float
    kernel_fill: float

    @property
    def ratio(self) -> float:
        """zramfs ÷ kernel zram."""
        return (self.full - self.empty) / (self.kernel_pool + self.kernel_tables)


def compare(zone: load.Zone, algo: str, interrupt: Interrupt) -> Memory:
    """Fill a fresh device of each kind with the zone's image. Raises LeftOutError without kernel zram."""
    whole = load.Zone(zone.data, zone.image, 0, zone.size)
    with peers.serve("zram", zone.size, algo) as kernel:
        kernel_fill = load.fill(peers.Peer("zram", kernel, kernel.path), whole, interrupt)
        pool, stored = mm_stat(kernel)
    with peers.serve("zramfs", zone.size, algo) as ours:
        empty = resident(ours.pids)
        our_fill = load.fill(peers.Peer("zramfs-file", ours, ours.path), whole, interrupt)
        full = resident(ours.pids)
    return Memory(zone.data, stored, empty, full, pool, stored // load.PAGE * KERNEL_TABLE_BYTES,
                  our_fill.rate, kernel_fill.rate)


def mm_stat(server: peers.Server) -> tuple[int, int]:
    """mem_used_total and orig_data_size of a kernel zram device, in bytes."""
    if server.sysfs is None:
        raise BenchmarkError(f"{server.path} is no kernel zram device")
    columns = [int(column) for column in (server.sysfs / "mm_stat").read_text().split()]
    return columns[2], columns[0]


def resident(pids: tuple[int, ...]) -> int:
    """Bytes of RAM that the processes hold: their resident sets, and every memory file (memfd) they
    have open or mapped once and whole, whether its pages are mapped at the moment or not."""
    private = 0
    files: dict[int, int] = {}
    for pid in pids:
        for name, inode, size in _mappings(pid):
            if name.startswith("/memfd:"):
                files[inode] = files.get(inode, 0) + size
            else:
                private += size
    # What the file itself says replaces the sum of its mappings.
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                if os.readlink(entry).startswith("/memfd:"):
                    found = entry.stat()
                    files[found.st_ino] = found.st_blocks * 512
            except FileNotFoundError:
                continue  # closed meanwhile
    return private + sum(files.values())


def _mappings(pid: int) -> list[tuple[str, int, int]]:
    """(name or "", inode, resident bytes) of each mapping."""
    found: list[tuple[str, int, int]] = []
    name, inode = "", 0
    for line in Path(f"/proc/{pid}/smaps").read_text(errors="surrogateescape").splitlines():
        words = line.split(maxsplit=5)
        if not words[0].endswith(":"):
            name, inode = (words[5] if len(words) > 5 else ""), int(words[4])
        elif words[0] == "Rss:":
            found.append((name, inode, int(words[1]) * 1024))
    return found
