# SPDX-License-Identifier: Apache-2.0
"""Upkeep of units: what a pass that is not thorough looks at, when a unit with dead places is made anew, and
that a device on which pages come and go is as dense afterwards as one that is packed for the first time."""
from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.backing_tools import backing_file
from tests.support.memory_file import MemoryFile
from tests.support.page_kinds import block, hard, noise, prose
from tests.support.unit_tools import make_units, set_word, word_of
from zramfs.codecs.codec import Codec
from zramfs.model.stats import UnitMakingStats
from zramfs.store.backing import Backing
from zramfs.store.store import Store
from zramfs.store.unit_making import UnitMaking
from zramfs.store.writeback import WritebackRun

PAGE = 4096
GROUP = 16 * PAGE


def filled(groups: int, page: Callable[[int], bytes] = prose, **how: object) -> Store:
    store = Store(groups * GROUP, secondary=[Codec("zstd", 3)], **how)
    for number in range(groups * 16):
        store.write(number * PAGE, page(number))
    return store


def one_pass(store: Store, *, joins: bool = True) -> UnitMakingStats:
    """As a policy does it, or as upkeep does it by itself."""
    return make_units(store, joins=joins, thorough=False)


def kinds(store: Store, n: int = 16) -> list[str]:
    file = MemoryFile(store.migration.arena.fileno())
    return [file.slot(number).type for number in range(n)]


# ---- dead places ------------------------------------------------------------------------------------

def test_a_unit_that_is_more_than_half_dead_is_made_anew_at_the_first_look() -> None:
    store = filled(4)
    make_units(store)
    store.zero(0, 9 * PAGE)
    done = one_pass(store, joins=False)
    assert (done.made, done.pages, done.packed, store.stats().unit_dead) == (1, 0, 7, 0)
    assert done.bytes_saved > 0 and done.cpu_ns > 0
    store.check(3)


def test_one_that_is_less_than_half_dead_is_made_anew_when_it_has_been_left_alone() -> None:
    store = filled(4)
    make_units(store)
    store.zero(3 * PAGE, PAGE)
    assert one_pass(store, joins=False) == UnitMakingStats()
    store.zero(5 * PAGE, PAGE)
    assert one_pass(store, joins=False) == UnitMakingStats(), "a page has left it since the first look"
    assert word_of(MemoryFile(store.migration.arena.fileno()), 0).live == 0b1111111111010111
    done = one_pass(store, joins=False)
    assert (done.made, done.packed, store.stats().unit_dead) == (1, 14, 0)
    assert one_pass(store, joins=False) == UnitMakingStats()
    store.check(3)


def test_a_thorough_pass_makes_it_anew_at_once() -> None:
    store = filled(4)
    make_units(store)
    store.zero(3 * PAGE, PAGE)
    before = store.stats().unit_bytes
    assert make_units(store).made == 1
    assert store.stats().unit_dead == 0 and store.stats().unit_bytes < before
    store.check(3)


def test_upkeep_brings_no_page_into_a_unit() -> None:
    store = filled(4)
    make_units(store)
    store.zero(0, 9 * PAGE)
    store.write(2 * PAGE, prose(2))
    done = one_pass(store, joins=False)
    assert (done.made, done.pages, kinds(store)[2]) == (1, 0, "obj")
    assert one_pass(store).pages == 1
    assert kinds(store)[2] == "unit"
    store.check(3)


def test_the_last_page_is_a_single_page_at_the_first_look() -> None:
    store = filled(4)
    make_units(store)
    store.zero(PAGE, 15 * PAGE)
    assert one_pass(store, joins=False).dissolved == 1
    assert (kinds(store)[0], store.stats().units) == ("obj", 3)
    store.check(3)


# ---- what was tried in vain -------------------------------------------------------------------------

