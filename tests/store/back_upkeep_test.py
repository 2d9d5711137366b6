# SPDX-License-Identifier: Apache-2.0
"""The upkeep of units on the backing store: what little is left of one comes back to memory."""
from __future__ import annotations

import errno
import random
import threading
from pathlib import Path

import pytest

from tests.store.back_units_test import PAGE, expect, page, unreadable, with_units, written
from tests.support.backing_tools import backed, extents, write_back
from tests.support.memory_file import MemoryFile
from tests.support.page_kinds import noise, prose
from tests.support.unit_tools import make_units
from zramfs.model.stats import BackUpkeepStats
from zramfs.store.back_upkeep import BackUpkeep
from zramfs.store.store import Store


def return_worn(store: Store, level: int = 3) -> BackUpkeepStats:
    """level: of the check of all sums after it."""
    upkeep = BackUpkeep(store)
    try:
        while upkeep.step(1):
            pass
    finally:
        done = upkeep.finish()
    store.check(level)
    return done


def test_a_unit_comes_back_when_its_pages_take_no_more_than_it_does(tmp_path: Path) -> None:
    with with_units(tmp_path / "file", 1) as store:
        write_back(store)
        ((_, extent),) = set(extents(store).values())
        most = extent // PAGE
        assert 1 < most < 15
        blocks, changed = store.backing.stats(), {}
        for left in range(15, most, -1):
            changed[left] = bytes(PAGE)
            store.zero(left * PAGE, PAGE)
            assert return_worn(store) == BackUpkeepStats()
        assert len(written(store)) == most + 1 and store.backing.stats().used == blocks.used
        store.write(0, noise(0))
        changed[0] = noise(0)
        assert store.backing.stats().unit_left == 16 - most
        assert return_worn(store) == BackUpkeepStats(units=1, pages=most)
        after = store.backing.stats()
        assert not written(store) and after.used == store.stats().written_back == 0
        assert (after.writes, after.unit_left) == (blocks.writes, 16 - most), "nothing is written for that"
        assert after.reads - blocks.reads <= blocks.used, "it is read once"
        file = MemoryFile(store.migration.arena.fileno())
        assert [n for n in range(16) if file.slot(n).idle] == list(range(1, most + 1))
        assert store.stats().units == 0
        expect(store, changed)


def test_of_several_units_only_the_worn_ones_come_back(tmp_path: Path) -> None:
    """Of the first group there are an old one with two pages and a new one with all of its 14; the second and
    the fourth one are whole, and of the third one page is left."""
    with with_units(tmp_path / "file", 4) as store:
        write_back(store)
        changed = {n: prose(100 + n) for n in range(2, 16)}
        for number, content in changed.items():
            store.write(number * PAGE, content)
        make_units(store)
        assert write_back(store).units == 1
        store.zero(32 * PAGE, 15 * PAGE)
        changed |= dict.fromkeys(range(32, 47), bytes(PAGE))
        used = store.backing.stats().used
        assert return_worn(store) == BackUpkeepStats(units=2, pages=3)
        assert written(store) == {*range(2, 32), *range(48, 64)}
        assert store.backing.stats().used < used
        expect(store, changed)
        assert return_worn(store) == BackUpkeepStats()


def test_without_room_in_the_pool_it_stays_and_comes_later(tmp_path: Path) -> None:
    with with_units(tmp_path / "file", 4) as store:
        write_back(store)
        store.zero(3 * PAGE, 29 * PAGE)
        changed = dict.fromkeys(range(3, 32), bytes(PAGE))
        store.write(32 * PAGE, b"".join(map(noise, range(32))))
        changed |= {32 + n: noise(n) for n in range(32)}
        used = store.stats().mem_used_total
        store.set_mem_limit(used + PAGE)  # less than a 16th is left
        assert return_worn(store) == BackUpkeepStats(no_room=1)
        assert written(store) == {0, 1, 2}
        store.set_mem_limit(2 * used)
        assert return_worn(store) == BackUpkeepStats(units=1, pages=3)
        expect(store, changed)


def test_a_unit_that_is_damaged_stays_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with with_units(path, 2) as store:
        write_back(store)
        store.zero(2 * PAGE, 14 * PAGE)
        store.zero(18 * PAGE, 14 * PAGE)
        offset, _ = extents(store)[0]
        with path.open("r+b") as file:
            file.seek(offset + 100)
            file.write(b"damage")
        assert return_worn(store, 2) == BackUpkeepStats(units=1, pages=2, failed=1)
        assert written(store) == {0, 1}
        for number in (0, 1):
            unreadable(store, number)
        for number in (16, 17):
            assert store.read(number * PAGE, PAGE) == page(number)


def test_it_is_refused_without_a_backing_store_and_beside_other_work(tmp_path: Path) -> None:
    store = Store(1 << 20)
    with pytest.raises(ValueError, match="with a backing store"):
        BackUpkeep(store)
    store.close()
    with backed(tmp_path / "file", 1 << 20, secondary=[]) as store:
        upkeep = BackUpkeep(store)
        with pytest.raises(OSError) as caught:
            BackUpkeep(store)
        assert caught.value.errno == errno.EBUSY
        upkeep.finish()
        with pytest.raises(ValueError, match="finished"):
            upkeep.step(1)
        assert not BackUpkeep(store).step(1 << 30)


def test_pages_that_are_used_meanwhile_are_what_was_written_last(tmp_path: Path) -> None:
    """Two threads write, discard and read while the units come back, and are written back again."""
    with with_units(tmp_path / "file", 9, room=400) as store:
        ending, failures = threading.Event(), []

        def use(mine: range) -> None:
            rng = random.Random(mine.start)
            model = {number: page(number) for number in mine}
            try:
                while not ending.is_set():
                    number = rng.choice(mine)
                    match rng.randrange(4):
                        case 0:
                            model[number] = prose(rng.randrange(200))
                            store.write(number * PAGE, model[number])
                        case 1:
                            model[number] = bytes(PAGE)
                            store.zero(number * PAGE, PAGE)
                        case _:
                            assert store.read(number * PAGE, PAGE) == model[number], number
                for number, content in model.items():
                    assert store.read(number * PAGE, PAGE) == content, number
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=use, args=(range(first, 128, 2),)) for first in (0, 1)]
        write_back(store)
        store.zero(130 * PAGE, 14 * PAGE)   # of the last group, which is nobody else's
        for each in threads:
            each.start()
        came = 0
        for _ in range(60):
            came += return_worn_unchecked(store)
            make_units(store)
            write_back(store)
        ending.set()
        for each in threads:
            each.join()
        assert not failures and came >= 2
        assert store.read(128 * PAGE, 16 * PAGE) == page(128) + page(129) + bytes(14 * PAGE)
        store.check(3)


def return_worn_unchecked(store: Store) -> int:
    upkeep = BackUpkeep(store)
    while upkeep.step(1 << 30):
        pass
    return upkeep.finish().pages
