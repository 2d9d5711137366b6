# SPDX-License-Identifier: Apache-2.0
"""What the store offers to a compactor: slices, what there is to win, a wake-up, room for the balloon."""
import os
import random
import time
from collections.abc import Iterator

import pytest

from tests.support import models
from tests.support.page_kinds import page_of_size
from zramfs.store.store import Store

PAGE = 4096
SIZES = (200, 900, 1500, 2300, 3000, 3600, 3700)


@pytest.fixture
def sparse() -> Iterator[tuple[Store, dict[int, bytes]]]:
    """A store of which two thirds have been discarded, here and there, and what is left."""
    store = Store(16 << 20)
    rng = random.Random(1)
    pages = {index: page_of_size(rng.choice(SIZES)) for index in range(4096)}
    for index, page in pages.items():
        store.write(index * PAGE, page)
    for index in rng.sample(range(4096), 2700):
        store.zero(index * PAGE, PAGE)
        del pages[index]
    yield store, pages
    store.close()


def freeable(store: Store) -> int:
    return sum(c.freeable for c in store.classes())


def test_slices_end_where_one_run_would(sparse: tuple[Store, dict[int, bytes]]) -> None:
    store, pages = sparse
    promised = freeable(store)
    assert promised > 300
    slices = 0
    while store.compact_slice(20_000):
        slices += 1
        store.check(2)
        assert slices < 10_000
    assert slices > 3, "20 us are no time for all of it"
    assert (freeable(store), store.stats().pages_compacted) == (0, promised)
    fewest = models.fewest_pages(models.kept(page).object for page in pages.values())
    assert store.stats().mem_used_total == fewest * PAGE
    assert all(store.read(index * PAGE, PAGE) == page for index, page in pages.items())


def test_the_next_round_of_slices_begins_anew(sparse: tuple[Store, dict[int, bytes]]) -> None:
    store, pages = sparse
    while store.compact_slice(1_000_000):
        pass
    for index in list(pages)[::2]:
        store.zero(index * PAGE, PAGE)
    assert freeable(store) > 0
    while store.compact_slice(1_000_000):
        pass
    assert freeable(store) == 0


def test_a_slice_of_no_time_does_nothing(sparse: tuple[Store, dict[int, bytes]]) -> None:
    store, _ = sparse
    promised = freeable(store)
    assert store.compact_slice(0) is True
    assert freeable(store) == promised


def test_slices_are_short(sparse: tuple[Store, dict[int, bytes]]) -> None:
    """The time asked for, and at most what eight zspages take; a machine with other work gets ten tries."""
    store, _ = sparse
    longest = []
    for _ in range(10):
        began = time.perf_counter_ns()
        store.compact_slice(100_000)
        longest.append(time.perf_counter_ns() - began)
    assert min(longest) < 2_000_000


def test_what_is_winnable_is_won(sparse: tuple[Store, dict[int, bytes]]) -> None:
    store, _ = sparse
    blocks, in_use = store.winnable()
    assert in_use == store.stats().pageblocks_in_use and blocks >= 3
    store.compact()
    store.migration.run()
    assert store.stats().pageblocks_in_use == in_use - blocks
    assert store.winnable() == (0, in_use - blocks)


def test_nothing_is_winnable_in_a_dense_store() -> None:
    store = Store(8 << 20)
    assert store.winnable() == (0, 0)
    store.write(0, random.Random(1).randbytes(8 << 20))
    assert store.winnable() == (0, 4)


# ---- the wake-up -------------------------------------------------------------------------------------

@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


def wakes(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def test_the_wake_up_comes_once_and_in_time(event: int) -> None:
    store = Store(1 << 20)
    store.write(0, random.Random(1).randbytes(100 * PAGE))
    store.wake_after(10, event)
    store.zero(0, 9 * PAGE)
    assert (wakes(event), store.frees) == (0, 9)
    store.zero(0, 10 * PAGE)
    assert (wakes(event), store.frees) == (1, 10)
    store.zero(0, 50 * PAGE)
    assert (wakes(event), store.frees) == (0, 50)
    store.wake_after(5, event)
    # An overwrite frees the old object; a page without an object frees nothing.
    store.write(60 * PAGE, random.Random(2).randbytes(4 * PAGE))
    store.write(200 * PAGE, bytes(50 * PAGE))
    store.zero(200 * PAGE, 50 * PAGE)
    assert (wakes(event), store.frees) == (0, 54)
    store.write(60 * PAGE, b"x")
    assert (wakes(event), store.frees) == (1, 55)


def test_a_later_wake_up_replaces_an_earlier_one(event: int) -> None:
    store = Store(1 << 20)
    store.write(0, random.Random(1).randbytes(100 * PAGE))
    store.wake_after(3, event)
    store.wake_after(20, event)
    store.zero(0, 19 * PAGE)
    assert wakes(event) == 0
    store.zero(19 * PAGE, PAGE)
    assert wakes(event) == 1


def test_the_stores_descriptor_is_its_own(event: int) -> None:
    store = Store(1 << 20)
    store.write(0, random.Random(1).randbytes(4 * PAGE))
    open_files = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        store.wake_after(2, event)
    assert len(os.listdir("/proc/self/fd")) == open_files + 1
    store.close()
    # The memory file goes too.
    assert len(os.listdir("/proc/self/fd")) == open_files - 1


# ---- room for the balloon ---------------------------------------------------------------------------

def test_room() -> None:
    store = Store(1 << 20)
    assert store.room() is None
    store.write(0, random.Random(1).randbytes(20 * PAGE))
    store.set_mem_limit(50 * PAGE)
    assert store.room() == 30
    store.balloon.set_target(12)
    assert store.balloon.adjust(100, store.room()) == 12
    assert store.room() == 18
    store.write(30 * PAGE, random.Random(2).randbytes(18 * PAGE))
    assert store.room() == 0
    with pytest.raises(OSError):
        store.write(60 * PAGE, random.Random(3).randbytes(PAGE))
    store.set_mem_limit(10 * PAGE)
    assert store.room() == 0
    store.set_mem_limit(50 * PAGE)
    store.balloon.set_target(0)
    assert store.balloon.adjust(100) == -12
    store.write(60 * PAGE, random.Random(3).randbytes(12 * PAGE))
    store.check(3)