def test_pages_that_no_unit_makes_smaller_are_tried_once_until_one_of_them_is_written() -> None:
    store = filled(2, noise)
    assert one_pass(store).kept == 2
    assert one_pass(store) == UnitMakingStats()
    store.compact()
    assert one_pass(store) == UnitMakingStats(), "the marks are gone when objects move"
    assert make_units(store).kept == 2, "a thorough pass tries them again"
    store.write(17 * PAGE, noise(1))
    assert one_pass(store).kept == 1
    store.check(3)


def test_a_page_that_was_used_while_its_group_was_tried_has_no_mark() -> None:
    """A read beside the making clears the selection, and the next pass tries the group again."""
    store = filled(1, noise)
    file = MemoryFile(store.migration.arena.fileno())
    assert one_pass(store).kept == 1
    assert {file.slot_word(number) >> 11 & 1 for number in range(16)} == {1}
    store.read(3 * PAGE, PAGE)
    assert file.slot_word(3) >> 11 & 1, "the bytes are the same after a read"
    store.write(3 * PAGE + 5, b"changed")
    assert not file.slot_word(3) >> 11 & 1


def worn_in_vain() -> tuple[Store, int]:
    """A store with a unit whose live part takes as much as the whole: the pages that left it were copies."""
    for copies in range(1, 7):
        store = filled(1, lambda number: prose(7))
        make_units(store)
        store.zero(0, copies * PAGE)
        done = make_units(store)
        if done.kept:
            assert done.made == 0
            return store, copies
    raise AssertionError("each copy that left made the unit smaller")


def test_a_unit_whose_live_part_takes_as_much_is_tried_once_until_another_page_leaves() -> None:
    store, copies = worn_in_vain()
    for _ in range(3):
        assert one_pass(store) == UnitMakingStats()
    assert store.stats().unit_dead == copies
    assert make_units(store).kept == 1
    store.zero(copies * PAGE, PAGE)
    one_pass(store)
    done = one_pass(store)
    assert done.made + done.kept == 1
    store.check(3)


def test_a_unit_that_cannot_be_read_is_looked_at_once() -> None:
    store = filled(2)
    make_units(store)
    store.zero(0, PAGE)
    file = MemoryFile(store.migration.arena.fileno())
    word = word_of(file, 0)
    set_word(file, 0, word_of(file, 1).location + 1 << 24 | word.live << 8)
    assert one_pass(store).made == 0
    damage = store.stats().corrupt
    for _ in range(2):
        assert one_pass(store) == UnitMakingStats()
    assert store.stats().corrupt == damage > 0
    set_word(file, 0, word.location << 24 | word.live << 8)
    assert all(store.read(number * PAGE, PAGE) == prose(number) for number in range(1, 32))


def test_recovery_forgets_what_was_tried() -> None:
    fd = os.memfd_create("kept")
    store = filled(2, lambda number: noise(number) if number < 16 else prose(number), fd=fd)
    make_units(store)
    store.zero(16 * PAGE, 2 * PAGE)
    one_pass(store)
    store.leave()
    store = Store.adopt(fd)
    os.close(fd)
    assert store.recovered.lost == 0
    store.check(3)
    assert one_pass(store).kept == 1
    assert one_pass(store).made == 1


# ---- against a fresh packing ------------------------------------------------------------------------

MAKERS = (prose, prose, hard, lambda seed: block("text", seed, PAGE),
          lambda seed: block("half random", seed, PAGE), noise, lambda seed: bytes(PAGE))


def rested(store: Store) -> int:
    """Bytes that the pool takes when nobody has used the store for some time. Each pass finds the pages idle,
    as a policy does."""
    for _ in range(3):
        store.mark_idle()
        make_units(store, idle=True, thorough=False)
    store.compact()
    store.check(3)
    return store.stats().mem_used_total


def packed_anew(pages: list[bytes]) -> int:
    store = Store(len(pages) * PAGE, secondary=[Codec("zstd", 3)])
    for number, page in enumerate(pages):
        if any(page):
            store.write(number * PAGE, page)
    make_units(store)
    store.compact()
    return store.stats().mem_used_total


