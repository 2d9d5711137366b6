# SPDX-License-Identifier: Apache-2.0
"""Everything that changes a pool at once, for a while: writes, discards, reads, object compaction,
migration, contiguous allocation and the balloon, against a model, with every invariant after each round.

About 20 seconds, or half of that where tests/support/scale.py wants a part; --soak MINUTES stretches each
test by that factor. A failure names its seed, which ZRAMFS_SOAK_SEED takes.
"""
from __future__ import annotations

import errno
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from allocator import Arena, Balloon, Migration
from tests.support import native
from tests.support.migration_tools import (
    MOVABLE,
    USED,
    assert_at_rest,
    assert_balanced,
    flags_of_frames,
    in_threads,
    until,
)
from tests.support.scale import scaled
from zramfs.store.store import Store

pytestmark = pytest.mark.soak

PAGE = 4096
MIB = 1 << 20
DISKSIZE = 24 * MIB
SLOTS = DISKSIZE // PAGE
WRITERS = 2
ROUND = 2.5  # seconds
SEED = int(os.environ.get("ZRAMFS_SOAK_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)


def rounds(
    request: pytest.FixtureRequest, whole: int, part: int, reached: Callable[[], bool]
) -> Iterator[int]:
    """And more of them on a machine that is so busy that little comes to pass in a round."""
    soak = request.config.getoption("soak")
    return until(round(whole * max(1.0, soak)) if soak else scaled(whole, part), reached, limit=math.inf)


# ---- the device -----------------------------------------------------------------------------------------

STAMP = 16  # bytes: slot, version
BODIES = [
    random.Random(n).randbytes(size).ljust(PAGE - STAMP, b"\x22")
    for n, size in enumerate((0, 100, 700, 1100, 1500, 2100, 2500, 3000, 3500, PAGE - STAMP))
]
WORDS = (bytes(8), b"\x07" + bytes(7), b"abcdabcd", b"12345678")


def stamped(slot: int, version: int) -> bytes:
    """A page that no other slot and no other version has, but for every twelfth version, which is
    same-filled."""
    if version % 12 == 0:
        return WORDS[version // 12 % len(WORDS)] * (PAGE // 8)
    return slot.to_bytes(8, "little") + version.to_bytes(8, "little") + BODIES[(slot + version) % len(BODIES)]


def believable(slot: int, page: bytes) -> bool:
    """One whole version of this slot, whichever: for a reader who does not know what was last."""
    if page == bytes(PAGE) or page[:8] * (PAGE // 8) == page:
        return True
    version = int.from_bytes(page[8:STAMP], "little")
    return page == stamped(slot, version)


class Writer:
    """Owns every WRITERS-th run of 8 slots; knows what each of them holds."""

    def __init__(self, store: Store, which: int, seed: int) -> None:
        self.store = store
        self.rng = random.Random(seed)
        self.runs = range(which, SLOTS // 8, WRITERS)
        self.held: dict[int, int] = {}  # slot: version
        self.version = 0
        self.refused = 0
        self.operations = 0

    def content(self, first: int, n: int) -> bytes:
        return b"".join(stamped(slot, self.held[slot]) if slot in self.held else bytes(PAGE)
                        for slot in range(first, first + n))

    def step(self, fill: float) -> None:
        """fill: share of the writes among writes and discards."""
        rng = self.rng
        start = rng.choice(self.runs) * 8
        first = start + rng.randrange(8)
        n = rng.randrange(1, start + 8 - first + 1)
        self.operations += 1
        what = rng.random()
        if what < 0.3:
            self.read(first, n)
        elif what < 0.3 + 0.7 * fill:
            self.write(first, n)
        else:
            self.store.zero(first * PAGE, n * PAGE)
            for slot in range(first, first + n):
                self.held.pop(slot, None)

    def write(self, first: int, n: int) -> None:
        versions = range(self.version + 1, self.version + 1 + n)
        self.version += n
        written = n
        try:
            self.store.write(first * PAGE, b"".join(map(stamped, range(first, first + n), versions)))
        except OSError as error:
            assert error.errno == errno.ENOSPC and error.written % PAGE == 0
            written = error.written // PAGE
            self.refused += 1
        self.held.update(zip(range(first, first + written), versions, strict=False))

    def read(self, first: int, n: int) -> None:
        found = self.store.read(first * PAGE, n * PAGE)
        assert found == self.content(first, n), f"slots {first} to {first + n - 1}"

    def verify(self) -> None:
        for run in self.runs:
            self.read(run * 8, 8)


class Device:
    """A store with its writers, and all that goes on beside them."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.store = Store(DISKSIZE, algo=rng.choice(["lz4", "lz4", "zstd", "none"]),
                           mem_limit=rng.choice([0, 0, 8 * MIB]))
        self.arena = self.store.migration.arena
        self.writers = [Writer(self.store, which, seed + which) for which in range(WRITERS)]
        self.until = 0.0

    def round(self, seconds: float) -> None:
        self.until = time.monotonic() + seconds
        over = threading.Event()

        def again(job: Callable[[random.Random], None], rest: float = 0) -> Callable[[], None]:
            rng = random.Random(self.rng.random())

            def loop() -> None:
                while time.monotonic() < self.until and not over.is_set():
                    job(rng)
                    if rest:
                        time.sleep(rest)
            return loop

        in_threads(
            *(again(lambda rng, writer=writer: self.write(writer)) for writer in self.writers),
            again(self.look), again(self.compact, 0.002), again(self.migrate, 0.001), again(self.blow, 0.003),
            again(self.contiguous, 0.002), over=over, limit=seconds + 60,
        )

    def write(self, writer: Writer) -> None:
        # Grows for a third of a second, thins out for another.
        fill = 0.9 if int(time.monotonic() * 3) % 2 else 0.25
        for _ in range(20):
            writer.step(fill)

    def look(self, rng: random.Random) -> None:
        slot = rng.randrange(SLOTS)
        assert believable(slot, self.store.read(slot * PAGE, PAGE)), f"slot {slot}"
        stats = self.store.stats()
        assert stats.corrupt == stats.failed_reads == 0
        assert max(stats.resident, stats.mem_used_total, stats.frames_free, stats.compr_data_size) < 1 << 40
        if rng.random() < 0.05:
            pageblocks = self.store.migration.pageblocks()
            assert all(state.used + state.free == 512 for state in pageblocks)

    def compact(self, rng: random.Random) -> None:
        if rng.random() < 0.3:
            self.store.compact()
        else:
            self.store.compact_slice(rng.randrange(500_000))

    def migrate(self, rng: random.Random) -> None:
        self.store.migration.begin(rng.random() < 0.5)
        for _ in range(rng.randrange(40)):
            if not self.store.migration.step():
                break

    def blow(self, rng: random.Random) -> None:
        balloon = self.store.balloon
        balloon.set_target(rng.choice([0, 50, 500, 1500]))
        balloon.adjust(rng.randrange(300), self.store.room())

    def contiguous(self, rng: random.Random) -> None:
        if rng.random() < 0.5:
            first, n = rng.randrange(0, 12 * 512, 64), rng.choice([1, 8, 64])
            try:
                self.store.migration.alloc_contig_range(first, n)
            except (OSError, MemoryError):
                return
            for frame in range(first, first + n):
                self.arena.free(frame)
        else:
            order = rng.randrange(10)
            frame = self.store.migration.alloc_contig(order)
            self.arena.free(frame, order)

    def settle(self) -> None:
        """At rest: every object, slot, frame and counter."""
        balloon = self.store.balloon
        balloon.set_target(0)
        while balloon.adjust(10_000):
            pass
        self.store.compact()
        self.store.migration.run()
        self.store.check(3)
        for writer in self.writers:
            writer.verify()
        assert_balanced(self.store.migration)
        stats = self.store.stats()
        assert stats.orig_data_size == sum(len(writer.held) for writer in self.writers) * PAGE
        assert stats.mem_used_total == stats.frames_used * PAGE
        assert stats.pageblocks_in_use == -(-stats.frames_used // 512)
        assert {flags for flags in flags_of_frames(self.arena) if flags & USED} <= {USED | MOVABLE}

    def end(self) -> None:
        self.store.zero(0, DISKSIZE)
        self.store.compact()
        self.store.check(3)
        assert self.store.stats().frames_used == self.store.stats().resident == 0
        self.store.close()


def test_a_device_under_everything_at_once(request: pytest.FixtureRequest) -> None:
    device: Device | None = None
    migrated = refused = 0
    for n in rounds(request, 5, 2, lambda: migrated > 1000):  # noqa: B023 - the sum so far is what it asks
        if device is None or n % 4 == 0:
            if device is not None:
                device.end()
            device = Device(SEED + 1000 * n)
        try:
            device.round(ROUND)
            device.settle()
        except AssertionError as error:
            raise AssertionError(f"in round {n} with seed {SEED}: {error}") from error
        migrated += device.store.migration.stats().migrated
        refused += sum(writer.refused for writer in device.writers)
    device.end()
    assert migrated > 1000


# ---- the pool alone ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("nr_pageblocks, nr_slots", [(8, 1500), (64, 6000)], ids=["short of memory", "roomy"])
def test_a_pool_without_the_gil(request: pytest.FixtureRequest, nr_pageblocks: int, nr_slots: int) -> None:
    """Threads that never stop for Python: real races on every word, on as many cores as there are."""
    arena = Arena(0, nr_pageblocks)
    balloon, migrations = Balloon(arena), [Migration(arena), Migration(arena)]
    crowd = native.load("crowd").Crowd(arena, nr_slots)
    for n in rounds(request, 2, 1, lambda: sum(each.stats().migrated for each in migrations) > 1000):
        over = threading.Event()

        def work(which: int, n: int = n, over: threading.Event = over) -> None:
            try:
                crowd.work(ROUND, SEED + n * 16 + which)
            finally:
                over.set()

        def compact(over: threading.Event = over) -> None:
            while not over.is_set():
                crowd.compact()
                migrations[0].run()

        def blow(n: int = n, over: threading.Event = over) -> None:
            rng = random.Random(SEED + n)
            while not over.is_set():
                balloon.set_target(rng.randrange(nr_pageblocks * 128))
                balloon.adjust(rng.randrange(200))
                arena.inject_failure(rng.randrange(50))
                time.sleep(0.0005)

        def contiguous(n: int = n, over: threading.Event = over) -> None:
            rng = random.Random(SEED + n + 1)
            while not over.is_set():
                order = rng.randrange(10)
                try:
                    frame = migrations[1].alloc_contig(order)
                except MemoryError:
                    continue
                arena.free(frame, order)

        in_threads(*(lambda which=which: work(which) for which in range(2)), compact, blow, contiguous,
                   over=over, limit=ROUND + 60)
        arena.inject_failure(0)
        crowd.compact()
        assert crowd.isolated == 0, f"round {n}, seed {SEED}"
        crowd.verify()
        crowd.check(2)
        for migration in migrations:
            assert_balanced(migration)
        assert arena.stats().frames_used == crowd.stats().pages + balloon.stats().pages
    assert sum(migration.stats().migrated for migration in migrations) > 1000
    balloon.set_target(0)
    balloon.adjust(1 << 30)
    crowd.empty()
    crowd.compact()
    assert_at_rest(arena)
    assert arena.stats().pageblocks_in_use == 0
