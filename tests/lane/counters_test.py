# SPDX-License-Identifier: Apache-2.0
"""What the lane's counters and latencies say."""
from __future__ import annotations

import bisect
import os
import time

from tests.support.wire import (
    KEEP_SIZE,
    MIB,
    PAGE,
    PUNCH_HOLE,
    Op,
    fallocate_in,
    wired,
    write_in,
)
from zramfs.model.stats import BUCKET_BOUNDS, OPERATIONS


def test_counters():
    with wired() as wire:
        wire.write(0, bytes(range(256)) * 48)
        wire.write(100, b"x" * 412)
        wire.write(600, b"x" * 100)
        for _ in range(5):
            wire.read(0, 3 * PAGE)
        wire.read(MIB - 512, PAGE)
        wire.read(MIB, PAGE)
        wire.call(Op.FALLOCATE, fallocate_in(0, 2 * PAGE, PUNCH_HOLE | KEEP_SIZE))
        stats = wire.lane.stats()
        assert (stats.write_ios, stats.write_sectors) == (3, 25)
        assert (stats.read_ios, stats.read_sectors) == (6, 5 * 24 + 1)
        assert (stats.discard_ios, stats.discard_sectors) == (1, 16)
        assert (stats.in_flight, stats.protocol_errors, stats.reply_errors) == (0, 0, 0)
        assert 0 < stats.longest_us < 60_000_000


def test_latencies():
    """What a request adds to the time of its kind is the time by which it is counted."""
    kinds = ("write", "read", "discard")
    with wired(4 * MIB) as wire:
        before = wire.lane.stats()
        for n in range(120):
            size = 1 << n % 20
            kind = kinds[n // 20 % 3]
            if kind == "write":
                wire.write(0, os.urandom(size))
            elif kind == "read":
                wire.read(0, size)
            else:
                wire.call(Op.FALLOCATE, fallocate_in(0, size, PUNCH_HOLE | KEEP_SIZE))
            after = wire.lane.stats()
            for operation, now, then in zip(OPERATIONS, after.latency, before.latency, strict=True):
                new = now - then
                bucket = bisect.bisect_left(BUCKET_BOUNDS, new.ns)
                expected = [int(operation == kind and b == bucket) for b in range(len(BUCKET_BOUNDS) + 1)]
                assert list(new.counts) == expected, (kind, size, new)
            before = after
        counts = [each.count for each in after.latency]
        assert counts == [after.read_ios, after.write_ios, after.discard_ios]
        times = [each.ns // 1_000_000 for each in after.latency]
        assert times == [after.read_ms, after.write_ms, after.discard_ms]
        used = {b for each in after.latency for b, n in enumerate(each.counts) if n}
        assert len(used) > 3, "requests of 1 byte and of 512 KiB take different times"


def test_times():
    """Compressing noise with zstd 19 takes measurable time: with two threads at it the sum of the
    times passes the time in which anything was in hand, which cannot pass the wall's."""
    # A busy machine may let this process wait for longer than the lane works.
    assert any(was_busy() for _ in range(10)), "the lane was busy for most of the time"


def was_busy() -> bool:
    with wired(16 * MIB, algo="zstd", level=19, threads=2) as wire:
        began = time.monotonic()
        size = 1 << 17
        for n in range(24):
            wire.send(Op.WRITE, write_in(n * size, size) + os.urandom(size))
        assert not any(wire.receive().error for _ in range(24))
        wall = (time.monotonic() - began) * 1000
        stats = wire.lane.stats()
        assert stats.write_ms == stats.queue_ms and stats.read_ms == 0
        assert 0 < stats.io_ms <= wall + 1
        assert stats.io_ms <= stats.queue_ms <= 2 * stats.io_ms + 2
        assert stats.longest_us / 1000 <= stats.write_ms <= 24 * stats.longest_us / 1000
        return stats.io_ms >= wall / 4
