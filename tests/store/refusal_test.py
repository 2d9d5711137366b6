# SPDX-License-Identifier: Apache-2.0
"""Memory that the system refuses is ENOSPC for the write that needs it, and no SIGBUS: the slot table too."""
from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.memory_file import MemoryFile
from tests.support.small_tmpfs import on_a_small_tmpfs
from zramfs.codecs.codec import Codec
from zramfs.store import block_state
from zramfs.store.recompress import Recompression
from zramfs.store.store import Store

PAGE = 4096
CHUNK = 512 * PAGE
MIB = 1 << 20
SAME = b"1234" * 1024  # needs a slot and nothing else


@contextmanager
def table_of(store: Store, chunks: int) -> Iterator[None]:
    """Inside, the memory file can't grow beyond the slot table's first pages."""
    fd = store.migration.arena.fileno()
    size, off = os.fstat(fd).st_size, MemoryFile(fd).slot_off(512 * chunks)
    assert off % PAGE == 0
    os.ftruncate(fd, off)
    try:
        yield
    finally:
        os.ftruncate(fd, size)


def same_store(**how: object) -> Store:
    return Store(64 * MIB, **how)


def refused(store: Store, off: int, data: bytes = SAME) -> int:
    """Bytes that were written before the refusal."""
    with pytest.raises(OSError) as caught:
        store.write(off, data)
    assert caught.value.errno == errno.ENOSPC
    return caught.value.written


def test_a_page_of_the_slot_table_that_is_refused_is_enospc_and_changes_nothing() -> None:
    store = same_store()
    with table_of(store, 3):
        for chunk in range(3):
            store.write(chunk * CHUNK, SAME)
        before = store.stats()
        for chunk in (3, 4, 31):
            assert refused(store, chunk * CHUNK + 5 * PAGE) == 0
            assert refused(store, chunk * CHUNK + 5 * PAGE + 100, b"a part") == 0
        # A range that begins where there is memory: its first part is on the device.
        assert refused(store, 3 * CHUNK - 2 * PAGE, 4 * SAME) == 2 * PAGE
        after = store.stats()
        assert after.failed_writes - before.failed_writes == 7
        assert after.same_pages == before.same_pages + 2
        store.check(3)
    store.write(3 * CHUNK, SAME)
    assert store.read(3 * CHUNK - 2 * PAGE, 3 * PAGE) == 3 * SAME
    store.check(3)


def test_nothing_but_a_write_needs_the_slot_table_of_an_empty_chunk() -> None:
    store = same_store(secondary=(Codec("zstd"),))
    with table_of(store, 1):
        store.write(0, SAME)
        assert store.read(0, 64 * MIB) == SAME + bytes(64 * MIB - PAGE)
        assert store.peek(600) == bytes(PAGE)
        store.zero(PAGE, 64 * MIB - PAGE)
        store.zero(CHUNK + 100, 200)
        assert store.seek(CHUNK, True) == CHUNK
        with pytest.raises(OSError):
            store.seek(CHUNK, False)
        assert store.mark_idle() is None
        assert block_state.lines(store, 0, MIB)[0].count(b"\n") == 1
        job = Recompression(store, 1)
        while job.select(1 << 30) or job.step(1 << 30):
            pass
        job.finish()
        assert store.compact() == 0
        store.check(3)


def test_memory_for_access_times_that_is_refused_is_enospc_and_changes_nothing() -> None:
    store = same_store()
    store.write(0, SAME)
    chunks = 64 * MIB // CHUNK
    with table_of(store, chunks):
        with pytest.raises(MemoryError, match="access times"):
            store.access_times = True
        assert not store.access_times
        store.write(0, SAME)
    store.access_times = True
    # The times of two chunks share a page, and that of the first two is there.
    with table_of(store, chunks + 1):
        assert refused(store, 2 * CHUNK) == 0
        store.write(CHUNK, SAME)
        assert store.mark_idle(1) is None
        store.check(3)
    store.write(2 * CHUNK, SAME)
    store.check(3)


def test_a_chunk_that_was_discarded_asks_for_its_table_again() -> None:
    store = same_store()
    for chunk in range(4):
        store.write(chunk * CHUNK, SAME)
    store.zero(2 * CHUNK, 2 * CHUNK)
    with table_of(store, 2):
        assert refused(store, 2 * CHUNK) == 0
        store.write(CHUNK + PAGE, SAME)
        assert store.read(2 * CHUNK, PAGE) == bytes(PAGE)
    store.write(2 * CHUNK, SAME)
    store.check(3)


def test_a_store_for_swap_needs_its_whole_slot_table_at_once() -> None:
    store = Store(64 * MIB, reserve=2 * MIB)
    file = MemoryFile(store.migration.arena.fileno())
    first, end = file.slot_off(0), file.slot_off(64 * MIB // PAGE)
    assert os.lseek(file.fd, first, os.SEEK_DATA) == first
    assert os.lseek(file.fd, first, os.SEEK_HOLE) >= end


# The device has far more chunks than the tmpfs has pages, and a page is written here and there.
FILL = r"""
import os, random, sys
sys.path[:0] = sys.argv[1:2]
from zramfs.store.store import Store
store = Store(1 << 38)
dice = random.Random(4)
chunks, counts = (1 << 38) >> 21, []
for life in range(3):
    stored = {}
    while True:
        page = dice.randrange(chunks) * 512 + dice.randrange(512)
        data = dice.randbytes(8) * 512 if dice.random() < 0.7 else dice.randbytes(4096)
        try:
            store.write(page * 4096, data)
        except OSError as error:
            assert error.errno == 28, error
            break
        stored[page] = data
    for page in dice.sample(range(chunks * 512), 2000):
        assert store.read(page * 4096, 4096) == stored.get(page, bytes(4096)), page
    store.check(3)
    assert all(store.read(page * 4096, 4096) == data for page, data in stored.items())
    counts.append(len(stored))
    for page in stored:
        store.zero(page * 4096, 4096)
    store.check(3)
print(min(counts), store.stats().failed_writes)
"""


@pytest.mark.requires("root", "unshare", "cc", "unsanitized")
def test_a_store_fills_a_tmpfs_with_its_slot_table_and_lives(tmp_path: Path) -> None:
    stored, failed = on_a_small_tmpfs(tmp_path, FILL)
    assert failed == 3
    # 20 MiB: a page of the table for each, and a frame for three of ten.
    assert 3000 < stored < 5120
