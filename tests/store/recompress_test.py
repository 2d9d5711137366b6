# SPDX-License-Identifier: Apache-2.0
"""Recompression: which pages it takes, in which order, what becomes of them; under load, cut short at
every point, and with every allocation failing."""
from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support import alloc_hook, models
from tests.support.memory_file import MemoryFile, Slot
from tests.support.page_kinds import KINDS, block, hard, noise, prose
from tests.support.recompress_tools import recompress
from tests.support.side_by_side import together
from zramfs.codecs.codec import Codec
from zramfs.model.stats import RecompressionStats
from zramfs.store.recompress import Recompression
from zramfs.store.store import Store

PAGE = 4096
MIB = 1 << 20
SLICE = 200_000  # nanoseconds


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store(4 * MIB, secondary=[Codec("zstd", 3), Codec("zstd", 12)])
    yield store
    store.check(3)
    store.close()


def slots(store: Store, n: int) -> list[Slot]:
    file = MemoryFile(store.migration.arena.fileno())
    return [file.slot(slot) for slot in range(n)]


# ---- what becomes of a page -------------------------------------------------------------------------

def test_pages_become_smaller_and_keep_their_bytes(store: Store) -> None:
    pages = [prose(n) for n in range(100)] + [hard(n) for n in range(20)]
    store.write(0, b"".join(pages))
    before = store.stats()
    assert before.huge_pages == 20
    stats = recompress(store)
    after = store.stats()
    assert stats == RecompressionStats(
        tried=120, won=120, bytes_saved=before.compr_data_size - after.compr_data_size)
    zstd = Codec("zstd", 3)
    assert after.compr_data_size == sum(len(zstd.compress(page)) for page in pages)
    assert (after.huge_pages, after.huge_pages_since) == (0, 20)
    assert after.orig_data_size == before.orig_data_size
    assert {(s.type, s.prio) for s in slots(store, 120)} == {("obj", 1)}
    assert store.read(0, 120 * PAGE) == b"".join(pages)


def test_what_is_not_taken(store: Store) -> None:
    """Same-filled and empty pages, what was compressed with that priority already, and incompressible."""
    store.write(0, bytes(PAGE) + b"abcdefg\xff" * 512 + prose(1) + noise(1))
    assert recompress(store, 2).tried == 2
    found = slots(store, 4)
    assert [(s.type, s.prio, s.incompressible) for s in found] == [
        ("same", 0, False), ("same_obj", 0, False), ("obj", 2, False), ("huge", 0, True)]
    for priority in (1, 2):
        assert recompress(store, priority) == RecompressionStats()


def test_only_the_highest_priority_marks_a_page_incompressible(store: Store) -> None:
    store.write(0, noise(1))
    assert recompress(store, 1) == RecompressionStats(tried=1, kept=1)
    assert not slots(store, 1)[0].incompressible
    assert recompress(store, 2) == RecompressionStats(tried=1, kept=1, incompressible=1)
    assert slots(store, 1)[0].incompressible
    store.write(0, prose(1))
    assert not slots(store, 1)[0].incompressible


def test_a_win_inside_the_size_class_is_none(store: Store) -> None:
    """A page stays where the new object would be smaller, but not in a smaller class."""
    lz4, zstd = Codec("lz4"), Codec("zstd", 3)
    for n in range(20_000):
        page = random.Random(n).randbytes(3200 + n % 300)
        page += bytes(PAGE - len(page))
        old, new = len(lz4.compress(page)), len(zstd.compress(page))
        if new < old < models.HUGE and models.size_class(new) == models.size_class(old):
            break
    store.write(0, page)
    assert recompress(store, 1) == RecompressionStats(tried=1, kept=1)
    assert slots(store, 1)[0].prio == 0 and store.stats().compr_data_size == old


def test_idle_and_huge_choose(store: Store) -> None:
    store.write(0, prose(1) + hard(1) + prose(2) + hard(2))
    store.mark_idle()
    store.read(2 * PAGE, 2 * PAGE)
    store.check(1)
    assert recompress(store, 1, idle=True, huge=True).tried == 1
    assert [s.prio for s in slots(store, 4)] == [0, 1, 0, 0]
    assert recompress(store, 1, huge=True).tried == 1
    assert [s.prio for s in slots(store, 4)] == [0, 1, 0, 1]
    assert recompress(store, 1, idle=True).tried == 1
    assert [s.prio for s in slots(store, 4)] == [1, 1, 0, 1]
    assert not any(s.idle for s in slots(store, 4)), "what was tried is idle no longer"


