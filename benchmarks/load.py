# SPDX-License-Identifier: Apache-2.0
"""One measurement: a row of the table, on one peer, with one kind of data.

fio makes all reads and the writes of its own half compressible data. Writes of real pages are made
by benchmarks/pagewrite.c, since fio cannot write given data; it uses the same Linux AIO.
"""
from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers import Peer
from benchmarks.tools import BenchmarkError, Interrupt, built, need

MIB = 1 << 20
PAGE = 4096
# Above the time that is measured: fio needs 0.3 s to start, a slow peer to finish what is under way.
GRACE_SECONDS = 120.0


@dataclass(frozen=True)
class Row:
    """block: bytes a request; depth: requests under way."""

    name: str
    pattern: str  # "seq" or "rand"
    direction: str  # "read" or "write"
    block: int
    depth: int


ROWS = tuple(
    Row(f"{pattern}-{direction}-{depth}", pattern, direction, block, depth)
    for pattern, block in (("seq", MIB), ("rand", PAGE))
    for direction in ("write", "read")
    for depth in (1, 16)
)


@dataclass(frozen=True)
class Zone:
    """The part of each device that holds one kind of data; offset and size in bytes."""

    data: str
    image: Path
    offset: int
    size: int


@dataclass(frozen=True)
class Sample:
    """One run of one row. server_cpu: CPU time (user and system, seconds) of the peer's processes;
    client_cpu: of the load generator, which for kernel zram includes the compression."""

    bytes: int
    seconds: float
    server_cpu: float
    client_cpu: float

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.bytes / self.seconds


def measure(peer: Peer, row: Row, zone: Zone, seconds: float, interrupt: Interrupt) -> Sample:
    """Run one row for `seconds`. Raises BenchmarkError if an I/O fails, Interrupted on Ctrl-C."""
    before = server_cpu(peer.server.pids)
    if row.direction == "write" and zone.data == "real":
        took = _pagewrite(peer, zone, row.block, row.depth, row.pattern, seconds, interrupt)
    else:
        took = _fio(peer, row, zone, seconds, interrupt)
    return _sample(peer, took, before)


def fill(peer: Peer, zone: Zone, interrupt: Interrupt) -> Sample:
    """Write the zone's image once, from its beginning to its end, by 1 MiB at depth 16."""
    before = server_cpu(peer.server.pids)
    took = _pagewrite(peer, zone, MIB, 16, "once", GRACE_SECONDS, interrupt)
    return _sample(peer, took, before)


def _sample(peer: Peer, took: dict[str, float], cpu_before: float) -> Sample:
    spent = server_cpu(peer.server.pids) - cpu_before
    return Sample(int(took["bytes"]), took["seconds"], spent, took["cpu"])


def server_cpu(pids: tuple[int, ...]) -> float:
    """CPU time of the processes so far, in seconds, to 1/100."""
    ticks = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            raise BenchmarkError(f"a server (process {pid}) has ended in the middle of the run") from None
        # The second field, the name in parentheses, may contain spaces.
        fields = text[text.rindex(")") + 2:].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _fio(peer: Peer, row: Row, zone: Zone, seconds: float, interrupt: Interrupt) -> dict[str, float]:
    took = fio(peer, row, zone, seconds, interrupt)
    return {"bytes": took["io_bytes"], "seconds": took["runtime"] / 1000, "cpu": took["cpu"]}


def fio(peer: Peer, row: Row, zone: Zone, seconds: float, interrupt: Interrupt) -> dict[str, Any]:
    """What fio's JSON has on the direction of the row, and as "cpu" the CPU seconds of fio itself."""
    pattern = row.direction if row.pattern == "seq" else "rand" + row.direction
    output = _run([
        need("fio", "fio"), "--name=row", f"--filename={peer.path}", "--direct=1", "--ioengine=libaio",
        f"--rw={pattern}", f"--bs={row.block}", f"--iodepth={row.depth}", f"--offset={zone.offset}",
        f"--size={zone.size}", "--time_based", f"--runtime={int(seconds * 1000)}ms", "--norandommap",
        "--randrepeat=0", "--refill_buffers", "--buffer_compress_percentage=50", "--fallocate=none",
        "--invalidate=0", "--thread", "--output-format=json",
    ], seconds, interrupt)
    # Warnings may stand before the JSON.
    job = json.loads(output[output.index("{"):])["jobs"][0]
    took: dict[str, Any] = job[row.direction]
    if job["error"] or not took["io_bytes"]:
        raise BenchmarkError(f"fio on {peer.path} ({row.name}) moved {took['io_bytes']} bytes and ended "
                             f"with error {job['error']}")
    return took | {"cpu": (job["usr_cpu"] + job["sys_cpu"]) / 100 * took["runtime"] / 1000}


def _pagewrite(peer: Peer, zone: Zone, block: int, depth: int, how: str, seconds: float,
               interrupt: Interrupt) -> dict[str, float]:
    took: dict[str, float] = json.loads(_run(
        [str(built("pagewrite")), str(peer.path), str(zone.image), str(zone.offset), str(block), str(depth),
         how, str(seconds)], seconds, interrupt))
    return took


def _run(words: list[str], seconds: float, interrupt: Interrupt) -> str:
    """Like tools.command, but within reach of Ctrl-C: the load ends at once, and then everything."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds + GRACE_SECONDS,
                              stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"`{' '.join(words)}` did not end within "
                             f"{seconds + GRACE_SECONDS:.0f} s") from None
    interrupt.check()
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()[:2000]
        raise BenchmarkError(f"`{' '.join(words)}` ended with status {done.returncode}: {said}")
    return done.stdout
