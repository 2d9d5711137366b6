# SPDX-License-Identifier: Apache-2.0
"""Units on the backing store: they leave memory as wholes, and their pages are read, overwritten, discarded,
adopted and damaged there."""
from __future__ import annotations

import errno
import os
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.backing_tools import LONG, PAGE, backed, backing_file, extents, write_back
from tests.support.images import restored, save
from tests.support.memory_file import MemoryFile
from tests.support.page_kinds import noise, prose
from tests.support.unit_tools import make_units, unpacked
from zramfs.codecs.codec import Codec
from zramfs.store import block_state
from zramfs.store.backing import Backing
from zramfs.store.resize import resize
from zramfs.store.store import Store
from zramfs.store.writeback import WritebackRun

GROUP = 16 * PAGE
HEAD = struct.Struct("<QHHI")


def page(number: int) -> bytes:
    """Of sixteen such pages a unit takes 25 KiB: 7 blocks."""
    return prose(number % 64)


@contextmanager
def with_units(path: Path, groups: int = 4, *, room: int = 200, content: Callable[[int], bytes] = page,
               **how: object) -> Iterator[Store]:
    """A store whose pages all lie in units. room: blocks."""
    with backed(path, groups * GROUP, room=room * PAGE, **how) as store:
        for number in range(groups * 16):
            store.write(number * PAGE, content(number))
        assert make_units(store).pages == 16 * groups
        yield store


def written(store: Store) -> set[int]:
    return set(extents(store))