def test_what_was_tried_in_vain_is_idle_no_longer(store: Store) -> None:
    store.write(0, noise(1))
    store.mark_idle()
    assert recompress(store, 1, idle=True).kept == 1
    assert not slots(store, 1)[0].idle


def test_threshold_leaves_small_objects_and_refuses_large_results(store: Store) -> None:
    pages = [prose(1), hard(1)]
    store.write(0, b"".join(pages))
    small, large = (len(Codec("zstd", 3).compress(page)) for page in pages)
    old = len(Codec("lz4").compress(pages[0]))
    assert recompress(store, 1, threshold=old + 1) == RecompressionStats(tried=1, kept=1)
    assert recompress(store, 1, threshold=large + 1).won == 1
    assert recompress(store, 1, threshold=small).won == 0
    assert recompress(store, 1, threshold=small + 1).won == 1
    assert recompress(store, 1, threshold=models.HUGE - 1) == RecompressionStats()


def test_the_largest_objects_come_first(store: Store) -> None:
    order = list(range(40))
    random.Random(1).shuffle(order)
    for slot, n in enumerate(order):
        text = prose(n)[: 1000 + 60 * n]
        store.write(slot * PAGE, text + bytes(PAGE - len(text)))
    assert recompress(store, 1, max_pages=10).tried == 10
    done = {order[slot] for slot, s in enumerate(slots(store, 40)) if s.prio == 1}
    # Within 64 bytes the order is open.
    assert len(done) == 10 and min(done) >= 28


def test_a_result_above_the_threshold_is_a_failure_of_the_highest_priority(store: Store) -> None:
    store.write(0, hard(1))
    large = len(Codec("zstd", 12).compress(hard(1)))
    assert recompress(store, 2, threshold=large) == RecompressionStats(tried=1, kept=1, incompressible=1)
    assert slots(store, 1)[0].incompressible


def test_max_pages_counts_tries(store: Store) -> None:
    store.write(0, noise(1) + noise(2) + noise(3) + prose(1))
    assert recompress(store, 1, max_pages=0) == RecompressionStats()
    assert recompress(store, 1, max_pages=3) == RecompressionStats(tried=3, kept=3)
    assert recompress(store, 1, max_pages=4).won == 1


def test_with_a_dictionary() -> None:
    dictionary = b"".join(prose(n) for n in range(4)) + b"the quick brown fox jumps over the lazy dog" * 9
    store = Store(MIB, dictionary=dictionary, secondary=[Codec("lz4hc", 12, dictionary)])
    pages = [prose(n % 4)[:3000] + prose(100 + n)[:1096] for n in range(40)]
    store.write(0, b"".join(pages))
    plain = sum(len(Codec("lz4").compress(page)) for page in pages)
    assert store.stats().compr_data_size < plain * 0.6
    assert recompress(store).won > 0
    assert store.read(0, 40 * PAGE) == b"".join(pages)
    store.check(3)
    store.close()


# ---- arguments and life -----------------------------------------------------------------------------------

@pytest.mark.parametrize("priority, how", [
    (0, {}), (3, {}), (4, {}), (-1, {}), (1, {"threshold": models.HUGE}), (1, {"threshold": -1})])
