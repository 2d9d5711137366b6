# SPDX-License-Identifier: Apache-2.0
"""The store: how each kind of page is kept, ranges, holes, and its word on bad arguments and damage."""
import array
import errno
import gc
import os
import random
from collections.abc import Iterator

import lz4.block
import pytest

from allocator import CheckError
from tests.support import models
from tests.support.memory_file import SLOT_LOCK, WORD, MemoryFile
from tests.support.page_kinds import KINDS, block, page_of_size
from zramfs.store.store import Store

PAGE = 4096


def memory_file(store: Store) -> MemoryFile:
    return MemoryFile(store.migration.arena.fileno())


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store(1 << 20)
    yield store
    store.close()


# ---- size -----------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "disksize, rounded", [(1, PAGE), (PAGE, PAGE), (PAGE + 1, 2 * PAGE), (10_000_000, 10_002_432)]
)
def test_disksize_is_rounded_up_to_a_page(disksize: int, rounded: int) -> None:
    store = Store(disksize)
    assert store.disksize == rounded
    last = bytes(range(256)) * 16
    store.write(rounded - PAGE, last)
    assert store.read(rounded - 5, 5) == last[-5:]
    for off, n in ((rounded, 1), (rounded - 1, 2), (rounded + 1, 0)):
        with pytest.raises(OSError) as failure:
            store.read(off, n)
        assert failure.value.errno == errno.EINVAL
    store.check(3)


def test_a_new_device_reads_as_zeros(store: Store) -> None:
    assert store.read(0, 1 << 20) == bytes(1 << 20)
    assert store.stats().orig_data_size == store.stats().mem_used_total == 0
    store.check(3)


