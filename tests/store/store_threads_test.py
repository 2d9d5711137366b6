# SPDX-License-Identifier: Apache-2.0
"""The store under many threads. It works without the GIL, so on two cores these really run at once."""
from __future__ import annotations

import errno
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from tests.support.memory_file import MemoryFile
from tests.support.page_kinds import KINDS, block
from tests.support.steps import at_work
from zramfs.store.store import Store

PAGE = 4096
CHUNK = 512 * PAGE  # of the device, for each page of the slot table
SECONDS = 1.2  # of each test

Job = Callable[[], None]


@pytest.fixture(autouse=True)
def eager_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0002)
    yield
    sys.setswitchinterval(before)


def run(*jobs: Job, seconds: float = SECONDS, enough: Callable[[], bool] = lambda: True) -> None:
    """Calls each job again and again, each in a thread of its own, until the time is over, and they did
    enough, or one fails."""
    began = time.monotonic()
    with at_work(*jobs) as failures:
        while not failures:
            lasted = time.monotonic() - began
            if lasted >= seconds and (enough() or lasted > 60):
                break
            time.sleep(0.01)


def housekeeping(store: Store) -> list[Job]:
    """What runs beside the I/O of a device: both compactions, the balloon, and people who look."""
    def compact() -> None:
        store.compact()
        time.sleep(0.001)

    def migrate() -> None:
        store.migration.run()
        store.balloon.set_target(random.randrange(600))
        store.balloon.adjust(100)
        time.sleep(0.001)

    def look() -> None:
        stats = store.stats()
        # A counter that had passed below zero would be near 2^64.
        assert max(stats.orig_data_size, stats.compr_data_size, stats.same_pages, stats.huge_pages,
                   stats.mem_used_total, stats.frames_used, stats.frames_free, stats.resident) < 1 << 40
        assert stats.corrupt == stats.failed_reads == 0
        assert len(store.classes()) == 119 and len(store.buddyinfo()) == 10
        time.sleep(0.001)

    return [compact, migrate, look]


def settle(store: Store) -> None:
    store.balloon.set_target(0)
    while store.balloon.adjust(10_000):
        pass
    store.compact()
    store.check(3)


# ---- different pages ------------------------------------------------------------------------------------

class Region:
    """A thread's own part of the device, with its content. Its ends are not page borders, so that
    neighbours update the two halves of one page."""

    def __init__(self, store: Store, start: int, size: int, seed: int) -> None:
        self.store, self.start = store, start
        self.data = bytearray(size)
        self.rng = random.Random(seed)
        self.blocks = {kind: block(kind, seed, 24 * PAGE) for kind in KINDS}

    def job(self) -> None:
        rng = self.rng
        off = rng.randrange(len(self.data))
        if rng.random() < 0.5:
            off = max(0, (self.start + off & -PAGE) - self.start)
        n = min(rng.choice([1, 100, PAGE, PAGE, 3 * PAGE, 20 * PAGE]), len(self.data) - off)
        action = rng.random()
        if action < 0.45:
            content = self.blocks[rng.choice(KINDS)][:n]
            self.store.write(self.start + off, content)
            self.data[off:off + n] = content
        elif action < 0.65:
            self.store.zero(self.start + off, n)
            self.data[off:off + n] = bytes(n)
        else:
            assert self.store.read(self.start + off, n) == self.data[off:off + n]


def test_threads_on_pages_of_their_own() -> None:
    store = Store(8 << 20)
    size = 2_000_003
    regions = [Region(store, n * size + 5, size, n) for n in range(4)]
    run(*(region.job for region in regions), *housekeeping(store), seconds=2 * SECONDS)
    for region in regions:
        assert store.read(region.start, size) == region.data
    settle(store)
    for region in regions:
        assert store.read(region.start, size) == region.data
    store.zero(0, 8 << 20)
    settle(store)
    stats = store.stats()
    assert (stats.orig_data_size, stats.mem_used_total, stats.frames_used, stats.resident) == (0, 0, 0, 0)


# ---- the same pages ---------------------------------------------------------------------------------------

BODIES = [block(kind, 1, PAGE)[8:] for kind in ("text", "random", "half random", "mixed")]


def stamped(slot: int, version: int) -> bytes:
    """A page that says everywhere which one it is: whole pages of this word every fifth time, else
    the word in front of a body that belongs to the version."""
    word = (slot << 40 | version << 8 | 0xA5).to_bytes(8, "little")
    which = version % 5
    return word * 512 if which == 4 else word + BODIES[which]


def version_of(slot: int, page: bytes) -> int:
    """0 for a page of zeros. Asserts that the page is one whole version of this slot."""
    if page == bytes(PAGE):
        return 0
    word = int.from_bytes(page[:8], "little")
    version = word >> 8 & 0xFFFFFFFF
    assert word >> 40 == slot and page == stamped(slot, version), f"slot {slot} holds a mixture"
    return version


# Neighbours in one chunk, and slots that are alone in theirs, whose page of the table comes and goes.
SLOTS = [0, 1, 2, 3, *(n * 512 + 100 * n for n in range(1, 5))]