def test_bad_arguments(store: Store, priority: int, how: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        Recompression(store, priority, **how)
    assert recompress(store).tried == 0, "nothing is left behind"


def test_one_at_a_time(store: Store) -> None:
    first = Recompression(store, 1)
    with pytest.raises(OSError) as failure:
        Recompression(store, 2)
    assert failure.value.errno == errno.EBUSY
    first.finish()
    assert first.finish() == RecompressionStats()
    for call in (first.select, first.step):
        with pytest.raises(ValueError, match="is finished"):
            call(1)
    second = Recompression(store, 2)
    del second
    assert recompress(store, 2).tried == 0


def test_none_is_no_secondary_algorithm() -> None:
    with pytest.raises(ValueError, match="none makes nothing smaller"):
        Store(MIB, secondary=[Codec("none")])
    with pytest.raises(ValueError, match="at most 3 secondary"):
        Store(MIB, secondary=[Codec("lz4")] * 4)


def test_a_gap_between_the_priorities() -> None:
    store = Store(MIB, secondary=[None, Codec("zstd", 9)])
    store.write(0, prose(1) + noise(1))
    with pytest.raises(ValueError):
        Recompression(store, 1)
    assert recompress(store, 2) == RecompressionStats(
        tried=2, won=1, kept=1, incompressible=1,
        bytes_saved=len(Codec("lz4").compress(prose(1))) - len(Codec("zstd", 9).compress(prose(1))))
    store.check(3)
    store.close()


@pytest.mark.parametrize("steps", [None, 0, 1, 5])
def test_cut_short_anywhere(steps: int | None) -> None:
    """steps None: in the middle of the selection."""
    store = Store(16 * MIB, secondary=[Codec("zstd", 3)])
    data = b"".join(prose(n % 7) for n in range(4096))
    store.write(0, data)
    job = Recompression(store, 1)
    more = job.select(1)
    if steps is not None:
        while job.select(SLICE):
            pass
        for _ in range(steps):
            assert job.step(1)
    else:
        assert more
    stats = job.finish()
    assert stats.won == (steps or 0)
    assert store.read(0, 16 * MIB) == data
    store.check(3)
    store.close()


def test_a_store_that_is_closed_first() -> None:
    store = Store(MIB, secondary=[Codec("zstd", 3)])
    store.write(0, prose(1) * 200)
    job = Recompression(store, 1)
    while job.select(SLICE):
        pass
    store.close()
    with pytest.raises(ValueError, match="closed"):
        job.step(1)
    assert job.finish().tried == 0


# ---- used meanwhile ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["read", "write", "discard", "part"])
def test_what_is_used_between_the_stages_is_left_alone(store: Store, kind: str) -> None:
    store.write(0, prose(1) + prose(2))
    job = Recompression(store, 1)
    assert not job.select(1 << 40)
    match kind:
        case "read":
            store.read(0, PAGE)
        case "write":
            store.write(0, prose(3))
        case "part":
            store.write(50, b"x")
        case "discard":
            store.zero(0, PAGE)
    while job.step(1):
        pass
    assert job.finish().won == 1
    assert [s.prio for s in slots(store, 2)] == [0, 1]


def test_object_compaction_between_the_stages_does_no_harm(store: Store) -> None:
    for n in range(1000):
        store.write(n * PAGE, prose(n % 50))
    for n in range(1000):
        if n % 3:
            store.zero(n * PAGE, PAGE)
    job = Recompression(store, 1)
    assert not job.select(1 << 40)
    store.compact()
    while job.step(1):
        store.compact()
    assert job.finish().won == 334
    assert all(store.read(n * PAGE, PAGE) == prose(n % 50) for n in range(0, 1000, 3))


def test_under_load_with_everything_else_at_work(store: Store) -> None:
    began = time.monotonic()
    pages = {kind: [block(kind, n, PAGE) for n in range(8)] for kind in KINDS}
    pages["prose"] = [prose(n) for n in range(8)]
    pages["hard"] = [hard(n) for n in range(8)]
    totals = RecompressionStats()

    def again(work: Callable[[], None]) -> None:
        while (lasted := time.monotonic() - began) < 1.5 or totals.won <= 100 and lasted < 60:
            work()

    def user(first: int) -> Callable[[], None]:
        rng, mine = random.Random(first), {}

        def work() -> None:
            slot = first + rng.randrange(256)
            mine[slot] = rng.choice(pages[rng.choice(list(pages))])
            store.write(slot * PAGE, mine[slot])
            slot = rng.choice(list(mine))
            assert store.read(slot * PAGE, PAGE) == mine[slot]
            if rng.random() < 0.1:
                store.zero(slot * PAGE, PAGE)
                mine[slot] = bytes(PAGE)

        return work

    def job() -> None:
        nonlocal totals
        store.mark_idle()
        totals += recompress(store, random.choice((1, 2)), idle=random.random() < 0.5)

    def keep_house() -> None:
        store.compact()
        store.migration.run()
        time.sleep(0.002)

    together(*(partial(again, work) for work in (user(0), user(256), user(512), job, keep_house)))
    assert totals.won > 100
    assert totals.tried == totals.won + totals.kept + totals.no_room + totals.busy
    recompress(store, 1)
    assert not any(s.post for s in slots(store, 1024))


# ---- shortage ----------------------------------------------------------------------------------------------

def test_every_frame_that_is_lacking() -> None:
    """Where the new object finds no frame, the page stays as it was; the others go on."""
    nth = 0
    while True:
        nth += 1
        store = Store(MIB, secondary=[Codec("zstd", 3)])
        data = b"".join(random.Random(n).choice((prose, hard, noise))(n) for n in range(100))
        store.write(0, data)
        store.inject_failure(nth)
        stats = recompress(store)
        assert store.read(0, len(data)) == data
        store.check(3)
        assert stats.tried == 100 and stats.no_room <= 1
        store.inject_failure(0)
        assert recompress(store).won >= stats.no_room
        store.check(3)
        store.close()
        if stats.no_room == 0:
            break
    assert nth > 5


def test_a_pool_at_its_limit_becomes_smaller() -> None:
    """The limit gives way by 256 KiB for that; writers see none of it."""
    store = Store(4 * MIB, secondary=[Codec("zstd", 3)])
    pages = {n: random.Random(n).choice((prose, hard))(n) for n in range(500)}
    for n, page in pages.items():
        store.write(n * PAGE, page)
    limit = store.stats().mem_used_total
    store.set_mem_limit(limit)
    with pytest.raises(OSError):
        store.write(600 * PAGE, noise(1) * 2)
    assert recompress(store).won == 500
    assert limit <= store.stats().mem_used_max <= limit + 64 * PAGE
    store.compact()
    assert store.stats().mem_used_total < 0.75 * limit
    store.write(600 * PAGE, noise(1) * 2)
    assert all(store.read(n * PAGE, PAGE) == page for n, page in pages.items())
    store.check(3)
    store.close()


def test_a_pool_far_beyond_its_limit_finds_no_room() -> None:
    store = Store(4 * MIB, secondary=[Codec("zstd", 3)])
    pages = [hard(n) for n in range(200)]
    store.write(0, b"".join(pages))
    store.set_mem_limit(100 * PAGE)
    stats = recompress(store)
    assert (stats.tried, stats.won, stats.no_room) == (200, 0, 200)
    assert store.read(0, 200 * PAGE) == b"".join(pages)
    store.check(3)
    store.close()


EVERY_ALLOCATION_FAILS = """
import ctypes, sys
from tests.support.page_kinds import hard, prose
from zramfs.codecs.codec import Codec
from zramfs.store.recompress import Recompression
from zramfs.store.store import Store
fail_at = ctypes.c_int.in_dll(ctypes.CDLL(sys.argv[1]), "alloc_fail_at")
data = b"".join([prose(n % 20) for n in range(1600)] + [hard(n % 20) for n in range(800)])
failures = 0
while True:
    store = Store(16 << 20, secondary=[Codec("zstd", 1)])
    store.write(0, data)
    fail_at.value = failures + 1
    job = None
    try:
        job = Recompression(store, 1)
        while job.select(100_000):
            pass
        while job.step(1_000_000):
            pass
        failed = False
    except MemoryError as error:
        failed = True
    fail_at.value = 0
    if job is not None:
        job.finish()
    store.check(3)
    assert store.read(0, len(data)) == data
    if failed:
        failures += 1
        # What failed works now.
        job = Recompression(store, 1)
        while job.select(1 << 40):
            pass
        while job.step(1 << 40):
            pass
        assert job.finish().won == 2400
        store.check(3)
    store.close()
    if not failed:
        break
print(failures)
"""


def test_every_allocation_of_a_recompression_fails_once(tmp_path: Path) -> None:
    """Its context, and what remembers the pages: 511 to an allocation, for each 64 bytes of size."""
    assert int(alloc_hook.run(EVERY_ALLOCATION_FAILS, tmp_path)) >= 5
