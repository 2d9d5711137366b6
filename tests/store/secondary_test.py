# SPDX-License-Identifier: Apache-2.0
"""Secondary algorithms that a store takes and gives up while it is in use."""
from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.store.store_threads_test import eager_switches
from tests.support import alloc_hook
from tests.support.backing_tools import backed, backing_file, write_back
from tests.support.images import restored, saving
from tests.support.kill_points import copy_of
from tests.support.memory_file import MemoryFile
from tests.support.page_kinds import noise, prose, record
from tests.support.recompress_tools import recompress
from tests.support.share_tools import share
from tests.support.steps import at_work
from zramfs.codecs.codec import Codec
from zramfs.store.backing import Backing
from zramfs.store.recompress import Recompression
from zramfs.store.saving import SaveRun
from zramfs.store.secondary import (
    class_bytes,
    count_cold,
    count_priorities,
    drop_secondary,
    find_cold,
    set_secondary,
)
from zramfs.store.store import Store

__all__ = ["eager_switches"]

PAGE = 4096
N = 200


def learned(seed: int, level: int = 3) -> Codec:
    return Codec("zstd", level, record(seed) + record(seed + 1))


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store(N * PAGE, secondary=[Codec("zstd", 1)])
    for number in range(N):
        store.write(number * PAGE, record(number))
    yield store
    store.check(3)
    assert store.read(0, N * PAGE) == b"".join(map(record, range(N)))
    store.close()


def test_a_store_takes_an_algorithm_and_gives_it_up_when_no_page_needs_it(store: Store) -> None:
    before = store.stats().compr_data_size
    set_secondary(store, 2, learned(1000))
    assert store.generations == (0, 0, 1, 0) and store.codecs[2].dictionary == record(1000) + record(1001)
    assert recompress(store, 2).won == N and count_priorities(store) == (0, 0, N, 0)
    assert store.stats().compr_data_size < before * 0.7
    assert not drop_secondary(store, 2) and store.codecs[2] is not None
    for number in range(N):
        store.write(number * PAGE, record(number))
    assert drop_secondary(store, 2)
    assert store.codecs[2] is None and store.generations == (0, 0, 0, 0)
    set_secondary(store, 2, learned(2000))
    assert recompress(store, 2).won == N


@pytest.mark.parametrize("priority", [0, 4, -1])
def test_only_secondary_priorities_can_be_taken(store: Store, priority: int) -> None:
    with pytest.raises(ValueError, match="1 to 3 expected"):
        set_secondary(store, priority, learned(1))
    with pytest.raises(ValueError, match="1 to 3 expected"):
        drop_secondary(store, priority)


def test_what_was_configured_is_neither_replaced_nor_dropped(store: Store) -> None:
    with pytest.raises(OSError, match="has an algorithm") as caught:
        set_secondary(store, 1, learned(1))
    assert caught.value.errno == errno.EBUSY
    for priority in (1, 2):
        with pytest.raises(ValueError, match="no algorithm that the store took"):
            drop_secondary(store, priority)
    with pytest.raises(ValueError, match="none makes nothing smaller"):
        set_secondary(store, 2, Codec("none"))
    assert store.codecs[1].level == 1


def test_beside_post_processing_and_a_save_nothing_is_taken_or_dropped(store: Store) -> None:
    set_secondary(store, 2, learned(1))
    for other in (Recompression(store, 1), SaveRun(store)):
        with pytest.raises(OSError) as caught:
            set_secondary(store, 3, learned(1))
        assert caught.value.errno == errno.EBUSY
        with pytest.raises(OSError) as caught:
            drop_secondary(store, 2)
        assert caught.value.errno == errno.EBUSY
        other.finish()
        assert store.generations == (0, 0, 1, 0)
    assert drop_secondary(store, 2)


