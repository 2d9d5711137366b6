# SPDX-License-Identifier: Apache-2.0
"""What a device says of itself."""
from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .config import Algorithm

if TYPE_CHECKING:
    from allocator.stats import BalloonStats, CompactionStats, HeadroomStats

    from .estimate import Estimate
    from .stats import (
        BackingSettings,
        BackingStats,
        BackUpkeepStats,
        BallastStats,
        CompactorStats,
        DensityStats,
        DictionaryStats,
        GovernorStats,
        LaneStats,
        PolicyStats,
        RecompressionStats,
        RestoreStats,
        SaveStats,
        SharingStats,
        StoreStats,
        TaskStats,
        UnitMakingStats,
        WritebackStats,
    )

# The counters of LaneStats that `reset` sets to zero, as the kernel does with those of its disk.
_LANE_COUNTERS = (
    "read_ios", "read_sectors", "read_ms", "write_ios", "write_sectors", "write_ms", "io_ms", "queue_ms",
    "discard_ios", "discard_sectors", "discard_ms",
)


@dataclass(frozen=True)
class MemoryStats:
    """What compaction and the balloon have done since the device was set up; `won` is what the last
    `compact` command said."""

    compactor: CompactorStats
    migration: CompactionStats
    balloon: BalloonStats
    orders: tuple[int, ...]
    store: StoreStats
    won: str | None

    @property
    def unusable_index(self) -> float:
        """Share of the free frames that do not lie in whole free pageblocks, 0 to 1."""
        whole = self.orders[-1] << (len(self.orders) - 1)
        free = sum(blocks << order for order, blocks in enumerate(self.orders))
        return (free - whole) / free if free else 0.0


@dataclass(frozen=True)
class DeviceStats:
    """disksize, mem_limit in bytes, 0 = not set up, no limit; level None = the codec's default;
    algorithms by priority, the first being algo and level, and a dictionary of the device's own among them;
    store None while the device is not set up;
    lane: its counters since the last reset; room: bytes that the pool may take before writes get ENOSPC, by
    mem_limit, the host and the memory cgroups, None = not bounded; survival: what happens when the daemon
    dies, as half a sentence."""

    name: str
    directory: Path
    disksize: int
    algo: str
    level: int | None
    mem_limit: int
    store: StoreStats | None
    lane: LaneStats
    threads: int
    open_count: int
    alive: bool
    last_error: str | None
    algorithms: tuple[Algorithm | None, ...]
    access_times: bool
    recompression: RecompressionStats
    unit_making: UnitMakingStats
    back_upkeep: BackUpkeepStats
    sharing: SharingStats
    dictionaries: DictionaryStats
    backing_dev: BackingSettings
    backing: BackingStats | None
    writeback: WritebackStats
    policies: tuple[PolicyStats, ...]
    density: DensityStats
    ballast: BallastStats
    proactiveness: int
    wipe: bool
    tasks: tuple[TaskStats, ...]
    headroom: HeadroomStats
    room: int | None
    governor: GovernorStats
    survival: str
    save: SaveStats
    restored: RestoreStats | None
    estimate: Estimate | None = None  # the last one


def since(now: LaneStats, before: LaneStats | None) -> LaneStats:
    if before is None:
        return now
    latency = tuple(new - old for new, old in zip(now.latency, before.latency, strict=True))
    counters = {name: getattr(now, name) - getattr(before, name) for name in _LANE_COUNTERS}
    return replace(now, latency=latency, **counters)
