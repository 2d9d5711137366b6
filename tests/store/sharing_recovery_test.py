# SPDX-License-Identifier: Apache-2.0
"""Shared pages after a kill or damage: what is counted anew, what is lost, and what never is."""
from __future__ import annotations

import errno
import os

import pytest

from tests.store.sharing_test import PAGE, N, adopted, file_of, holds, kept, page, with_shared
from tests.support.page_kinds import noise
from tests.support.share_tools import cell_of, set_cell, share, shared_cell, slot_word


def test_shared_pages_are_adopted_with_their_counts() -> None:
    store = kept(with_shared)
    store.zero(2 * PAGE, 3 * PAGE)
    store.write(7 * PAGE, page(8))
    share(store)
    before = store.stats()
    store = adopted(store)
    assert store.recovered.lost == store.recovered.objects_freed == 0
    after = store.stats()
    for name in ("shared_pages", "shared_objects", "shared_bytes", "compr_data_size", "orig_data_size"):
        assert getattr(after, name) == getattr(before, name), name
    changed = {**dict.fromkeys((2, 3, 4), bytes(PAGE)), 7: page(8)}
    assert holds(store, changed)
    # The table is empty after it, and a new sharing knows the objects all the same.
    store.write(2 * PAGE, page(8))
    changed[2] = page(8)
    assert share(store).joined == 1
    file = file_of(store)
    assert cell_of(file, shared_cell(file, 8)).users == 4
    assert holds(store, changed)


def test_recovery_rebuilds_users_and_frees_what_no_slot_names() -> None:
    store = kept(with_shared)
    file = file_of(store)
    cell = shared_cell(file, 0)
    location = cell_of(file, cell).location
    set_cell(file, cell, location << 24 | 77 << 8 | 3)          # locked, with a wrong count
    set_cell(file, 100, 12345 << 24 | 1 << 8 | 2)               # a location without an object
    file.set_slot_word(1, 0)
    file.set_slot_word(1 + N // 2, 0)
    store = adopted(store)
    assert store.recovered.lost == 0 and store.recovered.objects_freed == 1
    assert store.stats().shared_objects == N // 2 - 1
    assert holds(store, {1: bytes(PAGE), 1 + N // 2: bytes(PAGE)})


def flip(word: int, bit: int) -> int:
    return word ^ 1 << bit


@pytest.mark.parametrize("what", ["cell", "check", "prio", "out of range", "free cell", "halves"])
def test_a_slot_that_is_damaged_costs_its_page_and_never_the_object(what: str) -> None:
    store = kept(with_shared)
    file = file_of(store)
    word = file.slot_word(3)
    damaged = {
        "cell": flip(word, 24), "check": flip(word, 12), "prio": flip(word, 4),
        "out of range": flip(word, 60), "free cell": slot_word(3, 90), "halves": flip(word, 9),
    }[what]
    file.set_slot_word(3, damaged)
    with pytest.raises(OSError) as caught:
        store.read(3 * PAGE, PAGE)
    assert caught.value.errno == errno.EIO
    # What it names now keeps its users.
    store.write(3 * PAGE, noise(1))
    assert all(store.peek(n) == page(n) for n in range(N) if n != 3)
    file.set_slot_word(3, damaged)
    store = adopted(store)
    assert store.recovered.lost == 1
    store.check(2)
    with pytest.raises(OSError):
        store.read(3 * PAGE, PAGE)
    store.write(3 * PAGE, page(3))
    assert holds(store)
    store.zero(0, N * PAGE)
    store.check(3)
    assert store.stats().mem_used_total == 0


@pytest.mark.parametrize("what", ["location", "gone", "header", "another's"])
def test_a_cell_that_is_damaged_costs_the_pages_that_share_it(what: str) -> None:
    store = kept(with_shared)
    file = file_of(store)
    cell, other = shared_cell(file, 3), shared_cell(file, 9)
    found = cell_of(file, cell)
    word = found.location << 24 | 2 << 8 | 2
    match what:
        case "location":
            set_cell(file, cell, flip(word, 45))
        case "gone":
            set_cell(file, cell, 0)
        case "another's":
            set_cell(file, cell, cell_of(file, other).location << 24 | 2 << 8 | 2)
        case _:
            size = 32 + 16 * file.zspage(found.location >> 8).class_idx
            os.pwrite(file.fd, bytes(8), file.header_off(found.location, size))
    store = adopted(store)
    assert store.recovered.lost == 2
    store.check(2)
    for number in range(N):
        if number in (3, 3 + N // 2):
            with pytest.raises(OSError):
                store.read(number * PAGE, PAGE)
            store.write(number * PAGE, page(number))
    assert holds(store)
    assert store.stats().shared_objects == N // 2 - 1
