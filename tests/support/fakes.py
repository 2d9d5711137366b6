# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for what needs a mount, for tests of what stands above it."""
from __future__ import annotations

import threading

from zramfs.model.stats import NO_LATENCY, OPERATIONS, LaneStats


class FakeLane:
    """A lane without a mount: counts who has `disk` open, as the tests say, and keeps to the
    contract of the real one (a store changes only while claimed or before the start)."""

    def __init__(self) -> None:
        self.open_count = 0
        self.alive = True
        nothing = dict.fromkeys(LaneStats.__dataclass_fields__, 0)
        self.counters = LaneStats(**nothing | {"latency": (NO_LATENCY,) * len(OPERATIONS)})
        self.store = None
        self.started = False
        self.claimed = False
        self.size_notified = 0
        self.resized: list[bool] = []
        self.kernel_answers = threading.Event()  # cleared: notify_size() hangs, as behind a busy kernel
        self.kernel_answers.set()

    def wait_unused(self) -> bool:
        return self.open_count == 0

    def claim(self) -> bool:
        if self.open_count == 0:
            self.claimed = True
        return self.claimed

    def release_claim(self) -> None:
        assert self.claimed
        self.claimed = False

    def set_store(self, store) -> None:
        assert self.claimed or not self.started
        self.store = store

    def notify_size(self) -> None:
        assert self.claimed, "an opener would see the old size"
        self.size_notified += 1
        assert self.kernel_answers.wait(60)

    def notify_resize(self, larger: bool) -> None:
        self.resized.append(larger)

    def stats(self) -> LaneStats:
        return self.counters