@pytest.mark.parametrize(
    "algo, level", [("lz4", None), ("lz4", 40), ("lz4hc", 3), ("zstd", None), ("zstd", -5), ("none", None)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_codec_keeps_every_kind(algo: str, level: int | None, kind: str) -> None:
    store = Store(1 << 20, algo=algo, level=level)
    data = block(kind, 1, 1 << 20)
    store.write(0, data)
    assert store.read(0, 1 << 20) == data
    assert store.read(5000, 70_000) == data[5000:75_000]
    store.check(3)
    assert store.algo == algo
    if level is not None:
        assert store.level == level


# ---- kinds of pages ---------------------------------------------------------------------------------

@pytest.mark.parametrize("word, in_slot", [
    (0, True), (1, True), (0xFF, True), ((1 << 40) - 1, True), (1 << 40, False), ((1 << 40) + 1, False),
    (0x0000010000000100, True), (0xFFFFFFFFFFFFFFFF, True), (0xDEADBEEFDEADBEEF, True),
    (0xDEADBEEFDEADBEEE, False), (1 << 63, False), (0x6161616161616161, True),
    (0x0123456789ABCDEF, False), (0xFFFFFFFF00000000, False), (0x0000000100000001, True), (0xFFFFFFFF, True),
], ids=hex)
def test_same_filled_pages(store: Store, word: int, in_slot: bool) -> None:
    page = word.to_bytes(8, "little") * 512
    store.write(3 * PAGE, page)
    assert store.read(3 * PAGE, PAGE) == page
    assert store.read(3 * PAGE + 13, 100) == page[13:113]
    stats = store.stats()
    assert (stats.same_pages, stats.huge_pages, stats.compr_data_size) == (1, 0, 0)
    assert stats.orig_data_size == PAGE
    # A word that does not fit into the slot takes an object of 8 bytes, in the class of 32.
    assert [(c.size, c.obj_used) for c in store.classes() if c.obj_used] == ([] if in_slot else [(32, 1)])
    store.check(3)
    store.zero(3 * PAGE, PAGE)
    assert store.stats().same_pages == store.stats().mem_used_total == 0


@pytest.mark.parametrize("broken", [0, 7, 8, 100, 2047, 2048, 4087, 4088, 4095])
def test_a_page_with_one_other_byte_is_not_same_filled(store: Store, broken: int) -> None:
    page = bytearray(b"abcdefgh" * 512)
    page[broken] ^= 0x80
    store.write(0, page)
    assert store.read(0, PAGE) == page
    assert store.stats().same_pages == 0


def test_a_period_that_is_no_word_is_not_same_filled(store: Store) -> None:
    for period in (3, 16, 24):
        page = (bytes(range(period)) * PAGE)[:PAGE]
        store.write(0, page)
        assert store.read(0, PAGE) == page and store.stats().same_pages == 0


def test_incompressible_pages_are_kept_raw(store: Store) -> None:
    page = random.Random(1).randbytes(PAGE)
    store.write(0, page)
    stats = store.stats()
    assert (stats.huge_pages, stats.huge_pages_since) == (1, 1)
    assert stats.compr_data_size == stats.mem_used_total == PAGE
    file = memory_file(store)
    assert file.slot(0).type == "huge"
    assert file.object(file.slot(0).location)[1] == page
    store.write(0, page)
    store.write(0, bytes(PAGE))
    stats = store.stats()
    assert (stats.huge_pages, stats.huge_pages_since, stats.compr_data_size) == (0, 2, 0)


@pytest.mark.parametrize("size, kind", [(3623, "obj"), (3624, "obj"), (3625, "huge"), (3626, "huge")])
def test_border_of_the_huge_pages(store: Store, size: int, kind: str) -> None:
    page = page_of_size(size)
    store.write(0, page)
    assert store.read(0, PAGE) == page
    assert memory_file(store).slot(0).type == kind
    assert store.stats().compr_data_size == (size if kind == "obj" else PAGE)
    assert store.stats().huge_pages == (kind == "huge")


def test_a_page_takes_the_bytes_that_lz4_needs(store: Store) -> None:
    for seed in range(40):
        page = block("text", seed, PAGE)
        store.write(0, page)
        assert store.stats().compr_data_size == models.lz4_size(page)


def test_one_page_through_all_kinds(store: Store) -> None:
    """Each kind replaces each other, and the counts follow."""
    model = models.Device(1 << 20)
    for first in KINDS:
        for second in KINDS:
            for kind in (first, second):
                data = block(kind, 3, PAGE)
                store.write(PAGE, data)
                model.write(PAGE, data)
                assert store.read(PAGE, PAGE) == data
                assert {name: getattr(store.stats(), name) for name in model.stats()} == model.stats()
    store.check(3)


# ---- the layout --------------------------------------------------------------------------------------

def recovered_page(file: MemoryFile, index: int) -> bytes:
    slot = file.slot(index)
    if slot.type == "empty":
        assert file.slot_word(index) == 0
        return bytes(PAGE)
    if slot.type == "same":
        word = slot.location << 32 | slot.location if slot.halves else slot.location
        return word.to_bytes(8, "little") * 512
    header, data = file.object(slot.location)
    assert header.allocated and header.tag == index and not slot.locked
    if slot.type == "same_obj":
        return data * 512
    return data if slot.type == "huge" else lz4.block.decompress(data, uncompressed_size=PAGE)


def test_the_memory_file_alone_holds_the_device() -> None:
    """After writes, discards, both kinds of compaction: every page is found by the drawings alone."""
    store = Store(5 << 20)
    model = models.Device(5 << 20)
    rng = random.Random(5)
    for n in range(40):
        # Three in four begin with a page; the others make pages of parts of two.
        off = rng.randrange(0, 5 << 20) & (-PAGE if n % 4 else -1)
        data = block("mixed", n, min(rng.randrange(400_000), (5 << 20) - off))
        store.write(off, data)
        model.write(off, data)
        off = rng.randrange(0, 5 << 20)
        length = min(rng.randrange(300_000), (5 << 20) - off)
        store.zero(off, length)
        model.zero(off, length)
    store.compact()
    store.migration.run()
    file = memory_file(store)
    assert {file.slot(n).type for n in range(1280)} == {"empty", "same", "same_obj", "obj", "huge"}
    for index in range(1280):
        assert recovered_page(file, index) == model.page(index), index


# ---- ranges and holes ---------------------------------------------------------------------------------

def test_a_partial_write_keeps_the_rest_of_the_page(store: Store) -> None:
    for kind in KINDS:
        before = block(kind, 9, 3 * PAGE)
        store.write(0, before)
        store.write(PAGE - 3, b"over the border")
        expected = before[:PAGE - 3] + b"over the border" + before[PAGE + 12:]
        assert store.read(0, 3 * PAGE) == expected


def test_zero_and_discard_are_the_same(store: Store) -> None:
    data = block("random", 2, 4 * PAGE)
    store.write(0, data)
    store.zero(100, 3 * PAGE)
    assert store.read(0, 4 * PAGE) == data[:100] + bytes(3 * PAGE) + data[100 + 3 * PAGE:]
    assert store.stats().orig_data_size == 2 * PAGE
    assert store.stats().notify_free == 2
    store.zero(10, 20)
    assert store.stats().notify_free == 2 and store.stats().orig_data_size == 2 * PAGE


def test_discards_count_whole_pages_stored_or_not(store: Store) -> None:
    store.zero(0, 1 << 20)
    assert store.stats().notify_free == 256
    store.zero(1, PAGE)
    assert store.stats().notify_free == 256
    store.zero(1, 2 * PAGE)
    assert store.stats().notify_free == 257


def test_empty_calls(store: Store) -> None:
    for off in (0, 5, 1 << 20):
        assert store.read(off, 0) == b""
        assert store.write(off, b"") == 0
        store.zero(off, 0)
    assert store.stats().orig_data_size == store.stats().notify_free == 0


def test_seek() -> None:
    store = Store(1024 * PAGE)
    for index in (3, 4, 600):
        store.write(index * PAGE, b"x")
    assert store.seek(0, False) == 3 * PAGE
    assert store.seek(3 * PAGE + 7, False) == 3 * PAGE + 7
    assert store.seek(5 * PAGE, False) == 600 * PAGE
    assert store.seek(3 * PAGE + 7, True) == 5 * PAGE
    assert store.seek(17, True) == 17
    assert store.seek(600 * PAGE, True) == 601 * PAGE
    for off, hole in ((601 * PAGE, False), (1024 * PAGE, False), (1024 * PAGE, True), (1 << 60, True),
                      (-1, True), (-1, False)):
        with pytest.raises(OSError, match=f"no {'hole' if hole else 'data'} at or after {off}") as failure:
            store.seek(off, hole)
        assert failure.value.errno == errno.ENXIO
    store.write(0, block("zeros", 0, 1024 * PAGE))
    assert store.seek(5, True) == 1024 * PAGE, "zeros that were written are data, and the end is a hole"
    store.zero(511 * PAGE, 2 * PAGE)
    assert (store.seek(0, True), store.seek(511 * PAGE, False)) == (511 * PAGE, 513 * PAGE)


# ---- busy and damaged pages ------------------------------------------------------------------------------

def sparse_store() -> tuple[Store, list[int]]:
    """Pages of one class, of which most are gone again, and the indexes of those that stay."""
    store = Store(4 << 20)
    data = {index: page_of_size(1000 + index % 5) for index in range(400)}
    for index, page in data.items():
        store.write(index * PAGE, page)
    left = [index for index in data if index % 7 == 0]
    for index in data:
        if index not in left:
            store.zero(index * PAGE, PAGE)
    return store, left


def test_compaction_leaves_a_busy_page_alone() -> None:
    store, left = sparse_store()
    file = memory_file(store)
    words = {index: file.slot_word(index) for index in left}
    busy = left[1::3]
    for index in busy:
        file.set_slot_word(index, words[index] | SLOT_LOCK)
    promised = sum(c.freeable for c in store.classes())
    assert store.compact() < promised
    assert all(file.slot_word(index) == words[index] | SLOT_LOCK for index in busy)
    for index in busy:
        file.set_slot_word(index, words[index])
    store.check(3)
    assert all(store.read(index * PAGE, PAGE) == page_of_size(1000 + index % 5) for index in left)
    store.compact()
    assert sum(c.freeable for c in store.classes()) == 0
    assert any(file.slot_word(index) != words[index] for index in left)
    assert all(store.read(index * PAGE, PAGE) == page_of_size(1000 + index % 5) for index in left)


def damage_slot_names_another(file: MemoryFile) -> None:
    a, b = file.slot_word(1), file.slot_word(2)
    file.set_slot_word(1, b)
    file.set_slot_word(2, a)


def damage_slot_lost_its_object(file: MemoryFile) -> None:
    file.set_slot_word(1, 0)


def damage_lock_left(file: MemoryFile) -> None:
    file.set_slot_word(1, file.slot_word(1) | SLOT_LOCK)


def damage_location_of_nothing(file: MemoryFile) -> None:
    file.set_slot_word(1, file.slot_word(1) & (1 << 24) - 1 | 5000 << 32)


def damage_content(file: MemoryFile) -> None:
    location = file.slot(1).location
    zspage = file.zspage(location >> 8)
    off = file.header_off(location, 32 + 16 * zspage.class_idx)
    os.pwrite(file.fd, b"\xff" * 16, off + WORD.size)


@pytest.mark.parametrize("damage, label", [
    (damage_slot_names_another, "names slot"), (damage_slot_lost_its_object, "slots in use"),
    (damage_lock_left, "is locked"), (damage_location_of_nothing, "does not exist"),
    (damage_content, "can't be decompressed"),
], ids=lambda value: getattr(value, "__name__", None))
def test_check_sees_damage(store: Store, damage: object, label: str) -> None:
    for index in range(5):
        store.write(index * PAGE, block("text", index, PAGE))
    store.check(3)
    damage(memory_file(store))
    with pytest.raises(CheckError, match=rf"^\[S1\] .*{label}"):
        store.check(3)


@pytest.mark.parametrize("damage", [damage_location_of_nothing, damage_content])
def test_a_damaged_page_is_an_error_and_its_neighbours_are_not(store: Store, damage: object) -> None:
    for index in range(5):
        store.write(index * PAGE, block("text", index, PAGE))
    damage(memory_file(store))
    for n, call in enumerate((lambda: store.read(0, 5 * PAGE), lambda: store.read(PAGE + 5, 1)), 1):
        with pytest.raises(OSError, match="can't be read") as failure:
            call()
        assert failure.value.errno == errno.EIO
        assert store.stats().failed_reads == n
    with pytest.raises(OSError) as failure:
        store.write(PAGE + 5, b"x")
    assert (failure.value.errno, failure.value.written) == (errno.EIO, 0)
    assert store.stats().failed_writes == 1
    for index in (0, 2, 3, 4):
        assert store.read(index * PAGE, PAGE) == block("text", index, PAGE)
    store.write(PAGE, block("text", 77, PAGE))
    assert store.read(PAGE, PAGE) == block("text", 77, PAGE), "a whole page written anew is sound"


# ---- arguments and life ------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, sentence", [
    ({"disksize": 0}, "disk size of 1 to"), ({"disksize": -1}, "disk size of 1 to"),
    ({"disksize": (1 << 48) + 1}, "disk size of 1 to"), ({"disksize": 1, "algo": "lzo"}, "lzo"),
    ({"disksize": 1, "algo": "lz4", "level": 0}, "level"), ({"disksize": 1, "mem_limit": -1}, "limit"),
    ({"disksize": 1, "mem_limit": 1 << 64}, "limit"),
])
def test_bad_arguments_of_a_store(arguments: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Store(**arguments)


def test_bad_arguments_change_nothing(store: Store) -> None:
    store.write(0, b"here")
    size = store.disksize
    for call in (lambda: store.read(-1, 1), lambda: store.read(0, -1), lambda: store.read(0, size + 1),
                 lambda: store.read(1 << 70, 1), lambda: store.write(-1, b"x"),
                 lambda: store.write(size, b"x"), lambda: store.write(size - 1, b"xy"),
                 lambda: store.zero(-1, 1), lambda: store.zero(1, size), lambda: store.zero(0, -1)):
        with pytest.raises(OSError, match=f"a range inside {size} bytes expected") as failure:
            call()
        assert failure.value.errno == errno.EINVAL
    for call in (lambda: store.write(0, "text"), lambda: store.write(0, None), lambda: store.read("0", 1),
                 lambda: store.set_mem_limit("1G"), lambda: store.read(None, 1)):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(ValueError, match="limit of 0 to"):
        store.set_mem_limit(-1)
    with pytest.raises(OverflowError):
        store.inject_failure(-1)
    assert store.read(0, 5) == b"here\0"
    stats = store.stats()
    assert (stats.failed_reads, stats.failed_writes, stats.mem_limit, stats.orig_data_size) == (0, 0, 0, PAGE)
    store.check(3)


def test_any_buffer_can_be_written(store: Store) -> None:
    store.write(0, memoryview(b"abcdef")[1:3])
    store.write(10, bytearray(b"gh"))
    store.write(20, array.array("I", [1, 2]))
    assert store.read(0, 28) == b"bc" + bytes(8) + b"gh" + bytes(8) + b"\1\0\0\0\2\0\0\0"
    with pytest.raises(BufferError):
        store.write(0, memoryview(b"abcdef")[::2])


def test_a_closed_store() -> None:
    store = Store(1 << 20)
    store.write(0, block("random", 1, 1 << 20))
    migration, balloon = store.migration, store.balloon
    open_files = len(os.listdir("/proc/self/fd"))
    store.close()
    assert len(os.listdir("/proc/self/fd")) == open_files - 1
    store.close()
    assert store.disksize == 0
    for call in (lambda: store.read(0, 1), lambda: store.write(0, b"x"), lambda: store.zero(0, 1),
                 lambda: store.seek(0, True), store.compact, store.stats, store.classes, store.buddyinfo,
                 store.check, store.reset_mem_used_max, lambda: store.set_mem_limit(0),
                 lambda: store.inject_failure(0), migration.run, lambda: balloon.adjust(1)):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_a_store_in_a_reference_cycle_ends_in_order() -> None:
    """The collector frees what the cycle holds in an order of its own."""
    class Owner(Store):
        pass

    gc.collect()
    open_files = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        store = Owner(1 << 20)
        store.write(0, block("random", 1, 9 * PAGE))
        store.itself = store
    del store
    assert len(os.listdir("/proc/self/fd")) > open_files
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == open_files
