# SPDX-License-Identifier: Apache-2.0
"""What the store takes from the machine, what it gives back, and what it does when there is no more."""
import errno
import random

import pytest

from tests.support import models
from tests.support.memory_file import MemoryFile, resident_set
from tests.support.page_kinds import block, page_of_size
from zramfs.store.store import Store

PAGE = 4096
MIB = 1 << 20
TIB = 1 << 40
CHUNK = 512 * PAGE  # of the device, for each page of the slot table


def memory_file(store: Store) -> MemoryFile:
    return MemoryFile(store.migration.arena.fileno())


# ---- memory that is not used ------------------------------------------------------------------------

def look_everywhere(store: Store) -> None:
    """Every call on a device that holds nothing, over all of a TiB."""
    store.zero(0, TIB)
    store.zero(12345, TIB - 54321)
    with pytest.raises(OSError) as failure:
        store.seek(0, False)
    assert failure.value.errno == errno.ENXIO
    assert store.seek(5, True) == 5
    rng = random.Random(1)
    for _ in range(2000):
        assert not any(store.read(rng.randrange(TIB - 100), 100))
    assert not any(store.read(TIB // 3, 32 * MIB))


@pytest.mark.requires("unsanitized")
def test_a_tebibyte_costs_nothing_until_it_is_written() -> None:
    store = Store(TIB)
    file = memory_file(store)
    look_everywhere(store)
    assert file.resident() <= 2 * PAGE
    store.write(TIB - PAGE, b"the last page")
    assert store.seek(0, False) == TIB - PAGE
    assert store.read(TIB - PAGE, 13) == b"the last page"
    store.check(3)
    # Pages of each array, for one slot, and the 16 frames that get their memory together.
    assert file.resident() <= 32 * PAGE
    store.close()


@pytest.mark.requires("unsanitized")
def test_a_tebibyte_costs_the_process_nothing() -> None:
    """The counters of its chunks alone have 2 MiB, of which nothing is there."""
    before = resident_set()
    store = Store(TIB)
    look_everywhere(store)
    assert resident_set() - before < 3 * MIB // 2
    store.close()


@pytest.mark.requires("unsanitized")
def test_the_largest_device() -> None:
    store = Store(1 << 48)
    store.write((1 << 48) - 1, b"!")
    assert store.read((1 << 48) - 2, 2) == b"\0!"
    assert memory_file(store).resident() <= 32 * PAGE
    store.close()


def test_the_slot_table_goes_back_with_the_last_slot_of_a_chunk() -> None:
    store = Store(64 * CHUNK)
    file = memory_file(store)
    empty = file.resident()
    for chunk in range(64):
        store.write(chunk * CHUNK + chunk * PAGE, b"\1" * PAGE)  # in the slot: no pool page
    assert file.resident() - empty == 64 * PAGE
    store.zero(7 * CHUNK, CHUNK)
    assert file.resident() - empty == 63 * PAGE
    store.zero(0, 32 * CHUNK)
    assert file.resident() - empty == 32 * PAGE
    store.write(7 * CHUNK, b"\1" * PAGE)
    assert store.read(7 * CHUNK, 2 * PAGE) == b"\1" * PAGE + bytes(PAGE)
    store.zero(0, 64 * CHUNK)
    assert file.resident() == empty
    store.check(3)


def test_looking_at_an_empty_chunk_costs_no_slot_table() -> None:
    store = Store(64 * CHUNK)
    file = memory_file(store)
    empty = file.resident()
    for chunk in range(64):
        store.read(chunk * CHUNK, PAGE)
        store.seek(chunk * CHUNK, True)
        store.zero(chunk * CHUNK + 5, PAGE)
    assert file.resident() == empty


def test_a_write_that_fails_leaves_no_slot_table_behind() -> None:
    store = Store(64 * CHUNK, mem_limit=PAGE)
    file = memory_file(store)
    store.write(0, page_of_size(3625))
    full = file.resident()
    for chunk in range(1, 64):
        for data in (page_of_size(3000), b"partial"):
            with pytest.raises(OSError):
                store.write(chunk * CHUNK, data)
    assert file.resident() == full
    store.check(3)


def test_a_full_discard_gives_everything_back() -> None:
    store = Store(32 * MIB)
    file = memory_file(store)
    empty = file.resident()
    rng = random.Random(3)
    for off in range(0, 32 * MIB, MIB):
        store.write(off, rng.randbytes(MIB // 2) + block("text", off, MIB // 2))
    stats = store.stats()
    assert file.resident() - empty > stats.mem_used_total > 16 * MIB
    assert stats.resident >= stats.mem_used_total
    store.zero(0, 32 * MIB)
    stats = store.stats()
    assert stats.mem_used_total == stats.resident == stats.orig_data_size == stats.compr_data_size == 0
    assert stats.bytes_returned >= 16 * MIB
    # Descriptors of frames and zspages stay: 80 bytes for each frame that was ever used, and their pages.
    assert file.resident() - empty <= stats.bytes_returned // PAGE * 80 + 16 * PAGE
    store.check(3)
    store.close()


def test_compaction_and_migration_return_memory() -> None:
    """A third of the pages, here and there, is left: their memory is what stays resident."""
    store = Store(32 * MIB)
    file = memory_file(store)
    rng = random.Random(4)
    pages = {}
    for index in range(8192):
        pages[index] = rng.randbytes(rng.choice([600, 1500, 2500])).ljust(PAGE, b"\0")
        store.write(index * PAGE, pages[index])
    for index in rng.sample(range(8192), 5500):
        store.zero(index * PAGE, PAGE)
        del pages[index]
    full = file.resident()
    sparse = store.stats()
    promised = sum(c.freeable for c in store.classes())
    assert store.compact() == promised > 1000
    model_pages = models.fewest_pages(models.lz4_size(page) for page in pages.values())
    assert store.stats().mem_used_total == model_pages * PAGE
    assert store.stats().pages_compacted == promised
    store.migration.run()
    dense = store.stats()
    assert dense.pageblocks_in_use == -(-model_pages // 512)
    assert full - file.resident() >= sparse.mem_used_total - dense.resident > 6 * MIB
    assert all(store.read(index * PAGE, PAGE) == page for index, page in pages.items())
    store.check(3)
    store.close()


# ---- a full pool ------------------------------------------------------------------------------------------

def fill(store: Store, seed: int = 0) -> dict[int, bytes]:
    """Writes page after page until one fails."""
    pages: dict[int, bytes] = {}
    rng = random.Random(seed)
    for index in range(store.disksize // PAGE):
        page = rng.randbytes(rng.choice([300, 1000, 2000, 4096])).ljust(PAGE, b"\0")
        try:
            store.write(index * PAGE, page)
        except OSError as error:
            assert error.errno == errno.ENOSPC and error.written == 0
            return pages
        pages[index] = page
    raise AssertionError("the device took everything")


def assert_content(store: Store, pages: dict[int, bytes]) -> None:
    for index, page in pages.items():
        assert store.read(index * PAGE, PAGE) == page, index


def test_a_full_pool_keeps_the_old_data_of_every_page() -> None:
    store = Store(8 * MIB, mem_limit=1 * MIB)
    pages = fill(store)
    stats = store.stats()
    assert len(pages) >= 200 and stats.mem_used_total <= MIB == stats.mem_limit
    failed = stats.failed_writes
    rng = random.Random(9)
    refused = 0
    for index in pages:
        page = rng.randbytes(PAGE)
        try:
            store.write(index * PAGE, page)
            pages[index] = page
        except OSError as error:
            assert error.errno == errno.ENOSPC and error.written == 0
            refused += 1
    assert refused > 100
    assert store.stats().failed_writes == failed + refused
    assert store.stats().mem_used_total <= MIB
    assert_content(store, pages)
    store.check(3)


def test_freeing_makes_writes_work_again() -> None:
    store = Store(8 * MIB, mem_limit=1 * MIB)
    pages = fill(store)
    beyond = len(pages)
    with pytest.raises(OSError):
        store.write(beyond * PAGE, random.Random(1).randbytes(PAGE))
    for index in list(pages)[:200]:
        store.zero(index * PAGE, PAGE)
        pages[index] = bytes(PAGE)
    for index in range(beyond, beyond + 20):
        pages[index] = random.Random(index).randbytes(PAGE)
        store.write(index * PAGE, pages[index])
    assert_content(store, pages)
    store.check(3)


def test_raising_the_limit_makes_writes_work_again() -> None:
    store = Store(8 * MIB, mem_limit=MIB // 2)
    pages = fill(store)
    store.set_mem_limit(0)
    pages[len(pages)] = random.Random(1).randbytes(PAGE)
    store.write((len(pages) - 1) * PAGE, pages[len(pages) - 1])
    store.set_mem_limit(4097)
    assert store.stats().mem_limit == 2 * PAGE
    assert_content(store, pages)


def test_same_filled_pages_fit_into_a_full_pool() -> None:
    store = Store(8 * MIB, mem_limit=MIB // 2)
    pages = fill(store)
    for index in (0, 3, 2000):
        pages[index] = b"\7" * PAGE
        store.write(index * PAGE, pages[index])
    assert_content(store, pages)


def test_a_write_that_ends_half_way_says_how_far_it_came() -> None:
    store = Store(MIB, mem_limit=10 * PAGE)
    old = block("zeros", 0, 20 * PAGE)
    store.write(0, old)
    data = random.Random(2).randbytes(20 * PAGE)
    for off, n in ((0, 20 * PAGE), (0, 20 * PAGE), (100, 19 * PAGE), (PAGE - 1, 12 * PAGE + 2)):
        with pytest.raises(OSError, match=f"{n} bytes at {off} can't be written") as failure:
            store.write(off, data[:n])
        written = failure.value.written
        assert failure.value.errno == errno.ENOSPC and 0 <= written < n
        # On the device: what was written, whole pages at a time, and the old bytes of all the rest.
        assert (off + written) % PAGE == 0 or written == 0
        expected = old[:off] + data[:written] + old[off + written:]
        assert store.read(0, 20 * PAGE) == expected
        old = expected
        store.check(3)
    assert store.stats().failed_writes == 4
    assert store.stats().mem_used_total <= 10 * PAGE


def test_a_discard_frees_whole_pages_before_it_rewrites_partial_ones() -> None:
    store = Store(MIB, mem_limit=40 * PAGE)
    data = random.Random(2).randbytes(40 * PAGE)
    store.write(0, data)
    with pytest.raises(OSError) as failure:
        store.zero(100, 200)
    assert failure.value.errno == errno.ENOSPC
    assert store.read(0, 40 * PAGE) == data
    store.zero(100, 30 * PAGE)
    assert store.read(0, 40 * PAGE) == data[:100] + bytes(30 * PAGE) + data[100 + 30 * PAGE:]
    assert store.stats().failed_writes == 1
    store.check(3)


def test_a_partial_write_into_a_full_pool_keeps_the_page() -> None:
    store = Store(8 * MIB, mem_limit=MIB // 2)
    pages = fill(store)
    rng = random.Random(7)
    refused = 0
    for index, page in pages.items():
        try:
            store.write(index * PAGE + 1000, rng.randbytes(3000))
        except OSError as error:
            assert error.errno == errno.ENOSPC and error.written == 0
            assert store.read(index * PAGE, PAGE) == page
            refused += 1
    assert refused > 50
    store.check(3)


# ---- the peak -----------------------------------------------------------------------------------------

def test_mem_used_max_is_the_peak_until_it_is_reset() -> None:
    store = Store(MIB)
    store.write(0, random.Random(1).randbytes(50 * PAGE))
    store.zero(10 * PAGE, 40 * PAGE)
    stats = store.stats()
    assert (stats.mem_used_total, stats.mem_used_max) == (10 * PAGE, 50 * PAGE)
    store.reset_mem_used_max()
    assert store.stats().mem_used_max == 10 * PAGE
    store.write(0, bytes(PAGE))
    assert store.stats().mem_used_max == 10 * PAGE
    store.write(0, random.Random(2).randbytes(12 * PAGE))
    # The new object of a page is complete before the old one is freed.
    assert store.stats().mem_used_max in (12 * PAGE, 13 * PAGE)
    assert store.stats().mem_used_total == 12 * PAGE


def test_a_write_that_fails_does_not_raise_the_peak() -> None:
    store = Store(MIB, mem_limit=9 * PAGE)
    store.write(0, random.Random(1).randbytes(9 * PAGE))
    with pytest.raises(OSError):
        store.write(100 * PAGE, page_of_size(3000))
    assert store.stats().mem_used_max == 9 * PAGE
