# SPDX-License-Identifier: Apache-2.0
"""What the table of metrics is made of: a metric, its values, and the figures that it is read from."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zramfs.model.stats import EMPTY, GovernorStats, Latency, RecompressionStats, StoreStats

if TYPE_CHECKING:
    from allocator.stats import ClassStats
    from zramfs.model.device_stats import DeviceStats, MemoryStats
    from zramfs.model.stats import LaneStats

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
NS_PER_SECOND = 1e9
SECTOR = 512

Number = int | float
# One sample, or one for each combination of label values, in the order of Metric.labels.
Value = Number | Latency | Mapping[tuple[str, ...], Number | Latency]


@dataclass(frozen=True)
class Figures:
    """What the table is read from. memory is None and classes are empty while there is no pool."""

    device: DeviceStats
    memory: MemoryStats | None
    classes: Sequence[ClassStats]

    @property
    def store(self) -> StoreStats:
        return self.device.store or EMPTY

    @property
    def recompression(self) -> RecompressionStats:
        return self.device.recompression

    @property
    def lane(self) -> LaneStats:
        return self.device.lane

    @property
    def governor(self) -> GovernorStats:
        return self.device.governor


@dataclass(frozen=True)
class Metric:
    """name: without the prefix zramfs_ and without a counter's _total; it ends with the unit, if there
    is one. value None: there is nothing to say, and the family is left out."""

    kind: str
    name: str
    help: str
    value: Callable[[Figures], Value | None]
    unit: str = ""
    labels: tuple[str, ...] = ()
