# SPDX-License-Identifier: Apache-2.0
"""Units with a dictionary: which one they get, how long it stays, where they lie and how they are found
again;
and units that are made anew with a better level or a newer dictionary, once."""
from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import alloc_hook
from tests.support.backing_tools import backed, backing_file, extents, write_back
from tests.support.images import restored, save
from tests.support.kill_points import copy_of
from tests.support.memory_file import MemoryFile
from tests.support.page_kinds import noise, prose, record
from tests.support.unit_tools import make_units, set_word, unit_of, unpacked, word_of
from zramfs.codecs.codec import Codec
from zramfs.model.stats import UnitMakingStats
from zramfs.store.backing import Backing
from zramfs.store.secondary import (
    count_cold,
    count_in_units,
    count_priorities,
    drop_secondary,
    find_cold,
    set_secondary,
)
from zramfs.store.store import Store

PAGE = 4096
N = 64


def learned(seed: int, level: int = 3, kind=record) -> Codec:
    return Codec("zstd", level, kind(seed) + kind(seed + 1))


def fill(store: Store) -> None:
    for number in range(N):
        store.write(number * PAGE, record(number))


def file_of(store: Store) -> MemoryFile:
    return MemoryFile(store.migration.arena.fileno())


def prios(store: Store) -> list[int]:
    return [unit_of(file_of(store), group).prio for group in range(N // 16)]


def holds(store: Store) -> bool:
    store.check(3)
    return all(store.peek(number) == record(number) for number in range(N))


def one_pass(store: Store, level: int) -> UnitMakingStats:
    """As density makes it."""
    return make_units(store, level=level, thorough=False)


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store(N * PAGE)
    fill(store)
    yield store
    assert holds(store)
    store.close()


# ---- which dictionary -------------------------------------------------------------------------------

def test_a_unit_gets_the_newest_dictionary_and_says_so(store: Store) -> None:
    make_units(store, level=5)
    plain = store.stats().unit_bytes
    assert prios(store) == [0] * 4
    fill(store)
    set_secondary(store, 3, learned(1000, kind=prose))
    set_secondary(store, 2, learned(1000))
    assert make_units(store, level=5).pages == N
    assert store.stats().unit_bytes < plain - 4 * 400
    unit = unit_of(file_of(store), 2)
    assert (unit.magic, unit.prio, unit.level, unit.members) == (0x7502, 2, 5, 0xFFFF)
    assert unpacked(unit.stream, store.codecs[2].dictionary) == b"".join(map(record, range(32, 48)))
    assert count_in_units(store) == (0, 0, N, 0) and count_priorities(store) == (0, 0, 0, 0)


def test_without_one_of_its_own_a_device_takes_the_last_one_that_was_configured() -> None:
    store = Store(N * PAGE, secondary=[Codec("zstd", 3, prose(1)), learned(1), Codec("lz4", 1, record(7))])
    fill(store)
    assert make_units(store).made == 4 and prios(store) == [2] * 4
    assert holds(store)


def test_cold_pages_are_found_in_units_where_that_is_asked_for(store: Store) -> None:
    make_units(store)
    store.write(5 * PAGE, record(5))
    assert (count_cold(store, False), count_cold(store, False, in_units=True)) == (1, N)
    assert find_cold(store, False, range(3)) == [5]
    assert find_cold(store, False, [0, 40, N - 1], in_units=True) == [0, 40, N - 1]
    store.mark_idle()
    store.read(0, PAGE)
    assert count_cold(store, True, in_units=True) == N - 1


# ---- how long it stays ------------------------------------------------------------------------------

def test_a_dictionary_stays_until_the_last_unit_with_it_is_gone(store: Store) -> None:
    set_secondary(store, 1, learned(1000))
    make_units(store)
    for number in range(N - 1):
        store.write(number * PAGE, record(number))
        assert number % 16 != 15 or not drop_secondary(store, 1)
    assert count_in_units(store) == (0, 16, 0, 0), "dead places are in the stream"
    store.write((N - 1) * PAGE, record(N - 1))
    assert drop_secondary(store, 1) and count_in_units(store) == (0, 0, 0, 0)
    set_secondary(store, 1, learned(2000))
    assert make_units(store).made == 4


def test_units_go_to_a_newer_dictionary_that_makes_them_smaller_and_the_old_one_can_go(store: Store) -> None:
    set_secondary(store, 1, learned(1000, kind=prose))
    make_units(store, level=3)
    set_secondary(store, 2, learned(1000))
    done = one_pass(store, 3)
    assert (done.made, done.pages, done.packed) == (4, 0, N) and done.bytes_saved > 0
    assert prios(store) == [2] * 4
    assert drop_secondary(store, 1) and not drop_secondary(store, 2)
    assert one_pass(store, 3) == UnitMakingStats()


def test_units_stay_with_an_older_dictionary_that_makes_them_smaller_and_are_tried_once(store: Store) -> None:
    set_secondary(store, 1, learned(1000))
    make_units(store, level=3)
    set_secondary(store, 2, learned(1000, kind=prose))
    assert one_pass(store, 3).kept == 4
    assert prios(store) == [1] * 4 and not drop_secondary(store, 1) and drop_secondary(store, 2)
    assert one_pass(store, 3).groups == 0, "they have the dictionary that there is"
    set_secondary(store, 2, learned(1000, kind=prose))
    assert one_pass(store, 3).kept == 4, "another one, though of the same priority"
    for _ in range(2):
        assert one_pass(store, 3) == UnitMakingStats()


# ---- with more effort -------------------------------------------------------------------------------

def with_prose(level: int) -> Store:
    store = Store(N * PAGE)
    for number in range(N):
        store.write(number * PAGE, prose(number))
    assert make_units(store, level=level).made == 4
    return store


def test_a_unit_of_a_lower_level_is_made_anew_once() -> None:
    store = with_prose(1)
    before = store.stats().unit_bytes
    assert one_pass(store, 1) == UnitMakingStats()
    done = one_pass(store, 19)
    assert (done.made, done.pages, done.packed) == (4, 0, N)
    assert store.stats().unit_bytes < before
    assert [unit_of(file_of(store), group).level for group in range(4)] == [19] * 4
    for level in (19, 1, 9, 19):
        assert one_pass(store, level) == UnitMakingStats()
    assert make_units(store, level=3).groups == 0, "a lower level is never better"
    store.check(3)
    assert all(store.peek(number) == prose(number) for number in range(N))


def test_a_unit_that_becomes_no_smaller_is_tried_once_with_each_effort_that_is_higher_than_ever() -> None:
    """Whatever passes of lower levels come between. Of copies of one page no level makes more or less."""
    store = Store(16 * PAGE)
    for number in range(16):
        store.write(number * PAGE, noise(7))
    make_units(store, level=1)
    assert one_pass(store, 3).kept == 1
    for level in (3, 1, 2, 3, 1, 3):
        assert one_pass(store, level) == UnitMakingStats()
    assert one_pass(store, 9).kept == 1
    for level in (9, 3, 9, 1, 9):
        assert one_pass(store, level) == UnitMakingStats()
    assert make_units(store, level=9).kept == 1, "a thorough pass tries it again"
    store.write(0, noise(1))
    one_pass(store, 9)
    store.check(3)


def test_a_lower_effort_that_fails_hides_nothing_from_a_higher_one() -> None:
    store = with_prose(1)
    assert one_pass(store, 19).made == 4
    for number in range(N):
        store.write(number * PAGE, prose(number))
    assert make_units(store, level=1).made == 4
    # A dead place that saves nothing would be the reason of a mark.
    word, file = word_of(file_of(store), 0), file_of(store)
    set_word(file, 0, word.location << 24 | word.live << 8 | 4)
    assert one_pass(store, 1) == UnitMakingStats()
    assert one_pass(store, 19).made == 4
    store.check(3)


# ---- recovery ---------------------------------------------------------------------------------------

def adopted(store: Store) -> Store:
    copy = copy_of(store.migration.arena.fileno())
    store.close()
    found = Store.adopt(copy)
    os.close(copy)
    return found


def test_a_successor_finds_units_and_their_dictionary() -> None:
    store = Store(N * PAGE)
    fill(store)
    set_secondary(store, 3, learned(1000))
    make_units(store)
    store.zero(5 * PAGE, PAGE)
    store = adopted(store)
    assert store.recovered.lost == 0 and count_in_units(store) == (0, 0, 0, N)
    assert not drop_secondary(store, 3)
    store.write(5 * PAGE, record(5))
    assert holds(store)


@pytest.mark.parametrize("prio", [2, 7])
def test_a_unit_whose_dictionary_is_not_there_costs_its_pages_and_no_more(prio: int) -> None:
    store = Store(N * PAGE)
    fill(store)
    set_secondary(store, 1, learned(1000))
    make_units(store)
    file = file_of(store)
    _, head = file.object(word_of(file, 1).location)
    at = at_of(file, word_of(file, 1).location, len(head)) + 6
    assert os.pread(file.fd, 1, at) == b"\1"
    os.pwrite(file.fd, bytes([prio]), at)
    for number in range(16, 32):
        with pytest.raises(OSError) as caught:
            store.read(number * PAGE, PAGE)
        assert caught.value.errno == errno.EIO
    store = adopted(store)
    assert store.recovered.lost == 16 and count_in_units(store) == (0, N - 16, 0, 0)
    store.check(3)
    assert all(store.peek(number) == record(number) for number in range(N) if not 16 <= number < 32)


def at_of(file: MemoryFile, location: int, length: int) -> int:
    """Where an object of this length begins in the file."""
    zspage = file.zspage(location >> 8)
    size = 32 + 16 * zspage.class_idx
    start = 0 if size >= PAGE else (location & 0xFF) * size + 8
    frame, at = divmod(start, PAGE)
    assert length <= PAGE
    return file.frame_off(zspage.frames[frame]) + at


def test_units_of_the_layout_without_dictionaries_are_read_and_made_anew() -> None:
    """As the version before wrote them: 32 bits for the size, and the record of that version."""
    store = Store(N * PAGE)
    fill(store)
    make_units(store, level=3)
    file = file_of(store)
    for group in range(4):
        location = word_of(file, group).location
        _, head = file.object(location)
        at = at_of(file, location, len(head))
        os.pwrite(file.fd, b"\x01\x75", at)
        os.pwrite(file.fd, b"\0\0", at + 6)
    os.pwrite(file.fd, b"\1\0\0\0", 1008 + 8)
    store = adopted(store)
    assert store.recovered.lost == 0 and holds(store)
    set_secondary(store, 1, learned(1000))
    assert os.pread(store.migration.arena.fileno(), 1, 1008 + 8) == b"\1"
    assert one_pass(store, 3).made == 4
    assert os.pread(store.migration.arena.fileno(), 1, 1008 + 8) == b"\2", "that version could not read it"
    assert prios(store) == [1] * 4 and holds(store)


# ---- on the backing store, and in an image ----------------------------------------------------------

def test_a_unit_is_written_back_with_its_dictionary_which_its_slots_name(tmp_path: Path) -> None:
    with backed(tmp_path / "file", N * PAGE) as store:
        fill(store)
        set_secondary(store, 2, learned(1000))
        make_units(store)
        run = write_back(store)
        assert (run.pages, run.units) == (N, 4) and len(set(extents(store).values())) == 4
        assert {file_of(store).slot(number).prio for number in range(N)} == {2}
        assert count_priorities(store) == (0, 0, N, 0) and count_in_units(store) == (0, 0, 0, 0)
        assert not drop_secondary(store, 2)
        store.check(3)
        for _ in range(2):
            assert all(store.read(number * PAGE, PAGE) == record(number) for number in range(N))
        fill(store)
        assert drop_secondary(store, 2)


def test_pages_that_leave_their_unit_singly_name_no_dictionary(tmp_path: Path) -> None:
    with backed(tmp_path / "file", N * PAGE) as store:
        fill(store)
        set_secondary(store, 2, learned(1000))
        make_units(store)
        run = write_back(store, (0, 8))
        assert (run.pages, run.units) == (8, 0)
        assert count_priorities(store) == (8, 0, 0, 0)
        store.check(3)
        assert all(store.read(number * PAGE, PAGE) == record(number) for number in range(N))


def test_what_lies_on_the_backing_store_is_found_with_its_dictionary_by_a_successor(tmp_path: Path) -> None:
    store = Store(N * PAGE, backing=Backing(str(backing_file(tmp_path / "file"))))
    fill(store)
    set_secondary(store, 1, learned(1000))
    make_units(store)
    write_back(store)
    copy, kept = copy_of(store.migration.arena.fileno()), os.dup(store.backing.fileno())
    store.leave()
    other = Store.adopt(copy, backing=Backing(str(tmp_path / "file"), kept=kept))
    os.close(copy)
    os.close(kept)
    assert other.recovered.lost == 0
    other.check(3)
    assert all(other.read(number * PAGE, PAGE) == record(number) for number in range(N))
    assert not drop_secondary(other, 1)
    other.close()


def test_an_image_has_pages_of_units_as_single_pages(tmp_path: Path) -> None:
    store = Store(N * PAGE)
    fill(store)
    set_secondary(store, 1, learned(1000))
    make_units(store)
    save(store, tmp_path / "image")
    other, lost, damage = restored(tmp_path / "image")
    assert (other.stats().units, lost, damage) == (0, [], []) and holds(other)


# ---- beside a reader --------------------------------------------------------------------------------

A_UNIT_IS_REPLACED = """
import ctypes, sys, threading, time
from tests.store.unit_dictionary_test import N, PAGE, fill, learned, prios
from tests.support.page_kinds import prose, record
from zramfs.store.secondary import count_in_units, drop_secondary, set_secondary
from zramfs.store.store import Store
from tests.support.unit_tools import make_units
library = ctypes.CDLL(sys.argv[1])
hold, held, hold_making, making_held = (
    ctypes.c_int.in_dll(library, name) for name in ("hold", "held", "hold_making", "making_held"))
store = Store(16 * PAGE)
for number in range(16):
    store.write(number * PAGE, record(number))
set_secondary(store, 1, learned(1000, kind=prose))
assert make_units(store).made == 1
set_secondary(store, 2, learned(1000))
hold_making.value = 1
maker = threading.Thread(target=make_units, args=(store,))
maker.start()
while not making_held.value:
    time.sleep(0.001)
# The pages are copied. A reader begins with the old unit.
found = []
hold.value = 1
reader = threading.Thread(target=lambda: found.append(store.read(9 * PAGE, PAGE)))
reader.start()
while not held.value:
    time.sleep(0.001)
hold_making.value = 0
maker.join()
assert count_in_units(store) == (0, 0, 16, 0)
refused = not drop_secondary(store, 1)
hold.value = 0
reader.join()
assert refused and found == [record(9)]
assert drop_secondary(store, 1)
store.check(3)
assert store.read(0, 16 * PAGE) == b"".join(map(record, range(16)))
"""


@pytest.mark.requires("cc")
def test_a_dictionary_stays_while_a_thread_reads_a_unit_that_was_replaced(tmp_path: Path) -> None:
    alloc_hook.run(A_UNIT_IS_REPLACED, tmp_path, source="held_units.c")