def expect(store: Store, changed: dict[int, bytes] | None = None) -> None:
    store.check(3)
    for number in range(store.disksize // PAGE):
        assert store.read(number * PAGE, PAGE) == (changed or {}).get(number, page(number)), number


def record_version(store: Store) -> int:
    return os.pread(store.migration.arena.fileno(), 1, 1008 + 8)[0]


def unreadable(store: Store, number: int) -> None:
    with pytest.raises(OSError) as caught:
        store.read(number * PAGE, PAGE)
    assert caught.value.errno == errno.EIO


# ---- going ------------------------------------------------------------------------------------------

def test_a_version_without_such_units_cannot_adopt_the_store_once_they_may_be_there(tmp_path: Path) -> None:
    with with_units(tmp_path / "back") as store:
        os.pwrite(store.migration.arena.fileno(), b"\1", 1008 + 8)
        write_back(store)
        assert record_version(store) == 2
        expect(store)


def test_a_unit_leaves_memory_as_a_whole_and_takes_no_more_blocks_than_it_has_bytes(tmp_path: Path) -> None:
    with with_units(tmp_path / "file") as store:
        before = store.stats()
        run = write_back(store)
        assert (run.pages, run.units, run.passed, run.failed, run.error) == (64, 4, 0, 0, 0)
        after = store.stats()
        assert (after.units, after.unit_pages, after.unit_dead, after.unit_bytes) == (0, 0, 0, 0)
        assert after.mem_used_total == 0 and after.written_back == 64
        assert after.units_unpacked == before.units_unpacked, "it is copied, and not unpacked"
        blocks = store.backing.stats()
        # Its 8 bytes for each part in the pool stay behind, and it ends at a multiple of 16.
        assert blocks.used == blocks.writes == -(-before.unit_bytes // PAGE)
        expect(store)
        assert written(store) == set(range(64)), "what is read stays there"


def test_a_unit_lies_on_the_backing_store_as_it_is_drawn(tmp_path: Path) -> None:
    with with_units(tmp_path / "file") as store:
        store.zero(18 * PAGE, PAGE)
        write_back(store)
        data = (tmp_path / "file").read_bytes()
        where = extents(store)
        assert len(where) == 63 and len(set(where.values())) == 4
        for group in range(4):
            offset, extent = where[group * 16]
            assert {where[n] for n in range(group * 16, group * 16 + 16) if n in where} == {(offset, extent)}
            _, magic, members, size = HEAD.unpack_from(data, offset)
            assert (magic, members, -(-(HEAD.size + size) // 16) * 16) == (0x7511, 0xFFFF, extent)
            stream = data[offset + HEAD.size:offset + HEAD.size + size]
            assert unpacked(stream) == b"".join(page(n) for n in range(group * 16, group * 16 + 16))
            assert not any(data[offset + HEAD.size + size:offset + extent])
        file = MemoryFile(store.migration.arena.fileno())
        assert not any(file.slot(number).idle for number in range(64))
        flags = block_state.lines(store, 0, 10_000)[0].decode().split("\n")[:-1]
        assert {line.split()[-1] for line in flags} == {".w..r."}


def test_pages_that_are_used_meanwhile_stay_and_the_others_go_together(tmp_path: Path) -> None:
    with with_units(tmp_path / "file") as store:
        run = WritebackRun(store)
        run.select(0, 64)
        store.read(0, PAGE)                         # before its unit is copied
        store.write(1 * PAGE, noise(1))
        run.write(1, 0)                             # copies a unit, the last one, and does not write it yet
        assert written(store) == set()
        store.read(50 * PAGE, PAGE)
        store.write(51 * PAGE, noise(51))
        store.zero(52 * PAGE, PAGE)
        while run.left:
            run.write()
        run.finish()
        assert (run.pages, run.units, run.passed, run.failed) == (59, 4, 5, 0)
        assert written(store) == set(range(64)) - {0, 1, 50, 51, 52}
        stats = store.stats()
        assert (stats.units, stats.unit_pages) == (2, 2), "of pages 0 and 50, which were only read"
        expect(store, {1: noise(1), 51: noise(51), 52: bytes(PAGE)})


@pytest.mark.parametrize("cold", [range(16), range(9), range(8), range(3, 14, 2), range(5, 6)])
def test_a_unit_goes_as_a_whole_if_more_than_half_of_it_goes(tmp_path: Path, cold: range) -> None:
    with with_units(tmp_path / "file", 1) as store:
        store.mark_idle()
        for number in set(range(16)) - set(cold):
            store.read(number * PAGE, PAGE)
        run = write_back(store, mode="idle")
        assert (run.pages, run.units, run.passed) == (len(cold), len(cold) > 8, 0)
        assert written(store) == set(cold)
        assert len(set(extents(store).values())) == (1 if len(cold) > 8 else len(cold))
        assert store.stats().unit_dead == (0 if len(cold) == 16 else len(cold))
        expect(store)


def test_dead_places_count_as_pages_that_do_not_go(tmp_path: Path) -> None:
    with with_units(tmp_path / "file", 2) as store:
        store.zero(0, 8 * PAGE)
        store.zero(16 * PAGE, 7 * PAGE)
        run = write_back(store)
        assert (run.pages, run.units) == (8 + 9, 1)
        assert store.stats().units == store.stats().mem_used_total == 0
        empty = {**dict.fromkeys(range(8), bytes(PAGE)), **dict.fromkeys(range(16, 23), bytes(PAGE))}
        expect(store, empty)


def test_ranges_that_cut_a_unit_take_their_pages_of_it_once(tmp_path: Path) -> None:
    with with_units(tmp_path / "file") as store:
        run = write_back(store, (14, 30), (5, 6), (5, 20), (60, 64))
        assert (run.pages, run.units, run.passed) == (25 + 4, 1, 0), "14 of the second group go together"
        assert written(store) == {*range(5, 30), *range(60, 64)}
        expect(store)
        assert write_back(store).pages == 64 - 29
        expect(store)


@pytest.mark.parametrize("batch", [1, 7, 8, 32, 256])
def test_a_unit_goes_as_a_whole_if_the_batch_has_room_for_it(tmp_path: Path, batch: int) -> None:
    with with_units(tmp_path / "file") as store:
        run = write_back(store, batch=batch)
        assert (run.pages, run.units) == (64, 4 if batch >= 8 else 0)
        expect(store)


def test_the_budget_counts_blocks_and_a_unit_goes_when_its_last_one_is_written(tmp_path: Path) -> None:
    with with_units(tmp_path / "file") as store:
        run = WritebackRun(store)
        run.select(0, 64)
        ends = []
        while run.left:
            before = run.pages
            assert run.write(1, LONG) == 1
            if run.pages != before:
                ends.append((store.backing.stats().writes, run.pages))
        run.finish()
        where = sorted(set(extents(store).values()))
        last = [-(-(offset + extent) // PAGE) for offset, extent in where]
        assert ends == [(writes, 16 * n) for n, writes in enumerate(last, 1)]
        assert store.backing.stats().writes == store.backing.stats().used
        expect(store)


@pytest.mark.parametrize("writes", range(0, 9, 2))
def test_a_run_that_is_cut_short_leaves_each_unit_in_one_place(tmp_path: Path, writes: int) -> None:
    with with_units(tmp_path / "file") as store:
        run = WritebackRun(store)
        run.select(0, 64)
        for _ in range(writes):
            run.write(3, LONG)
        run.finish()
        gone = len(written(store))
        assert gone % 16 == 0 and gone == run.pages == 16 * run.units
        assert store.stats().units == 4 - run.units and store.stats().unit_dead == 0
        expect(store)
        assert write_back(store).pages == 64 - gone
        expect(store)


def test_where_the_device_has_no_such_place_the_pages_go_singly(tmp_path: Path) -> None:
    """Every fourth block is in use."""
    with backed(tmp_path / "file", 80 * PAGE, room=60 * PAGE) as store:
        for number in range(60):
            store.write(number * PAGE, noise(number))
        assert write_back(store).pages == 60
        where = {offset // PAGE: number for number, (offset, _) in extents(store).items()}
        kept = {where[block] for block in range(0, 60, 4)}
        for number in set(range(60)) - kept:
            store.zero(number * PAGE, PAGE)
        for number in range(64, 80):
            store.write(number * PAGE, page(number))
        make_units(store)
        run = write_back(store)
        assert (run.pages, run.units, run.error) == (16, 0, 0)
        # A run of eight free blocks is found, also where it begins before the last block that was taken.
        for block in (20, 24):
            store.zero(where[block] * PAGE, PAGE)
        for number in range(64, 80):
            store.write(number * PAGE, page(number))
        make_units(store)
        run = write_back(store)
        assert (run.pages, run.units, run.error) == (16, 1, 0)
        assert {offset // PAGE for offset, _ in (extents(store)[n] for n in range(64, 80))} <= set(range(60))
        store.check(3)
        for number in range(64, 80):
            assert store.read(number * PAGE, PAGE) == page(number)
        for number in kept - {where[20], where[24]}:
            assert store.read(number * PAGE, PAGE) == noise(number)


def test_a_full_device_keeps_the_units_in_memory(tmp_path: Path) -> None:
    with with_units(tmp_path / "file", room=15) as store:
        run = write_back(store)
        assert run.error == errno.ENOSPC and run.units == 2
        assert written(store) >= set(range(32, 64)), "the last ones come first"
        expect(store)
        store.zero(32 * PAGE, 32 * PAGE)
        run = write_back(store)
        assert run.pages >= 16
        expect(store, dict.fromkeys(range(32, 64), bytes(PAGE)))


def test_a_write_that_fails_keeps_the_unit_in_memory(tmp_path: Path) -> None:
    with with_units(tmp_path / "file") as store:
        fd = store.backing.fileno()
        kept = os.dup(fd)
        with open(tmp_path / "file", "rb") as reader:
            os.dup2(reader.fileno(), fd)            # not opened for writing
            run = write_back(store, batch=16)
            assert (run.pages, run.units, run.error) == (0, 0, errno.EBADF)
            assert run.failed == 64
            os.dup2(kept, fd)
        os.close(kept)
        assert store.stats().units == 4 and store.backing.stats().used == 0
        expect(store)
        assert write_back(store).units == 4
        expect(store)


# ---- being there ------------------------------------------------------------------------------------

def test_reading_in_order_reads_and_unpacks_each_unit_once(tmp_path: Path) -> None:
    with with_units(tmp_path / "file") as store:
        write_back(store)
        before, unpacked_before = store.backing.stats().reads, store.stats().units_unpacked
        for number in range(64):
            assert store.read(number * PAGE, PAGE) == page(number)
        where = set(extents(store).values())
        spans = sum((offset + extent - 1) // PAGE - offset // PAGE + 1 for offset, extent in where)
        assert store.backing.stats().reads - before == spans
        assert store.stats().units_unpacked - unpacked_before == 4
        for number in random.Random(1).sample(range(64), 64):
            assert store.read(number * PAGE, PAGE) == page(number)
        assert store.stats().units_unpacked - unpacked_before == 4, "the last four stay unpacked"


def test_a_page_that_is_overwritten_or_discarded_leaves_a_dead_place_and_the_last_one_frees_the_blocks(
    tmp_path: Path,
) -> None:
    with with_units(tmp_path / "file", 1) as store:
        write_back(store)
        used = store.backing.stats().used
        store.write(3 * PAGE, noise(3))
        store.write(4 * PAGE + 100, b"a part")
        store.zero(5 * PAGE + 100, 60)
        store.zero(6 * PAGE, 9 * PAGE)
        changed = {3: noise(3), 4: page(4)[:100] + b"a part" + page(4)[106:],
                   5: page(5)[:100] + bytes(60) + page(5)[160:], **dict.fromkeys(range(6, 15), bytes(PAGE))}
        expect(store, changed)
        assert store.backing.stats().used == used and written(store) == {0, 1, 2, 15}
        store.zero(0, 3 * PAGE)
        assert store.backing.stats().used == used
        store.write(15 * PAGE, noise(15))
        assert store.backing.stats().used == 0 and store.stats().written_back == 0
        expect(store, {**changed, **dict.fromkeys(range(3), bytes(PAGE)), 15: noise(15)})


def test_a_group_can_have_several_units_there_and_one_in_memory(tmp_path: Path) -> None:
    with with_units(tmp_path / "file", 1) as store:
        write_back(store)
        changed = {}
        for first, last in ((0, 9), (0, 5), (7, 16)):
            for number in range(first, last):
                changed[number] = prose(100 + first + number)
                store.write(number * PAGE, changed[number])
            assert make_units(store).made == 1
            expect(store, changed)
            if last != 16:
                run = write_back(store)
                assert run.units == 1
                expect(store, changed)
        assert store.stats().unit_pages == 9
        assert len(set(extents(store).values())) == 2, "of the first unit no page is left"


@pytest.mark.parametrize("trims", [False, True])
def test_what_was_unpacked_is_not_used_for_another_unit_in_its_place(tmp_path: Path, trims: bool) -> None:
    """The next unit of the group, as long as the last one, comes to lie where that has been."""

    def content(seed: int) -> Callable[[int], bytes]:
        return lambda number: random.Random(seed << 8 | number).randbytes(1024) + bytes(3072)

    with with_units(tmp_path / "file", 1, room=8, content=content(0)) as store:
        write_back(store)
        (place,) = set(extents(store).values())
        for seed in range(1, 20):
            for number in range(16):
                assert store.read(number * PAGE, PAGE) == content(seed - 1)(number)
            store.zero(0, GROUP)
            assert store.backing.trim(100) > 0 if trims else True
            for number in range(16):
                store.write(number * PAGE, content(seed)(number))
            make_units(store)
            assert write_back(store).units == 1
            (now,) = set(extents(store).values())
            for number in range(16):
                assert store.read(number * PAGE, PAGE) == content(seed)(number)
            if now == place:
                break
            place = now
        else:
            raise AssertionError("expected a unit as long as the last one in the same place")


def test_a_device_that_becomes_smaller_frees_the_blocks(tmp_path: Path) -> None:
    with backed(tmp_path / "file", 1024 * PAGE, grows_to=1024 * PAGE) as store:
        for number in (*range(16), *range(608, 624)):
            store.write(number * PAGE, page(number))
        make_units(store)
        assert write_back(store).units == 2
        used = store.backing.stats().used
        resize(store, 512 * PAGE, discard=True)
        assert store.backing.stats().used <= used / 2 + 1 and store.stats().written_back == 16
        store.check(3)
        assert store.read(0, GROUP) == b"".join(page(n) for n in range(16))


def test_an_image_has_the_pages_of_units_on_the_backing_store(tmp_path: Path) -> None:
    with with_units(tmp_path / "file") as store:
        write_back(store)
        (offset, _) = extents(store)[20]
        with open(tmp_path / "file", "r+b") as file:
            file.seek(offset + 1000)
            file.write(bytes(16))
        save(store, tmp_path / "image")
        made, lost, damage = restored(tmp_path / "image")
        assert lost == [(16, 31)] and damage == []
        for number in {*range(64)} - {*range(16, 32)}:
            assert made.read(number * PAGE, PAGE) == page(number)
        # As single pages, compressed.
        assert 0 < made.stats().compr_data_size < 48 * 3000
        made.close()


# ---- adoption and damage ----------------------------------------------------------------------------

def adopted(store: Store) -> Store:
    fd, kept = os.dup(store.migration.arena.fileno()), os.dup(store.backing.fileno())
    path = store.backing.path
    store.leave()
    again = Store.adopt(fd, backing=Backing(path, kept=kept))
    os.close(fd)
    os.close(kept)
    return again


def units_kept(path: Path) -> Store:
    store = Store(4 * GROUP, fd=os.memfd_create("kept"), secondary=[Codec("zstd", 3)],
                  backing=Backing(str(backing_file(path))))
    for number in range(64):
        store.write(number * PAGE, page(number))
    make_units(store)
    assert write_back(store).units == 4
    return store


def test_the_slots_alone_say_which_blocks_are_used(tmp_path: Path) -> None:
    store = units_kept(tmp_path / "file")
    store.zero(0, 15 * PAGE)
    store.write(20 * PAGE, noise(20))
    store.zero(32 * PAGE, GROUP)
    before = store.backing.stats()
    store = adopted(store)
    after = store.backing.stats()
    assert (after.used, after.writes) == (before.used, before.writes) and store.recovered.lost == 0
    changed = {**dict.fromkeys((*range(15), *range(32, 48)), bytes(PAGE)), 20: noise(20)}
    expect(store, changed)
    store.zero(0, store.disksize)
    assert store.backing.stats().used == 0
    store.check(3)
    store.close()


@pytest.mark.parametrize("place", ["sum", "magic", "members", "size", "stream", "its end"])
def test_damage_costs_the_pages_of_one_unit(tmp_path: Path, place: str) -> None:
    with with_units(tmp_path / "file") as store:
        write_back(store)
        offset, extent = extents(store)[16]
        size = HEAD.unpack_from((tmp_path / "file").read_bytes(), offset)[3]
        at = {"sum": 3, "magic": 8, "members": 10, "size": 12, "stream": HEAD.size + size // 2,
              "its end": HEAD.size + size - 1}[place]
        assert at < extent
        with open(tmp_path / "file", "r+b") as file:
            file.seek(offset + at)
            byte = file.read(1)[0]
            file.seek(offset + at)
            file.write(bytes([byte ^ 0x10]))
        before = store.stats().failed_reads, store.backing.stats().read_errors
        for number in range(16, 32):
            unreadable(store, number)
        with pytest.raises(OSError, match="error"):
            store.write(16 * PAGE + 5, b"a part")
        after = store.stats().failed_reads, store.backing.stats().read_errors
        assert after == (before[0] + 16, before[1] + 17)
        for number in {*range(64)} - {*range(16, 32)}:
            assert store.read(number * PAGE, PAGE) == page(number)
        for number in range(16, 32):
            store.write(number * PAGE, page(number))
        expect(store)
        assert store.backing.stats().used < 24, "its blocks are free"


def test_units_that_changed_places_and_those_of_an_earlier_device_are_found(tmp_path: Path) -> None:
    path = tmp_path / "file"
    images = []
    for _ in range(2):
        # Each has the same content, so each takes the same bytes.
        with with_units(path, 4, content=lambda number: prose(number % 16)) as store:
            write_back(store)
            images.append(path.read_bytes())
            where = extents(store)
            (a, n), (b, m) = where[0], where[16]
            assert n == m
            swapped = bytearray(images[-1])
            swapped[a:a + n], swapped[b:b + n] = swapped[b:b + n], swapped[a:a + n]
            for data, lost in ((swapped, range(32)), (images[0], range(64) if len(images) == 2 else ())):
                path.write_bytes(data)
                for number in lost:
                    unreadable(store, number)
            path.write_bytes(images[-1])
            for number in range(64):
                assert store.read(number * PAGE, PAGE) == prose(number % 16)


def test_a_slot_that_was_damaged_costs_its_page(tmp_path: Path) -> None:
    """Another length, no length, behind the end, a priority, another unit's place."""
    store = units_kept(tmp_path / "file")
    file = MemoryFile(store.migration.arena.fileno())
    blocks = store.backing.stats().blocks
    word, other = file.slot_word(0), file.slot_word(20)
    damaged = {
        0: word ^ 1 << 12, 1: word & ~(0x1FFF << 10) | 1 << 22,
        2: word & (1 << 24) - 1 | (blocks * 256 - 1) << 24, 3: word | 2 << 4, 4: other,
    }
    for number, value in damaged.items():
        file.set_slot_word(number, value)
    store = adopted(store)
    assert store.recovered.lost == 3, "those that say so by themselves"
    store.check(2)
    for number in damaged:
        unreadable(store, number)
    for number in range(5, 64):
        assert store.read(number * PAGE, PAGE) == page(number)
    for number in damaged:
        store.write(number * PAGE, page(number))
    expect(store)
    store.close()
