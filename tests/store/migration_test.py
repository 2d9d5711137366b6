# SPDX-License-Identifier: Apache-2.0
"""Migration under a device: whoever uses it must never notice a move, and the host gets the memory."""
from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.memory_file import MemoryFile
from tests.support.migration_tools import MOVABLE, USED, assert_balanced, flags_of_frames, in_threads, until
from tests.support.scale import scaled
from zramfs.store.store import Store

PAGE = 4096
MIB = 1 << 20
PAGEBLOCK = 2 * MIB
DISKSIZE = 32 * MIB
SIZES = (500, 900, 1300, 2100, 2500, 2900, 3300, 4096)  # of what can't be compressed in a page


def page_of(slot: int, version: int) -> bytes:
    """Different for each slot and version: same-filled, of many classes, and huge."""
    rng = random.Random(slot << 16 | version)
    return rng.randbytes(rng.choice(SIZES)).ljust(PAGE, b"\x11") if slot % 20 else rng.randbytes(8) * 512


class Life:
    """A store that was filled and then thinned out, with its content."""

    def __init__(self, share: float, *, algo: str = "lz4", mem_limit: int = 0, seed: int = 1) -> None:
        self.store = Store(DISKSIZE, algo=algo, mem_limit=mem_limit)
        self.memory = MemoryFile(self.store.migration.arena.fileno())
        self.rng = random.Random(seed)
        self.pages = {slot: page_of(slot, 0) for slot in range(DISKSIZE // PAGE)}
        self.store.write(0, b"".join(self.pages.values()))
        self.discard(share)

    def discard(self, share: float) -> None:
        for slot in self.rng.sample(sorted(self.pages), round(share * len(self.pages))):
            self.store.zero(slot * PAGE, PAGE)
            del self.pages[slot]

    def slots(self) -> list[int]:
        return [self.memory.slot_word(slot) for slot in range(DISKSIZE // PAGE)]

    def verify(self, level: int = 3) -> None:
        content = bytearray(DISKSIZE)
        for slot, page in self.pages.items():
            content[slot * PAGE:(slot + 1) * PAGE] = page
        assert self.store.read(0, DISKSIZE) == content
        self.store.check(level)
        assert_balanced(self.store.migration)


@pytest.fixture
def sparse() -> Iterator[Life]:
    life = Life(0.7)
    yield life
    life.store.close()


# ---- nobody notices ------------------------------------------------------------------------------------

@pytest.mark.parametrize("algo", ["lz4", "zstd:1", "none"])
def test_pages_move_and_slots_stay(algo: str) -> None:
    """A location is a zspage and an index: no slot is written, no object touched."""
    name, _, level = algo.partition(":")
    life = Life(0.6, algo=name)
    store, slots, stats = life.store, life.slots(), life.store.stats()
    freed = store.migration.run()
    # Every pageblock that can be emptied at all.
    assert stats.pageblocks_in_use - freed == -(-stats.frames_used // 512) == store.stats().pageblocks_in_use
    if algo != "none":
        assert freed > 0
    assert life.slots() == slots
    after = store.stats()
    for name in ("orig_data_size", "compr_data_size", "mem_used_total", "same_pages", "huge_pages",
                 "frames_used", "pages_compacted", "failed_reads", "failed_writes"):
        assert getattr(after, name) == getattr(stats, name), name
    life.verify()
    store.close()


def test_what_stays_resident_is_what_is_told(sparse: Life) -> None:
    store, memory = sparse.store, sparse.memory
    resident = memory.resident()
    before = store.stats()
    # Objects only: zspages become fewer, pageblocks hardly.
    store.compact()
    assert store.stats().mem_used_total < before.mem_used_total
    assert store.migration.run() >= 4
    after = store.stats()
    assert after.bytes_returned > before.bytes_returned
    # But for what was never touched of the pageblock that was filled last.
    assert abs(resident - memory.resident() - (before.resident - after.resident)) < PAGEBLOCK
    # Pageblocks, and nothing but the descriptors and the slots beside them.
    tables = memory.resident() - after.resident
    assert -PAGEBLOCK < tables < MIB
    assert after.resident - after.frames_used * PAGE < PAGEBLOCK
    sparse.verify()


def test_discards_return_a_quarter_of_the_memory() -> None:
    """Of a full device, 30 % of its pages at random; the kernel's zram returns a few per cent."""
    life = Life(0)
    full = life.memory.resident()
    life.discard(0.3)
    store = life.store
    alone = full - life.memory.resident()
    while store.compact_slice(1_000_000):
        pass
    store.migration.begin()
    while store.migration.step():
        pass
    assert full - life.memory.resident() >= full // 4 > alone
    life.verify()
    store.close()


def test_a_step_is_short(sparse: Life) -> None:
    """One pageblock: at most 511 frames are copied. A machine with other work gets the best of many."""
    store = sparse.store
    store.compact()
    took = []
    store.migration.begin()
    while True:
        began = time.perf_counter_ns()
        if not store.migration.step():
            break
        took.append(time.perf_counter_ns() - began)
    assert len(took) >= 4
    assert min(took) < 3_000_000
    assert store.migration.stats().ns <= sum(took) * 2


# ---- meanwhile -----------------------------------------------------------------------------------------

def test_reads_and_writes_go_on_while_everything_moves(sparse: Life) -> None:
    """Readers see what is there, at each moment; writers are not refused."""
    store = sparse.store
    over = threading.Event()
    slots = sorted(sparse.pages)
    own = slots[::3]
    fixed = slots[1::3]

    def read() -> None:
        rng = random.Random(3)
        while not over.is_set():
            slot = rng.choice(fixed)
            assert store.read(slot * PAGE, PAGE) == sparse.pages[slot]

    def write() -> None:
        rng = random.Random(4)
        version = 0
        while not over.is_set():
            version += 1
            slot = rng.choice(own)
            page = page_of(slot, version % 50)
            store.write(slot * PAGE, page)
            sparse.pages[slot] = page

    def move() -> None:
        rng = random.Random(5)
        arena = store.migration.arena
        for _ in until(scaled(100, 30), lambda: store.migration.stats().migrated > 5000):
            store.migration.run()
            order = rng.randrange(10)
            try:
                frame = store.migration.alloc_contig(order)
            except MemoryError:
                continue
            first = rng.randrange(0, 8 * 512, 32)
            try:
                store.migration.alloc_contig_range(first, 32)
            except (OSError, MemoryError):
                pass
            else:
                for other in range(first, first + 32):
                    arena.free(other)
            arena.free(frame, order)
        over.set()

    in_threads(read, write, move, over=over)
    store.compact()
    sparse.verify()
    flags = flags_of_frames(store.migration.arena)
    assert {f for f in flags if f & USED} == {USED | MOVABLE}
    assert store.stats().failed_writes == 0


def test_two_compactors_at_once(sparse: Life) -> None:
    """`compact` in one thread while the compactor's slices run in another."""
    store = sparse.store
    over = threading.Event()

    def slices() -> None:
        while not over.is_set():
            store.compact_slice(200_000)
            store.migration.begin()
            while store.migration.step():
                pass

    def whole() -> None:
        for seed in range(6):
            store.compact()
            store.migration.run()
            for slot in random.Random(seed).sample(sorted(sparse.pages), 200):
                store.zero(slot * PAGE, PAGE)
                del sparse.pages[slot]
        over.set()

    in_threads(slices, whole, over=over)
    store.compact()
    store.migration.run()
    sparse.verify()
    assert store.winnable()[0] == 0


# ---- contiguous ------------------------------------------------------------------------------------------

def test_two_mebibytes_in_one_piece_out_of_a_full_arena(sparse: Life) -> None:
    """An arena of a store is larger than the machine, so a fresh pageblock is there; a given range has
    to be emptied."""
    store = sparse.store
    arena = store.migration.arena
    in_use = [n for n, state in enumerate(store.migration.pageblocks()) if state.resident]
    for pageblock in in_use[:4]:
        used = store.stats().frames_used
        store.migration.alloc_contig_range(pageblock * 512, 512)
        assert store.stats().frames_used == used + 512
        for frame in range(pageblock * 512, pageblock * 512 + 512):
            arena.frame(frame)[:] = os.urandom(1) * PAGE
        sparse.verify(2)
        arena.free(pageblock * 512, 9)
        assert store.stats().frames_used == used
    sparse.verify()


# ---- the balloon ----------------------------------------------------------------------------------------

def test_the_balloon_counts_against_the_limit() -> None:
    """And moves, without the device or the limit noticing."""
    limit = 20 * MIB
    store = Store(DISKSIZE, mem_limit=limit)
    data = random.Random(1).randbytes(12 * MIB)
    store.write(0, data)
    store.balloon.set_target(1500)
    assert store.balloon.adjust(5000, store.room()) == 1500
    assert store.room() == (limit - 12 * MIB) // PAGE - 1500 == 548
    for slot in range(0, 3072, 2):
        store.zero(slot * PAGE, PAGE)
    used = store.stats().mem_used_total
    store.compact()
    assert store.migration.run() > 0
    assert store.balloon.stats().pages == 1500 and store.balloon.stats().isolated == 0
    assert store.stats().mem_used_total == used
    assert store.room() == limit // PAGE - used // PAGE - 1500
    more = random.Random(2).randbytes(16 * MIB)
    with pytest.raises(OSError) as failure:
        store.write(16 * MIB, more)
    assert failure.value.errno == errno.ENOSPC
    assert failure.value.written == store.stats().mem_used_total - used == limit - used - 1500 * PAGE
    store.balloon.set_target(0)
    assert store.balloon.adjust(5000) == -1500
    rest = failure.value.written
    store.write(16 * MIB + rest, more[rest:rest + 1500 * PAGE])
    assert store.read(16 * MIB, rest + 1500 * PAGE) == more[:rest + 1500 * PAGE]
    for slot in range(1, 3072, 64):
        assert store.read(slot * PAGE, PAGE) == data[slot * PAGE:(slot + 1) * PAGE]
    store.check(3)
    store.close()


def test_the_balloon_gives_the_host_what_discards_left(sparse: Life) -> None:
    """It takes the holes first, so the memory file shrinks before anything is compacted."""
    store, memory = sparse.store, sparse.memory
    free = store.stats().frames_free
    before = memory.resident()
    store.balloon.set_target(free)
    assert store.balloon.adjust(free) == free
    assert before - memory.resident() >= (free - 512) * PAGE
    assert store.stats().frames_free == 0
    sparse.verify()
    store.balloon.set_target(0)
    store.balloon.adjust(free)
    assert store.migration.run() > 0
    sparse.verify()


# ---- the end ---------------------------------------------------------------------------------------------

def test_a_closed_store_is_not_compacted(sparse: Life) -> None:
    store = sparse.store
    store.migration.begin()
    store.migration.step()
    store.balloon.set_target(100)
    store.balloon.adjust(100)
    migration, balloon = store.migration, store.balloon
    store.close()
    for call in (migration.step, migration.begin, migration.stats, balloon.stats, lambda: balloon.adjust(1)):
        with pytest.raises(ValueError, match="closed"):
            call()