def test_pages_go_to_the_newest_dictionary_whatever_its_priority_is(store: Store) -> None:
    set_secondary(store, 3, learned(1000))
    assert recompress(store, 3).won == N
    set_secondary(store, 2, learned(1000))
    assert store.generations == (0, 0, 2, 1)
    # They become no smaller. But the older dictionary can go.
    done = recompress(store, 2)
    assert (done.won, done.bytes_saved) == (N, 0) and count_priorities(store) == (0, 0, N, 0)
    assert recompress(store, 3).tried == recompress(store, 1).tried == 0
    assert drop_secondary(store, 3)
    set_secondary(store, 3, Codec("zstd", 3, prose(1)))
    assert store.generations == (0, 0, 2, 3)
    done = recompress(store, 3)
    assert (done.won, done.tried) == (0, N), "they would become larger"
    assert not drop_secondary(store, 2)


def test_pages_that_count_as_incompressible_are_tried_again_when_that_is_wanted() -> None:
    store = Store(N * PAGE, secondary=[Codec("zstd", 1)])
    store.write(0, b"".join(map(noise, range(N))))
    assert recompress(store, 1).incompressible == N
    set_secondary(store, 2, learned(1))
    assert recompress(store, 2).tried == 0
    assert recompress(store, 2, again=True).tried == N


def test_a_configured_algorithm_marks_pages_as_incompressible_beside_a_dictionary(store: Store) -> None:
    set_secondary(store, 2, learned(1))
    store.write(0, noise(0))
    assert recompress(store, 1).incompressible > 0
    store.write(0, record(0))


def test_shared_and_written_back_pages_keep_the_dictionary(tmp_path: Path) -> None:
    with backed(tmp_path / "backing", 4 * PAGE) as store:
        store.write(0, record(1) + record(1) + record(2) + record(3))
        set_secondary(store, 1, learned(1000))
        assert recompress(store, 1).won == 4
        assert share(store).joined == 2
        store.zero(2 * PAGE, 2 * PAGE)
        assert count_priorities(store) == (0, 2, 0, 0) and not drop_secondary(store, 1)
        store.write(0, record(2))
        store.zero(PAGE, PAGE)
        assert recompress(store, 1).won == 1
        write_back(store)
        assert store.stats().written_back == 1 and count_priorities(store) == (0, 1, 0, 0)
        assert not drop_secondary(store, 1) and store.read(0, PAGE) == record(2)
        store.zero(0, PAGE)
        assert drop_secondary(store, 1)


def test_another_process_finds_the_dictionaries_and_their_order(store: Store) -> None:
    set_secondary(store, 3, learned(1000))
    recompress(store, 3, max_pages=50)
    set_secondary(store, 2, learned(2000, 9))
    recompress(store, 2, max_pages=100)
    copy = copy_of(store.migration.arena.fileno())
    again = Store.adopt(copy)
    os.close(copy)
    assert again.generations == store.generations == (0, 0, 2, 1) and again.recovered.lost == 0
    assert [each and each.dictionary for each in again.codecs] == [
        each and each.dictionary for each in store.codecs]
    assert again.read(0, N * PAGE) == store.read(0, N * PAGE)
    again.check(3)
    recompress(again, 2)
    assert count_priorities(again)[3] == 0 and drop_secondary(again, 3)
    set_secondary(again, 3, learned(3000))
    assert again.generations == (0, 0, 2, 3)
    again.check(3)


@pytest.mark.parametrize("tail", [b"[0, 0, 1]", b"{}", b"[0, 0, [], 1]", b"\xff", b"[" * 5000])
def test_a_damaged_list_of_generations_is_refused(store: Store, tail: bytes) -> None:
    from zlib import crc32

    body = store.migration.arena.note(0).partition(b" ")[2] + tail
    copy = copy_of(store.migration.arena.fileno())
    kept = Store.adopt(copy)
    kept.migration.arena.set_note(0, b"%08x " % crc32(body) + body)
    kept.leave()
    with pytest.raises(ValueError, match="note 0"):
        Store.adopt(copy)
    os.close(copy)