@pytest.mark.parametrize("discards", [False, True], ids=["writes", "discards"])
def test_readers_see_the_old_page_or_the_new_one(discards: bool) -> None:
    store = Store(16 << 20)
    # Slot 0 belongs to the test: a page of zeros may then only come from a discard.
    for slot in SLOTS:
        store.write(slot * PAGE, stamped(slot, 1))

    def writer(slots: list[int]) -> Job:
        rng = random.Random(slots[0])
        versions = dict.fromkeys(slots, 1)

        def job() -> None:
            slot = rng.choice(slots)
            versions[slot] += 1
            store.write(slot * PAGE, stamped(slot, versions[slot]))
            found = version_of(slot, store.read(slot * PAGE, PAGE))
            # Nobody else writes this slot.
            assert found == versions[slot] or discards and found == 0

        return job

    def reader(seed: int) -> Job:
        rng = random.Random(seed)
        seen = dict.fromkeys(SLOTS, 0)

        def job() -> None:
            slot = rng.choice(SLOTS)
            version = version_of(slot, store.read(slot * PAGE, PAGE))
            if version or not discards:
                assert version >= seen[slot], f"slot {slot} went back from version {seen[slot]} to {version}"
                seen[slot] = version

        return job

    def discarder() -> None:
        slot = random.choice(SLOTS)
        store.zero(slot * PAGE, PAGE)
        with suppress(OSError):
            store.seek(slot * PAGE, random.random() < 0.5)

    jobs = [writer(SLOTS[::2]), writer(SLOTS[1::2]), reader(1), reader(2)]
    run(*jobs, *housekeeping(store), *([discarder] * discards))
    settle(store)
    for slot in SLOTS:
        version_of(slot, store.read(slot * PAGE, PAGE))


def test_the_slot_table_comes_and_goes_under_load() -> None:
    """Slots that are alone in their chunk: every discard may give the chunk's page back, whoever is
    looking at it then."""
    store = Store(64 * CHUNK)
    file = MemoryFile(store.migration.arena.fileno())
    empty = file.resident()

    def job(chunks: range, seed: int) -> Job:
        rng = random.Random(seed)

        def step() -> None:
            chunk = rng.choice(chunks)
            off = chunk * CHUNK + rng.randrange(512) * PAGE
            store.write(off, b"\1" * PAGE)
            assert store.read(off, PAGE) == b"\1" * PAGE
            store.zero(off, PAGE)
            assert not any(store.read(off, 8))

        return step

    def look() -> None:
        off = random.randrange(64 * CHUNK)
        assert set(store.read(off & -PAGE, PAGE)) < {0, 1}
        with suppress(OSError):
            store.seek(off, random.random() < 0.5)

    run(*(job(range(n, 8, 2), n) for n in range(2)), look, look)
    assert file.resident() == empty, "pages of the slot table stayed behind"
    store.check(3)
    assert store.stats().orig_data_size == 0


# ---- parts of the same pages ----------------------------------------------------------------------------

@pytest.mark.parametrize("unit", [1, 512])
def test_no_update_of_a_part_is_lost(unit: int) -> None:
    """Eight threads write their own units, side by side in the same pages: every write reads the page,
    changes a part and writes it back."""
    store = Store(PAGE * 40)
    threads = 8
    units = 16 * PAGE // (unit * threads)

    def job(thread: int) -> tuple[Job, dict[int, bytes]]:
        rng = random.Random(thread)
        mine: dict[int, bytes] = {}

        def step() -> None:
            off = (rng.randrange(units) * threads + thread) * unit
            if rng.random() < 0.8:
                content = rng.randbytes(1) * unit if rng.random() < 0.5 else rng.randbytes(unit)
                store.write(off, content)
            else:
                content = bytes(unit)
                store.zero(off, unit)
            mine[off] = content
            off = rng.choice(list(mine)[:100])
            assert store.read(off, unit) == mine[off]

        return step, mine

    jobs = [job(thread) for thread in range(threads)]
    run(*(step for step, _ in jobs), *housekeeping(store))
    for _, mine in jobs:
        for off, content in mine.items():
            assert store.read(off, unit) == content
    settle(store)


# ---- a full pool ------------------------------------------------------------------------------------------

def test_a_full_pool_under_load() -> None:
    """Whatever fails, the page keeps what it held; the limit holds at every moment."""
    limit = 1 << 20
    store = Store(16 << 20, mem_limit=limit)
    refused = 0

    def job(thread: int) -> tuple[Job, dict[int, int]]:
        rng = random.Random(thread)
        held: dict[int, int] = {}
        version = 0

        def step() -> None:
            nonlocal version, refused
            slot = rng.randrange(300) * 4 + thread
            version += 1
            try:
                store.write(slot * PAGE, stamped(slot, version))
                held[slot] = version
            except OSError as error:
                assert error.errno == errno.ENOSPC and error.written == 0
                refused += 1
            assert version_of(slot, store.read(slot * PAGE, PAGE)) == held.get(slot, 0)
            if rng.random() < 0.2 and held:
                slot = rng.choice(list(held))
                store.zero(slot * PAGE, PAGE)
                del held[slot]

        return step, held

    def look() -> None:
        assert store.stats().mem_used_total <= limit >= store.stats().mem_used_max

    jobs = [job(thread) for thread in range(4)]
    run(*(step for step, _ in jobs), store.compact, look, enough=lambda: refused > 10)
    assert refused > 10 and store.stats().failed_writes >= refused
    settle(store)
    for _, held in jobs:
        for slot, version in held.items():
            assert version_of(slot, store.read(slot * PAGE, PAGE)) == version
