# SPDX-License-Identifier: Apache-2.0
"""What `density=max` would win, from a sample."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zramfs.text.sizes import PAGE, format_size, parse_size

if TYPE_CHECKING:
    from allocator.stats import ClassStats

# Bytes. Of 192 MiB of programs 64 MiB took 3.5 s of CPU with zstd 9, for a standard error of 0.5 % of the
# memory; 8 MiB took 0.45 s, for 1.6 %.
DEFAULT_SAMPLE = 64 << 20
LEAST_SAMPLE, MOST_SAMPLE = 1 << 20, 1 << 30  # the most costs 8 MiB of memory meanwhile
LEVEL = 9  # of the units, as of `density=max`
ERRORS = 2  # standard errors to each side that 95 % of the estimates lie within


def parse_sample(text: str) -> int:
    """Bytes. ValueError."""
    size = parse_size(text)
    if not LEAST_SAMPLE <= size <= MOST_SAMPLE:
        raise ValueError(f"expected a sample of {format_size(LEAST_SAMPLE)} to {format_size(MOST_SAMPLE)}, "
                         f"got {format_size(size)}")
    return size


@dataclass(frozen=True, slots=True)
class Estimate:
    """Sizes in bytes. groups: of 16 neighbouring pages, with at least one that takes memory."""

    data: int  # stored
    memory: int  # of the pool
    after: int  # that it would be, with the pool compacted
    saved: int  # by the steps, without what compaction gives back
    error: int  # standard error of that, from the choice of the sample; 0 if the sample was everything
    cpu_ns: int  # that the steps would take
    groups: int  # of the device
    sampled_groups: int
    sampled_pages: int
    unit_pages: int  # of these, those that would be in units
    shared_pages: int  # and those that would share an object
    own_ns: int  # CPU time that the estimate took
    taken_at: int = 0  # seconds since 1970

    @property
    def ratio(self) -> float | None:
        """Data / memory."""
        return self.data / self.memory if self.memory else None

    @property
    def ratio_after(self) -> float | None:
        return self.data / self.after if self.after else None

    @property
    def is_worth(self) -> bool:
        """Whether more would be won than the estimate may be wrong by, and at least 2 % of the memory."""
        return self.saved > max(ERRORS * self.error, self.memory // 50)


# Size classes to each side whose objects say how many a class may have of which the sample has none.
_NEAR = 4


def room_behind(classes: Sequence[ClassStats], objects: Sequence[float], is_exact: bool) -> float:
    """Bytes of the room in the last zspage of each size class. objects: how many each would have; is_exact:
    they are counted, and not projected from a sample.

    In a sample most of the classes that would have a single object have none, and some have one that stands
    for several. So each class is expected to have as many as its neighbours, and with n expected there is
    none with the chance exp(-n).
    """
    total = 0.0
    for i, c in enumerate(classes):
        zspage = c.pages_per_zspage * PAGE
        if is_exact:
            zspages = objects[i] / c.objs_per_zspage
            # Of shared objects each page has counted its part.
            total += (math.ceil(zspages - 1e-6) - zspages) * zspage
        elif c.objs_per_zspage > 1:
            n = _smoothed(objects, i)
            some = 1 - math.exp(-n)
            # Half a zspage where there are several.
            total += max(some / 2, some - n / c.objs_per_zspage) * zspage
    return total


def _smoothed(objects: Sequence[float], i: int) -> float:
    near = range(max(0, i - _NEAR), min(len(objects), i + _NEAR + 1))
    weights = [1 + _NEAR - abs(k - i) for k in near]
    return sum(weight * objects[k] for weight, k in zip(weights, near, strict=True)) / sum(weights)