def test_an_image_has_the_dictionaries_of_its_pages(store: Store, tmp_path: Path) -> None:
    set_secondary(store, 2, learned(1000))
    recompress(store, 2)
    with saving(store, tmp_path / "image") as rest:
        rest()
    image, lost, damage = restored(tmp_path / "image")
    assert not lost and not damage and count_priorities(image) == (N, 0, 0, 0)
    assert image.read(0, N * PAGE) == store.read(0, N * PAGE)
    image.close()


def test_cold_pages_are_counted_and_found_without_a_trace(store: Store) -> None:
    store.access_times = True
    assert count_cold(store, True) == 0 and count_cold(store, False) == N
    store.mark_idle()
    store.read(0, 10 * PAGE)
    store.write(20 * PAGE, bytes(PAGE))
    assert count_cold(store, True) == N - 11
    before = MemoryFile(store.migration.arena.fileno()).slot(100)
    assert find_cold(store, True, range(N - 11)) == [*range(10, 20), *range(21, N)]
    assert find_cold(store, True, [0, 10, N - 12, N - 11, N]) == [10, 21, N - 1]
    assert find_cold(store, True, []) == []
    assert store.peek(100) == record(100)
    assert MemoryFile(store.migration.arena.fileno()).slot(100) == before
    store.write(20 * PAGE, record(20))


def test_a_size_class_is_what_an_object_takes(store: Store) -> None:
    sizes = [class_bytes(store, size) for size in range(1, PAGE + 1)]
    assert sizes == sorted(sizes) and sizes[-1] == PAGE
    assert all(taken >= size for size, taken in enumerate(sizes, 1))
    for size in (0, PAGE + 1):
        with pytest.raises(ValueError, match="1 to 4096"):
            class_bytes(store, size)


# ---- beside others ----------------------------------------------------------------------------------

def cycle(store: Store, rng: random.Random, counts: dict[str, int]) -> None:
    """Takes a dictionary, or drops one, and moves pages."""
    free = [priority for priority in (1, 2, 3) if store.codecs[priority] is None]
    if free and rng.random() < 0.5:
        set_secondary(store, rng.choice(free), learned(rng.randrange(50)))
        counts["taken"] += 1
    if any(store.generations):
        newest = max(range(4), key=store.generations.__getitem__)
        recompress(store, newest, max_pages=rng.choice((40, None)), again=True)
    for priority, generation in enumerate(store.generations):
        if generation and drop_secondary(store, priority):
            counts["dropped"] += 1


def test_readers_and_writers_never_notice_which_dictionaries_come_and_go(tmp_path: Path) -> None:
    """Of pages in the pool, shared ones and some on the backing store, whose readers unlock the slot before
    they unpack."""
    backing = Backing(str(backing_file(tmp_path / "backing")))
    store = Store(120 * PAGE, backing=backing)
    store.write(0, b"".join(record(number % 30) for number in range(120)))
    rng, counts = random.Random(1), {"taken": 0, "dropped": 0}

    def read() -> None:
        number = random.randrange(120)
        assert store.read(number * PAGE, PAGE) == record(number % 30)

    def write() -> None:
        number = random.randrange(120)
        store.write(number * PAGE, record(number % 30))

    def work() -> None:
        cycle(store, rng, counts)
        if rng.random() < 0.2:
            share(store)
        if rng.random() < 0.2:
            write_back(store, (0, 40))

    def tidy() -> None:
        store.compact()
        store.migration.run()
        time.sleep(0.001)

    until = time.monotonic() + 30
    with at_work(read, read, write, work, tidy) as failures:
        while time.monotonic() < until and not failures and min(counts.values()) < 30:
            time.sleep(0.01)
    assert min(counts.values()) >= 30
    store.check(3)
    for number in range(120):
        assert store.read(number * PAGE, PAGE) == record(number % 30)
    store.close()


