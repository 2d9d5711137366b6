# SPDX-License-Identifier: Apache-2.0
"""Recompresses a store."""
from __future__ import annotations

from zramfs.model.stats import RecompressionStats
from zramfs.store.recompress import Recompression
from zramfs.store.store import Store

SLICE = 1_000_000  # ns


def recompress(store: Store, priority: int = 1, **how: object) -> RecompressionStats:
    job = Recompression(store, priority, **how)
    try:
        while job.select(SLICE):
            pass
        while job.step(SLICE):
            pass
    finally:
        done = job.finish()
    return done
