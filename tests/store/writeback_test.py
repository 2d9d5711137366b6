# SPDX-License-Identifier: Apache-2.0
"""Write-back of a store: which pages, in which order, within which limits, and who may come in between."""
from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.support.backing_tools import LONG, MIB, PAGE, backed, write_back
from tests.support.memory_file import MemoryFile
from tests.support.page_kinds import block, hard, noise, page_of_size, prose
from zramfs.codecs.codec import Codec
from zramfs.store.recompress import Recompression
from zramfs.store.store import Store
from zramfs.store.writeback import WritebackRun


def written(store: Store) -> set[int]:
    file = MemoryFile(store.migration.arena.fileno())
    return {n for n in range(store.disksize // PAGE) if file.slot_word(n) >> 1 & 7 == 5}


def fill(store: Store, *pages: bytes) -> None:
    for n, page in enumerate(pages):
        store.write(n * PAGE, page)


MIXED = (
    prose(1), noise(1), block("text", 1, PAGE), bytes(PAGE), block("odd word", 1, PAGE), prose(2), noise(2),
)


# ---- which pages ---------------------------------------------------------------------------------

@pytest.mark.parametrize(("mode", "expected"), [
    (None, {0, 1, 2, 5, 6}), ("huge", {1, 6}), ("idle", {0, 1, 2}), ("huge_idle", {1}),
    ("incompressible", set()),
])
def test_modes(tmp_path: Path, mode: str | None, expected: set[int]) -> None:
    """Never a same-filled page, whether its word lies in the slot or in an object."""
    with backed(tmp_path / "file") as store:
        fill(store, *MIXED)
        store.mark_idle()
        store.read(5 * PAGE, 2 * PAGE)
        before = store.stats()
        run = write_back(store, mode=mode)
        assert written(store) == expected
        assert (run.pages, run.passed, run.failed, run.error) == (len(expected), 0, 0, 0)
        after = store.stats()
        assert after.orig_data_size == before.orig_data_size, "column 1 of mm_stat has them"
        assert after.huge_pages == 2 - len(expected & {1, 6})
        assert after.huge_pages_since == before.huge_pages_since == 2
        assert after.same_pages == 2
        assert after.written_back == len(expected)
        store.check(3)
        assert all(store.read(n * PAGE, PAGE) == page for n, page in enumerate(MIXED))
        assert written(store) == expected, "what is read stays there"


def test_compressed_data_leaves_memory(tmp_path: Path) -> None:
    with backed(tmp_path / "file") as store:
        fill(store, *(prose(n) for n in range(200)))
        before = store.stats()
        write_back(store)
        stats = store.stats()
        assert (stats.compr_data_size, stats.mem_used_total, stats.resident) == (0, 0, 0)
        blocks = store.backing.stats()
        assert blocks.used == blocks.writes == -(-(before.compr_data_size + 200 * 16) // PAGE) or (
            before.compr_data_size // PAGE <= blocks.used <= (before.compr_data_size + 200 * 24) // PAGE + 1)


def test_incompressible_pages_and_priorities(tmp_path: Path) -> None:
    """What recompression has made of a page is what goes out, and comes back."""
    with backed(tmp_path / "file", secondary=[Codec("zstd", 3)]) as store:
        fill(store, prose(1), hard(1), noise(1))
        job = Recompression(store, 1)
        with pytest.raises(OSError) as caught:
            WritebackRun(store)
        assert caught.value.errno == errno.EBUSY
        while job.select(1_000_000) or job.step(1_000_000):
            pass
        job.finish()
        assert write_back(store, mode="incompressible").pages == 1 and written(store) == {2}
        assert write_back(store).pages == 2
        file = MemoryFile(store.migration.arena.fileno())
        flags = [(file.slot(n).prio, file.slot(n).incompressible, file.slot(n).idle) for n in range(3)]
        assert flags == [(1, False, False), (1, False, False), (0, True, False)]
        store.check(3)
        assert [store.read(n * PAGE, PAGE) for n in range(3)] == [prose(1), hard(1), noise(1)]
        job = Recompression(store, 1)
        while job.select(1_000_000) or job.step(1_000_000):
            pass
        assert job.finish().tried == 0, "no recompression on the backing store"
        store.mark_idle()
        assert not any(file.slot(n).idle for n in range(3)), "and it is never idle"


def test_ranges(tmp_path: Path) -> None:
    with backed(tmp_path / "file", 40 * PAGE) as store:
        fill(store, *(prose(n) for n in range(40)))
        assert write_back(store, (3, 4), (10, 20), (15, 22), (39, 400)).pages == 1 + 12 + 1
        assert written(store) == {3, *range(10, 22), 39}
        assert write_back(store, (0, 0), (5, 5), (50, 60)).pages == 0
        assert write_back(store).pages == 40 - 14


@pytest.mark.requires("unsanitized")
def test_a_sparse_device_is_looked_through_at_once(tmp_path: Path) -> None:
    with backed(tmp_path / "file", 1 << 40) as store:
        store.write((1 << 40) - PAGE, prose(1))
        run = WritebackRun(store)
        low, calls = 0, 0
        while low < 1 << 28:
            low = run.select(low, 1 << 28)
            calls += 1
        while run.left:
            run.write()
        run.finish()
        assert run.pages == 1 and calls < 100


# ---- who comes in between ------------------------------------------------------------------------

@pytest.mark.parametrize("touch", ["read", "write", "part", "discard", "zero part"])
def test_a_page_that_is_touched_stays(tmp_path: Path, touch: str) -> None:
    with backed(tmp_path / "file") as store:
        fill(store, *(prose(n) for n in range(8)))
        run = WritebackRun(store)
        run.select(0, 8)
        expected = [prose(n) for n in range(8)]
        if touch == "read":
            store.read(3 * PAGE, 1)
        elif touch == "write":
            expected[3] = noise(3)
            store.write(3 * PAGE, noise(3))
        elif touch == "part":
            expected[3] = b"part" + expected[3][4:]
            store.write(3 * PAGE, b"part")
        elif touch == "discard":
            expected[3] = bytes(PAGE)
            store.zero(3 * PAGE, PAGE)
        else:
            expected[3] = bytes(9) + expected[3][9:]
            store.zero(3 * PAGE, 9)
        while run.left:
            run.write()
        run.finish()
        assert (run.pages, run.passed) == (7, 1)
        assert written(store) == {0, 1, 2, 4, 5, 6, 7}
        store.check(3)
        assert [store.read(n * PAGE, PAGE) for n in range(8)] == expected


def test_a_page_that_is_touched_while_it_waits_for_its_block_stays(tmp_path: Path) -> None:
    """A budget of nothing leaves the batch unwritten, between copy and commit."""
    with backed(tmp_path / "file") as store:
        fill(store, *(page_of_size(500) for n in range(8)))
        run = WritebackRun(store)
        run.select(0, 8)
        run.write(1, 0)
        store.write(0, noise(1))
        store.zero(7 * PAGE, PAGE)
        while run.left:
            run.write()
        run.finish()
        assert written(store) == {1, 2, 3, 4, 5, 6} and run.passed == 2
        store.check(3)
        assert store.read(0, PAGE) == noise(1) and store.read(7 * PAGE, PAGE) == bytes(PAGE)


def test_compaction_may_move_what_was_selected(tmp_path: Path) -> None:
    with backed(tmp_path / "file") as store:
        pages = [page_of_size(1000 + n % 5) for n in range(400)]
        fill(store, *pages)
        for n in range(0, 400, 2):
            store.zero(n * PAGE, PAGE)
        run = WritebackRun(store)
        run.select(0, 400, ns=LONG)
        assert store.compact() > 0
        store.migration.run()
        while run.left:
            run.write()
        run.finish()
        assert (run.pages, run.passed) == (200, 0)
        store.check(3)
        assert all(store.read(n * PAGE, PAGE) == pages[n] for n in range(1, 400, 2))


def test_a_run_that_is_cut_short_leaves_nothing_behind(tmp_path: Path) -> None:
    for writes in range(6):
        with backed(tmp_path / "file", 4 * MIB) as store:
            fill(store, *(page_of_size(900) for _ in range(100)))
            run = WritebackRun(store, 4)
            run.select(0, 50)
            for _ in range(writes):
                run.write(3, LONG)
            run.finish()
            run.finish()
            store.check(3)
            used = store.backing.stats()
            assert used.used <= used.writes == min(3 * writes, -(-50 * 912 // PAGE))
            with pytest.raises(ValueError, match="finished"):
                run.write()
            assert write_back(store).pages == 100 - run.pages
            store.check(3)


def test_a_store_that_is_closed_ends_the_run(tmp_path: Path) -> None:
    with backed(tmp_path / "file") as store:
        fill(store, *(prose(n) for n in range(8)))
        run = WritebackRun(store)
        run.select(0, 8)
        run.write(1, 0)
        other = Store(MIB)
        with pytest.raises(ValueError, match="backing store"):
            WritebackRun(other)
        other.close()
        run.finish()
        run = WritebackRun(store)
    with pytest.raises(ValueError, match="closed"):
        run.select(0, 8)
    run.finish()


# ---- limits --------------------------------------------------------------------------------------

def test_the_budget_counts_blocks_that_are_written(tmp_path: Path) -> None:
    with backed(tmp_path / "file") as store:
        fill(store, *(noise(n) for n in range(10)), *(page_of_size(1000) for _ in range(20)))
        run = WritebackRun(store)
        run.select(0, 30)
        assert run.write(0, LONG) == 0 and run.left
        assert run.write(4, LONG) == 4 and run.left
        assert store.backing.stats().writes == 4 and written(store) <= set(range(10))
        assert run.write(6, LONG) == 6 and run.pages == 10
        # 20 objects of 1008 bytes fill 4.9 blocks; the sixteenth of them ends in the fourth.
        assert run.write(4, LONG) == 4 and run.pages == 26
        assert run.left
        assert run.write(1, LONG) == 1 and not run.left and run.pages == 30
        run.finish()
        store.check(3)


def test_objects_of_a_block_that_is_not_allowed_any_more_stay(tmp_path: Path) -> None:
    with backed(tmp_path / "file") as store:
        fill(store, *(page_of_size(3000) for _ in range(4)))
        run = write_back(store, budget=1)
        assert (run.pages, run.left, store.backing.stats().writes) == (1, False, 1)
        store.check(3)
        assert written(store) < {0, 1, 2, 3} and store.read(0, 4 * PAGE) == page_of_size(3000) * 4


@pytest.mark.parametrize("batch", [1, 2, 3, 32, 256, 10**9])
def test_any_batch_size_gives_the_same(tmp_path: Path, batch: int) -> None:
    pages = [noise(n)[:4096 - 97 * n % 4000].ljust(PAGE, b"\0") for n in range(300)]
    with backed(tmp_path / "file") as store:
        fill(store, *pages)
        assert write_back(store, batch=batch).pages == 300
        store.check(3)
        assert all(store.read(n * PAGE, PAGE) == page for n, page in enumerate(pages))


def test_holes_of_a_used_store_are_filled(tmp_path: Path) -> None:
    """Blocks that do not lie together: each batch ends where the next block is taken."""
    with backed(tmp_path / "file", room=60 * PAGE) as store:
        fill(store, *(noise(n) for n in range(60)))
        write_back(store)
        for n in range(0, 60, 3):
            store.zero(n * PAGE, PAGE)
        for n in range(60, 100):
            store.write(n * PAGE, page_of_size(1500))
        run = write_back(store, (60, 100))
        assert run.pages + 0 == store.stats().written_back - 40 and run.error in (0, errno.ENOSPC)
        assert run.pages >= 38
        store.check(3)
        assert store.read(60 * PAGE, 40 * PAGE) == page_of_size(1500) * 40


def test_discarding_frees_the_backing_store(tmp_path: Path) -> None:
    with backed(tmp_path / "file") as store:
        fill(store, *(prose(n) for n in range(50)))
        write_back(store)
        store.zero(0, store.disksize)
        assert store.stats().written_back == store.stats().orig_data_size == store.backing.stats().used == 0


# ---- partial access ------------------------------------------------------------------------------

def test_parts_of_a_page_on_the_backing_store(tmp_path: Path) -> None:
    with backed(tmp_path / "file") as store:
        fill(store, *MIXED)
        write_back(store)
        data = bytearray(b"".join(MIXED))
        assert store.read(100, 2 * PAGE) == data[100:100 + 2 * PAGE]
        store.write(5 * PAGE - 7, b"over the border")
        data[5 * PAGE - 7:5 * PAGE + 8] = b"over the border"
        store.zero(100, 50)
        data[100:150] = bytes(50)
        notified = store.stats().notify_free
        store.zero(PAGE + 9, PAGE + 30)
        data[PAGE + 9:2 * PAGE + 39] = bytes(PAGE + 30)
        assert store.stats().notify_free == notified
        assert written(store) == {6}
        assert store.read(0, len(data)) == data
        store.check(3)
        assert store.seek(0, True) == len(data)