A_READER_IS_LATE = """
import ctypes, sys, threading, time
from pathlib import Path
from tests.support.backing_tools import backed, write_back
from tests.support.page_kinds import record
from tests.store.secondary_test import PAGE, learned
from tests.support.recompress_tools import recompress
from zramfs.store.secondary import count_priorities, drop_secondary, set_secondary
library = ctypes.CDLL(sys.argv[1])
hold_fd, held = (ctypes.c_int.in_dll(library, name) for name in ("hold_fd", "held"))
with backed(Path(sys.argv[2]), 4 * PAGE) as store:
    store.write(0, record(1))
    set_secondary(store, 1, learned(1000))
    assert recompress(store, 1).won == 1
    write_back(store)
    assert count_priorities(store) == (0, 1, 0, 0)
    found = []
    hold_fd.value = store.backing.fileno()
    reader = threading.Thread(target=lambda: found.append(store.read(0, PAGE)))
    reader.start()
    while held.value == 0:
        time.sleep(0.001)
    store.write(0, record(2))
    assert count_priorities(store) == (1, 0, 0, 0)
    refused = not drop_secondary(store, 1)
    hold_fd.value = -1
    reader.join()
    assert refused and found == [record(1)]
    assert drop_secondary(store, 1) and store.read(0, PAGE) == record(2)
"""


@pytest.mark.requires("cc")
def test_an_algorithm_stays_while_a_thread_reads_an_object_that_has_no_slot_any_more(tmp_path: Path) -> None:
    alloc_hook.run(A_READER_IS_LATE, tmp_path, str(tmp_path / "backing"), source="held_reads.c")


AN_ESTIMATE_IS_LATE = """
import ctypes, sys, threading, time
from tests.support.page_kinds import record
from tests.store.secondary_test import PAGE, learned
from tests.support.recompress_tools import recompress
from zramfs.store.estimate import Estimating
from zramfs.store.secondary import count_priorities, drop_secondary, set_secondary
from zramfs.store.store import Store
library = ctypes.CDLL(sys.argv[1])
hold, held = (ctypes.c_int.in_dll(library, name) for name in ("hold", "held"))
store = Store(4 * PAGE)
store.write(0, record(1))
set_secondary(store, 1, learned(1000))
assert recompress(store, 1).won == 1
work = Estimating(store)
results = []
def look():
    while work.step(1_000_000):
        pass
    results.append(work.result())
hold.value = 1
looker = threading.Thread(target=look)
looker.start()
while held.value == 0:
    time.sleep(0.001)
store.write(0, record(2))
assert count_priorities(store) == (1, 0, 0, 0)
refused = not drop_secondary(store, 1)
hold.value = 0
looker.join()
work.finish()
assert refused and results[0].sampled_pages == 1
assert drop_secondary(store, 1) and store.read(0, PAGE) == record(2)
"""


@pytest.mark.requires("cc")
def test_an_algorithm_stays_while_an_estimate_unpacks_an_object_that_has_no_slot_any_more(
    tmp_path: Path
) -> None:
    alloc_hook.run(AN_ESTIMATE_IS_LATE, tmp_path, source="held_unpacking.c")


EVERY_ALLOCATION_FAILS = """
import ctypes, sys
from tests.support.page_kinds import record
from zramfs.codecs.codec import Codec
from zramfs.store.secondary import drop_secondary, set_secondary
from zramfs.store.store import Store
fail_at = ctypes.c_int.in_dll(ctypes.CDLL(sys.argv[1]), "alloc_fail_at")
store = Store(1 << 20)
for number in range(256):
    store.write(number * 4096, record(number))
codec, failures = Codec("zstd", 3, record(1000)), 0
while True:
    fail_at.value = failures + 1
    try:
        set_secondary(store, 2, codec)
        failed = False
    except MemoryError as error:
        failed = True
    fail_at.value = 0
    store.check(3)
    if not failed:
        break
    assert store.codecs[2] is None and not any(store.generations)
    failures += 1
assert drop_secondary(store, 2)
print(failures)
"""


@pytest.mark.requires("cc")
def test_every_allocation_of_a_dictionary_fails_once(tmp_path: Path) -> None:
    assert int(alloc_hook.run(EVERY_ALLOCATION_FAILS, tmp_path)) >= 1
