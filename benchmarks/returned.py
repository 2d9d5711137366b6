# SPDX-License-Identifier: Apache-2.0
"""Memory given back after a random part of a full device was discarded, with nobody asking for it."""
from __future__ import annotations

import time
from dataclasses import asdict, dataclass

from benchmarks import discard, load, memory, peers
from benchmarks.load import Zone
from benchmarks.tools import BenchmarkError, Interrupt

SHARE = 0.30
SECONDS = (0.0, 1.0, 2.0, 5.0, 10.0)  # after the last discard
SEED = 30


@dataclass(frozen=True)
class Point:
    """seconds after the last discard, or None: after `compact`. used: bytes of the pool; resident:
    bytes of RAM that the device costs: zramfs' daemon, less what it had when empty; of kernel zram
    the same as used."""

    seconds: float | None
    used: int
    resident: int


@dataclass(frozen=True)
class Course:
    """One device. discarding: seconds that the discards took."""

    peer: str
    data: str
    stored: int
    full: Point
    discarding: float
    points: tuple[Point, ...]

    def returned(self, point: Point) -> float:
        """Share of the memory of the full device that the OS has back, 0 to 1."""
        return 1 - point.resident / self.full.resident

    @property
    def unasked(self) -> float:
        """What is given back before anybody asks for it."""
        return self.returned(self.points[len(SECONDS) - 1])

    def as_json(self) -> dict[str, object]:
        return asdict(self) | {
            "returned": [{"seconds": point.seconds, "share": self.returned(point)} for point in self.points]
        }


def measure(kind: str, zone: Zone, algo: str, interrupt: Interrupt) -> Course:
    """kind: "zramfs" or "zram". Raises LeftOutError when this machine cannot have it."""
    with peers.serve(kind, zone.size, algo) as server:
        empty = 0 if kind == "zram" else memory.resident(server.pids)

        def look(seconds: float | None) -> Point:
            used = pool_used(server)
            return Point(seconds, used, used if kind == "zram" else memory.resident(server.pids) - empty)

        load.fill(peers.Peer(kind, server, server.path), zone, interrupt)
        full = look(0.0)
        took = discard.discard_random(server.path, zone, SHARE, SEED, interrupt)
        end = time.monotonic()
        points = []
        for seconds in SECONDS:
            while (left := end + seconds - time.monotonic()) > 0:
                interrupt.check()
                time.sleep(min(left, 0.2))
            points.append(look(seconds))
        attribute(server, "compact", "1")
        points.append(look(None))
        return Course(kind, zone.data, zone.size, full, took, tuple(points))


def pool_used(server: peers.Server) -> int:
    """mem_used_total, in bytes."""
    return int(attribute(server, "mm_stat").split()[2])


def attribute(server: peers.Server, name: str, value: str | None = None) -> str:
    """Reads or writes a file of the kernel's sysfs directory or of our twin of it."""
    folder = server.sysfs or (server.tree / "zram" if server.tree else None)
    if folder is None:
        raise BenchmarkError(f"{server.path} has no attributes")
    if value is None:
        return (folder / name).read_text()
    (folder / name).write_text(value)
    return value