@pytest.mark.parametrize("seed", range(3))
def test_memory_does_not_creep_where_pages_are_overwritten_discarded_and_read(seed: int) -> None:
    """And every page stays what it is. A pass comes after each 50 operations."""
    rng, groups = random.Random(seed), 96
    pages = [prose(number % 200) for number in range(groups * 16)]
    store = filled(groups, lambda number: pages[number])
    make_units(store)
    for turn in range(3000):
        number = rng.randrange(groups * 16)
        match rng.randrange(4):
            case 0:
                pages[number] = rng.choice(MAKERS)(rng.randrange(200))
                store.write(number * PAGE, pages[number])
            case 1:
                pages[number] = bytes(PAGE)
                store.zero(number * PAGE, PAGE)
            case _:
                for _ in range(rng.randrange(1, 3)):
                    assert store.read(number * PAGE, PAGE) == pages[number]
        if turn % 50 == 0:
            if turn % 200 == 0:
                store.mark_idle()
            make_units(store, idle=True, joins=turn % 100 == 0, thorough=False)
    used, fresh = rested(store), packed_anew(pages)
    assert used <= 1.05 * fresh
    for number, page in enumerate(pages):
        assert store.peek(number) == page
    # And it comes to rest: nothing is left to do.
    last = make_units(store, idle=True, thorough=False)
    assert (last.made, last.dissolved, last.kept) == (0, 0, 0)


def test_a_unit_that_a_page_cannot_join_is_made_anew_without_it() -> None:
    """The page is noise, and a unit with it takes more than both do. Its dead place goes all the same."""
    store = filled(1)
    make_units(store)
    store.write(6 * PAGE, noise(6))
    done = make_units(store)
    assert (done.groups, done.made, done.pages, done.packed, done.kept) == (1, 1, 0, 15, 0)
    assert (store.stats().unit_pages, store.stats().unit_dead) == (15, 0)
    done = make_units(store, thorough=False)
    assert done.groups == 0
    store.check(3)
    assert store.read(6 * PAGE, PAGE) == noise(6)


# ---- with write-back --------------------------------------------------------------------------------

def test_pages_of_units_are_written_back_by_themselves_and_upkeep_packs_what_they_leave(
    tmp_path: Path,
) -> None:
    """Every third page goes. Each is read back, and may join its neighbours again."""
    store = filled(8, backing=Backing(str(backing_file(tmp_path / "backing"))))
    make_units(store)
    gone = list(range(0, 128, 3))
    run = WritebackRun(store, 8)
    for number in gone:
        run.select(number, number + 1, None)
    while run.left:
        run.write()
    run.finish()
    stats = store.stats()
    assert (run.pages, run.failed, stats.written_back, stats.unit_dead) == (43, 0, 43, 43)
    store.check(3)
    before = stats.unit_bytes
    one_pass(store, joins=False)
    done = one_pass(store, joins=False)
    assert (done.made, done.packed, store.stats().unit_dead) == (8, 85, 0)
    assert store.stats().unit_bytes < before - 43 * 500
    for number in range(128):
        assert store.read(number * PAGE, PAGE) == prose(number)
    assert store.stats().written_back == 43, "a read leaves a page where it is"
    for number in gone:
        store.write(number * PAGE, prose(number))
    assert one_pass(store).pages == 43
    store.check(3)


def test_a_page_that_leaves_while_the_passes_go_on_is_not_lost() -> None:
    """Between two steps of one pass anything may happen to the group that comes next."""
    store = filled(8)
    make_units(store)
    for number in range(0, 128, 5):
        store.zero(number * PAGE, PAGE)
    one_pass(store, joins=False)
    making = UnitMaking(store, joins=False, thorough=False)
    group = 0
    while making.step(0):
        group += 1
        live = next(number for number in range(16 * group, 16 * group + 16) if number % 5)
        store.write(live * PAGE, hard(group))
    assert making.finish().made == 1, "the others were touched just before"
    store.check(3)
    assert one_pass(store, joins=False).made + one_pass(store, joins=False).made == 7
    store.check(3)
