# SPDX-License-Identifier: Apache-2.0
"""What was measured, and what follows from it: medians, ratios, floors. No input, no output."""
from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

from benchmarks.load import Row, Sample
from benchmarks.memory import Memory
from benchmarks.peers import kind_of


@dataclass(frozen=True)
class Cell:
    """The samples of one row, one kind of data, one peer; one sample a repetition."""

    row: Row
    data: str
    peer: str
    samples: tuple[Sample, ...]

    @property
    def rate(self) -> float:
        """Median, bytes a second."""
        return statistics.median(sample.rate for sample in self.samples)

    @property
    def server_cpu(self) -> float | None:
        """CPU seconds of the server's processes for each 10^9 bytes; None if it has no processes."""
        if kind_of(self.peer) == "zram":
            return None
        return self._per_gb(lambda sample: sample.server_cpu)

    @property
    def cpu(self) -> float:
        """CPU seconds of server and load generator for each 10^9 bytes."""
        return self._per_gb(lambda sample: sample.server_cpu + sample.client_cpu)

    def _per_gb(self, cpu: Callable[[Sample], float]) -> float:
        return sum(cpu(s) for s in self.samples) / sum(s.bytes for s in self.samples) * 1e9


@dataclass(frozen=True)
class Ratio:
    """A zramfs peer's median ÷ that of the peer it is held against."""

    row: Row
    data: str
    peer: str
    against: str
    value: float


@dataclass(frozen=True)
class Floor:
    """What must hold. value: the worst of what was measured, None if nothing was; where: its row."""

    text: str
    bound: float
    at_most: bool
    value: float | None
    where: str

    @property
    def reached(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.bound if self.at_most else self.value >= self.bound


@dataclass
class Results:
    """options: as the run was started; left_out: peer or part to the reason."""

    machine: dict[str, str | int]
    options: dict[str, object]
    left_out: dict[str, str] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)

    def cell(self, row: Row, data: str, peer: str) -> Cell | None:
        return next((c for c in self.cells if (c.row, c.data, c.peer) == (row, data, peer)), None)

    def peers(self) -> list[str]:
        return list(dict.fromkeys(cell.peer for cell in self.cells))

    def rows(self) -> list[tuple[str, Row]]:
        """(data, row) in the order of measuring."""
        return list(dict.fromkeys((cell.data, cell.row) for cell in self.cells))

    def ratios(self) -> Iterator[Ratio]:
        """Each zramfs cell against kernel zram, and against nbdkit and empty on the same mount."""
        for cell in self.cells:
            if kind_of(cell.peer) != "zramfs":
                continue
            mount = cell.peer.partition("-")[2]
            for against in ("zram", f"empty-{mount}", f"nbdkit-{mount}"):
                other = self.cell(cell.row, cell.data, against)
                if other is not None:
                    yield Ratio(cell.row, cell.data, cell.peer, against, cell.rate / other.rate)

    def floors(self) -> list[Floor]:
        """The floors of issue 2: a report of what this run reached, never a verdict by itself."""
        found = list(self.ratios())
        return [
            _least("sequential write through loop ÷ kernel zram", 0.8, [
                r for r in found if r.peer == "zramfs-loop" and r.against == "zram"
                and (r.row.pattern, r.row.direction) == ("seq", "write")]),
            _least("sequential read through loop ÷ kernel zram", 0.5, [
                r for r in found if r.peer == "zramfs-loop" and r.against == "zram"
                and (r.row.pattern, r.row.direction) == ("seq", "read")]),
            _least("4 KiB random read at depth 16 ÷ empty C server", 0.7, [
                r for r in found if kind_of(r.against) == "empty" and r.row.name == "rand-read-16"]),
            _least("every row ÷ nbdkit", 3.0, [r for r in found if kind_of(r.against) == "nbdkit"]),
            _memory_floor(self.memory),
        ]

    def as_json(self) -> dict[str, object]:
        """Everything, in plain types: rates in bytes a second, CPU in seconds for each 10^9 bytes."""
        return {
            "machine": self.machine,
            "options": self.options,
            "left_out": self.left_out,
            "cells": [
                {
                    "row": cell.row.name, "data": cell.data, "peer": cell.peer,
                    "block": cell.row.block, "depth": cell.row.depth,
                    "bytes_per_second": cell.rate, "requests_per_second": cell.rate / cell.row.block,
                    "server_cpu_s_per_gb": cell.server_cpu, "cpu_s_per_gb": cell.cpu,
                    "samples": [asdict(sample) for sample in cell.samples],
                }
                for cell in self.cells
            ],
            "ratios": [
                {"row": r.row.name, "data": r.data, "peer": r.peer, "against": r.against, "ratio": r.value}
                for r in self.ratios()
            ],
            "memory": [asdict(memory) | {"ratio": memory.ratio} for memory in self.memory],
            "floors": [asdict(floor) | {"reached": floor.reached} for floor in self.floors()],
        }


def _least(text: str, bound: float, ratios: list[Ratio]) -> Floor:
    if not ratios:
        return Floor(text, bound, False, None, "")
    worst = min(ratios, key=lambda ratio: ratio.value)
    return Floor(text, bound, False, worst.value, f"{worst.row.name}, {worst.data}, {worst.peer}")


def _memory_floor(found: list[Memory]) -> Floor:
    text = "memory ÷ kernel zram with its tables"
    if not found:
        return Floor(text, 1.05, True, None, "")
    worst = max(found, key=lambda memory: memory.ratio)
    return Floor(text, 1.05, True, worst.ratio, worst.data)
