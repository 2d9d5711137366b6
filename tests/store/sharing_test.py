# SPDX-License-Identifier: Apache-2.0
"""Shared pages: which pages share, what lies in the pool, what a read, a write and a discard do."""
from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.support.backing_tools import backing_file
from tests.support.images import content as content_of_image
from tests.support.images import save, saving
from tests.support.memory_file import MemoryFile
from tests.support.page_kinds import block, noise, prose
from tests.support.share_tools import CELL_TAG, Cell, cell_of, share, shared_cell, slot_word
from tests.support.unit_tools import make_units
from zramfs.codecs.codec import Codec
from zramfs.model.stats import SharingStats
from zramfs.store import block_state
from zramfs.store.backing import Backing
from zramfs.store.recompress import Recompression
from zramfs.store.resize import resize
from zramfs.store.sharing import Sharing
from zramfs.store.store import Store
from zramfs.store.writeback import WritebackRun

PAGE = 4096
N = 64  # pages, of which the second half repeats the first


def page(number: int) -> bytes:
    return prose(number % (N // 2))


def filled(**how: object) -> Store:
    store = Store(N * PAGE, **{"secondary": [Codec("zstd", 3)], **how})
    for number in range(N):
        store.write(number * PAGE, page(number))
    return store


def with_shared(**how: object) -> Store:
    store = filled(**how)
    done = share(store)
    assert (done.looked, done.joined, done.made, done.unequal) == (N, N, N // 2, 0)
    return store


def kept(make: object, **how: object) -> Store:
    fd = os.memfd_create("kept")
    try:
        return make(fd=fd, **how)
    finally:
        os.close(fd)


def file_of(store: Store) -> MemoryFile:
    return MemoryFile(store.migration.arena.fileno())


def kinds(store: Store, n: int) -> list[str]:
    return [file_of(store).slot(number).type for number in range(n)]


def holds(store: Store, changed: dict[int, bytes] | None = None) -> bool:
    changed = changed or {}
    store.check(3)
    return all(store.peek(n) == changed.get(n, page(n)) for n in range(N))


def adopted(store: Store) -> Store:
    fd = os.dup(store.migration.arena.fileno())
    store.leave()
    try:
        return Store.adopt(fd)
    finally:
        os.close(fd)


# ---- which pages ------------------------------------------------------------------------------------

def test_equal_pages_share_one_object_with_a_cell() -> None:
    store = filled()
    before = store.stats()
    done = share(store)
    assert (done.joined, done.made) == (N, N // 2)
    after = store.stats()
    assert (after.shared_pages, after.shared_objects) == (N, N // 2)
    assert after.orig_data_size == before.orig_data_size
    assert after.compr_data_size == after.shared_bytes == before.compr_data_size // 2
    assert done.bytes_saved >= after.shared_bytes
    file = file_of(store)
    for number in range(N // 2):
        cell = shared_cell(file, number)
        assert cell == shared_cell(file, number + N // 2)
        assert file.slot_word(number) == slot_word(number, cell)
        found = cell_of(file, cell)
        assert found == Cell(found.location, users=2, used=True, locked=False)
        header, _data = file.object(found.location)
        assert (header.tag, header.allocated) == (CELL_TAG | cell, True)
    assert sorted({shared_cell(file, number) for number in range(N)}) == list(range(N // 2))
    assert holds(store)


def test_two_copies_cost_at_most_a_tenth_more_than_one() -> None:
    store = Store(2048 * PAGE)
    store.write(0, b"".join(block("text", n, PAGE) for n in range(1024)))
    one = store.stats().mem_used_total
    store.write(1024 * PAGE, store.read(0, 1024 * PAGE))
    share(store)
    store.compact()
    assert store.stats().mem_used_total <= 1.1 * one
    store.check(3)


def test_pages_of_every_kind_that_are_equal_and_those_that_are_left_out(tmp_path: Path) -> None:
    store = filled(backing=Backing(str(backing_file(tmp_path / "backing"))))
    run = WritebackRun(store, 4)
    run.select(0, 2, None)
    while run.left:
        run.write()
    run.finish()
    changed = {4: noise(1), 5: noise(1), 6: bytes(PAGE), 7: bytes(PAGE), 8: block("odd word", 3, PAGE),
               9: block("odd word", 3, PAGE), 10: noise(2), 11: noise(3)}
    for number, data in changed.items():
        store.write(number * PAGE, data)
    store.zero(12 * PAGE, PAGE)
    changed[12] = bytes(PAGE)
    share(store)
    assert kinds(store, 13) == [
        "written_back", "written_back", "shared", "shared", "shared", "shared", "same", "same", "same_obj",
        "same_obj", "huge", "huge", "empty"]
    # The only page left with their contents.
    assert kinds(store, N)[N // 2:N // 2 + 2] == ["obj", "obj"]
    store.check(3)
    for number in range(N):
        assert store.read(number * PAGE, PAGE) == changed.get(number, page(number))


def test_only_idle_pages_share_if_that_is_wanted() -> None:
    store = filled()
    assert share(store, idle=True) == SharingStats()
    store.mark_idle()
    store.read(3 * PAGE, PAGE)
    store.read(40 * PAGE, PAGE)
    done = share(store, idle=True)
    assert (done.looked, done.joined) == (N - 2, N - 4)
    assert kinds(store, N).count("obj") == 4
    # What shares already needs no mark.
    store.read(0, N * PAGE)
    store.mark_idle()
    assert share(store, idle=True).joined == 4
    assert holds(store) and set(kinds(store, N)) == {"shared"}


def test_a_page_that_is_compressed_better_gives_the_object() -> None:
    for better in (0, 1):
        store = Store(2 * PAGE, secondary=[Codec("zstd", 3)])
        store.write(better * PAGE, prose(1))
        job = Recompression(store, 1)
        while job.select(1 << 30) or job.step(1 << 30):
            pass
        assert job.finish().won == 1
        size = store.stats().compr_data_size
        store.write((1 - better) * PAGE, prose(1))
        assert share(store).joined == 2
        assert store.stats().compr_data_size == size
        assert [file_of(store).slot(number).prio for number in range(2)] == [1, 1]
        assert store.read(0, 2 * PAGE) == 2 * prose(1)
        store.check(3)


def test_a_third_page_joins_and_a_second_pass_finds_nothing_more() -> None:
    store = with_shared()
    store.write(2 * PAGE, page(3))
    done = share(store)
    assert (done.joined, done.made, done.alone) == (1, 0, 1)
    file = file_of(store)
    assert cell_of(file, shared_cell(file, 2)).users == 3
    again = share(store)
    assert (again.joined, again.made, again.alone, again.bytes_saved) == (0, 0, 0, 0)
    assert holds(store, {2: page(3)})


def test_a_page_that_changes_after_its_sum_was_taken_is_found_to_be_unequal() -> None:
    """Its entry in the table stays, and only its bytes tell."""
    store = Store(3 * PAGE)
    store.write(0, 3 * prose(1))
    sharing = Sharing(store)
    assert sharing.step(0)
    store.write(0, prose(2))
    while sharing.step(0):
        pass
    done = sharing.finish()
    assert (done.unequal, done.joined, done.made) == (1, 2, 1)
    assert store.read(0, 3 * PAGE) == prose(2) + 2 * prose(1)
    store.check(3)


def test_a_cell_that_has_become_free_is_no_partner() -> None:
    """Neither for the next page with its sum, nor if another object has it meanwhile."""
    store = Store(6 * PAGE)
    for number in range(2):
        store.write(number * PAGE, prose(1))
    share(store)
    store.write(4 * PAGE, prose(1))
    sharing = Sharing(store)
    assert sharing.step(0) and sharing.step(0)
    store.zero(0, 2 * PAGE)
    assert store.stats().shared_objects == 0
    store.write(2 * PAGE, 2 * prose(2))         # these two take the cell
    while sharing.step(0):
        pass
    done = sharing.finish()
    assert (done.joined, done.unequal) == (2, 1)
    store.check(3)
    assert store.read(0, 6 * PAGE) == bytes(2 * PAGE) + 2 * prose(2) + prose(1) + bytes(PAGE)


def test_a_full_cell_is_followed_by_another_and_they_become_one_when_there_is_room() -> None:
    most, pages = 65535, 65540
    store = Store(pages * PAGE)
    for first in range(0, pages, 1024):
        store.write(first * PAGE, prose(1) * min(1024, pages - first))
    share(store)
    stats = store.stats()
    assert (stats.shared_pages, stats.shared_objects) == (pages, 2)
    file = file_of(store)
    assert [cell_of(file, cell).users for cell in (0, 1)] == [most, pages - most]
    store.check(2)
    store.zero(PAGE, 1000 * PAGE)
    done = share(store)
    assert done.joined == pages - most and store.stats().shared_objects == 1
    assert store.read((pages - 6) * PAGE, 6 * PAGE) == 6 * prose(1)
    store.check(2)
    store.zero(0, pages * PAGE)
    assert store.stats().mem_used_total == store.stats().shared_bytes == 0
    store.check(3)


def test_each_page_can_be_the_last_of_an_object_and_there_are_cells_for_more() -> None:
    store = Store(512 * PAGE)
    for number in range(512):
        store.write(number * PAGE, prose(number % 256))
    assert share(store).made == 256
    for number in range(256, 512):
        store.write(number * PAGE, prose(number // 2 + 200))
    assert store.stats().shared_objects == store.stats().shared_pages == 256
    done = share(store)
    assert (done.joined, done.made, done.alone, done.no_room) == (256, 128, 256, 0)
    store.check(3)
    for number in range(512):
        assert store.read(number * PAGE, PAGE) == prose(number if number < 256 else number // 2 + 200)


# ---- the table --------------------------------------------------------------------------------------

@pytest.mark.parametrize("pages", [0, 1, 100, 5000])
def test_the_table_takes_at_most_16_bytes_a_page_and_is_gone_afterwards(pages: int) -> None:
    store = Store(8192 * PAGE)
    store.write(0, b"".join(block("text", n, PAGE) for n in range(pages)))
    sharing = Sharing(store)
    # A device of next to nothing has one of two buckets of eight entries.
    assert 8 * pages < sharing.stats().table_bytes <= max(16 * pages, 128)
    store.write(5000 * PAGE, noise(1))
    sharing.step(1 << 40)
    assert sharing.stats().table_bytes <= max(16 * pages, 128)
    assert sharing.finish().table_bytes == 0


def test_more_pages_than_the_table_has_entries_for_lose_nothing() -> None:
    store = Store(4096 * PAGE)
    sharing = Sharing(store)                    # 16 entries
    for number in range(2048):
        store.write(number * PAGE, block("text", number % 1024, PAGE))
    while sharing.step(1 << 40):
        pass
    done = sharing.finish()
    assert done.looked == 2048 and done.joined < 200
    assert done.unequal < 3
    store.check(3)
    assert share(store).joined > 2000
    store.check(3)
    for number in range(2048):
        assert store.read(number * PAGE, PAGE) == block("text", number % 1024, PAGE)


# ---- reads, writes, discards ------------------------------------------------------------------------

def test_what_is_written_read_or_discarded_changes_no_other_page() -> None:
    store = with_shared()
    store.write(0, noise(1))
    store.write(33 * PAGE + 100, b"changed!")
    store.zero(34 * PAGE, PAGE)
    store.zero(35 * PAGE + 5, 10)
    changed = {0: noise(1), 33: page(33)[:100] + b"changed!" + page(33)[108:], 34: bytes(PAGE),
               35: page(35)[:5] + bytes(10) + page(35)[15:]}
    assert kinds(store, 4) == ["huge", "shared", "shared", "shared"]
    assert holds(store, changed)
    stats = store.stats()
    assert (stats.shared_pages, stats.shared_objects) == (N - 4, N // 2)
    store.read(0, N * PAGE)
    assert store.stats().shared_pages == N - 4
    # The last one of each frees the object.
    store.zero(0, N // 2 * PAGE)
    stats = store.stats()
    assert (stats.shared_pages, stats.shared_objects) == (N // 2 - 3, N // 2 - 3)
    store.zero(0, N * PAGE)
    stats = store.stats()
    assert stats.shared_pages == stats.shared_objects == stats.shared_bytes == stats.mem_used_total == 0
    store.check(3)


def test_a_page_that_is_the_last_of_its_object_gets_one_of_its_own() -> None:
    store = with_shared()
    store.mark_idle()
    store.write(0, noise(1))
    store.zero(1 * PAGE, PAGE)
    changed = {0: noise(1), 1: bytes(PAGE)}
    assert kinds(store, N)[N // 2:N // 2 + 2] == ["shared", "shared"]
    done = share(store)
    assert (done.joined, done.alone) == (0, 2)
    assert kinds(store, N)[N // 2:N // 2 + 2] == ["obj", "obj"]
    assert file_of(store).slot(N // 2).idle, "it was not used"
    assert holds(store, changed)
    # Its cell is good for others.
    for number in (0, 1):
        store.write(number * PAGE, page(number))
    assert share(store).joined == 4
    file = file_of(store)
    assert max(shared_cell(file, number) for number in range(N)) < N // 2 + 2
    assert holds(store)


def test_a_device_that_wipes_leaves_nothing_of_a_page_whose_last_copy_is_discarded() -> None:
    store = kept(with_shared, wipe=True)
    secret = b"a secret that was written twice. "
    data = (secret + noise(5))[:PAGE]
    for number in (0, 40):
        store.write(number * PAGE, data)
    assert share(store).joined == 2
    fd = os.dup(store.migration.arena.fileno())
    size = os.fstat(fd).st_size

    def found() -> bool:
        off = MemoryFile(fd).superblock.frames_off
        return secret in os.pread(fd, min(size - off, 8 << 20), off)

    store.zero(0, PAGE)
    assert found() and store.peek(40) == data
    store.zero(40 * PAGE, PAGE)
    assert not found()
    assert holds(store, {0: bytes(PAGE), 40: bytes(PAGE)})
    os.close(fd)


# ---- with other work --------------------------------------------------------------------------------

def test_shared_objects_move_and_their_pages_stay() -> None:
    store = Store(600 * PAGE)
    for number in range(600):
        store.write(number * PAGE, prose(number % 300))
    share(store)
    for number in range(300):
        if number % 4:
            store.zero(number * PAGE, PAGE)
            store.zero((number + 300) * PAGE, PAGE)
    file = file_of(store)
    cells = {number: shared_cell(file, number) for number in range(0, 300, 4)}
    before = {cell: cell_of(file, cell).location for cell in cells.values()}
    assert store.compact() > 0
    moved = [cell for cell in before if cell_of(file, cell).location != before[cell]]
    assert len(moved) > 10 and cells == {number: shared_cell(file, number) for number in cells}
    store.migration.run()
    for number in range(0, 600, 4):
        assert store.read(number * PAGE, PAGE) == prose(number % 300)
    store.check(3)


def test_recompression_units_and_write_back_leave_shared_pages_alone(tmp_path: Path) -> None:
    store = with_shared(backing=Backing(str(backing_file(tmp_path / "backing"))))
    store.write(20 * PAGE, prose(1000))
    job = Recompression(store, 1)
    while job.select(1 << 30) or job.step(1 << 30):
        pass
    assert job.finish().tried == 1
    assert make_units(store).pages == 0
    store.mark_idle()
    run = WritebackRun(store, 4)
    run.select(0, N, "idle", ns=1 << 40)
    while run.left:
        run.write()
    run.finish()
    assert run.pages == 1 and store.stats().shared_pages == N - 1
    assert store.read(20 * PAGE, PAGE) == prose(1000)
    store.check(3)


def test_pages_of_units_do_not_share_and_shared_ones_join_no_unit() -> None:
    store = filled()
    assert make_units(store).pages == N
    assert share(store).looked == 0
    for number in (3, 35):
        store.write(number * PAGE, page(number))
    assert share(store).joined == 2
    assert make_units(store).pages == 0
    assert holds(store)


def test_block_state_shows_shared_pages_by_their_priority_and_mark() -> None:
    store = with_shared()
    store.mark_idle()
    store.read(1 * PAGE, PAGE)
    lines = block_state.lines(store, 0, 4096)[0].decode().splitlines()
    assert [line.split()[-1] for line in lines[:3]] == ["...i..", "......", "...i.."]


def test_a_save_has_shared_pages_as_pages_of_their_own(tmp_path: Path) -> None:
    store = with_shared()
    for number in (5, 50):
        store.write(number * PAGE, noise(7))
    share(store)
    before = store.read(0, N * PAGE)
    save(store, tmp_path / "image")
    assert content_of_image(tmp_path / "image") == before
    with saving(store, tmp_path / "beside") as rest:
        store.zero(0, N // 2 * PAGE)
        store.write(40 * PAGE, noise(1))
        run = rest()
        assert run.kept > 10 and run.lost == 0
    assert content_of_image(tmp_path / "beside") == before
    store.check(3)


def test_pages_behind_a_smaller_end_leave_their_objects() -> None:
    store = Store(1024 * PAGE, grows_to=1024 * PAGE)
    for number in (*range(8), *range(600, 608)):
        store.write(number * PAGE, prose(number % 8))
    assert share(store).joined == 16
    resize(store, 512 * PAGE, discard=True)
    assert (store.stats().shared_pages, store.stats().shared_objects) == (8, 8)
    store.check(3)
    assert store.read(0, 8 * PAGE) == b"".join(prose(n) for n in range(8))


def test_a_sharing_beside_another_post_processing_is_ebusy_and_can_end_at_any_step() -> None:
    store = filled()
    sharing = Sharing(store)
    with pytest.raises(OSError) as caught:
        Sharing(store)
    assert caught.value.errno == errno.EBUSY
    for _ in range(N // 2 + 9):
        sharing.step(0)
    done = sharing.finish()
    assert done.joined == 18
    with pytest.raises(ValueError, match="finished"):
        sharing.step(0)
    assert holds(store)
    assert share(store).joined == N - 18
    store.close()
    with pytest.raises(ValueError, match="closed"):
        Sharing(store)


# ---- shortage ---------------------------------------------------------------------------------------

def test_each_allocation_of_a_sharing_can_fail() -> None:
    point, refused = 0, 0
    while True:
        point += 1
        store = filled()
        store.inject_failure(point)
        done = share(store)
        store.inject_failure(0)
        assert holds(store)
        assert done.joined + 2 * done.no_room >= N
        share(store)
        assert set(kinds(store, N)) == {"shared"} and holds(store)
        refused += done.no_room
        if not done.no_room:
            break
    assert refused > 0


def test_a_pool_at_its_limit_becomes_smaller() -> None:
    store = filled()
    limit = store.stats().mem_used_total
    store.set_mem_limit(limit)
    done = share(store)
    assert done.joined == N and not done.no_room
    store.compact()
    assert store.stats().mem_used_total < limit
    assert holds(store)
