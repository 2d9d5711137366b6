# SPDX-License-Identifier: Apache-2.0
"""Units of several pages: which pages join, what lies in the pool, what a read, a write and a discard do."""
from __future__ import annotations

import errno
import os
import random
import struct
from pathlib import Path

import pytest

from tests.support.backing_tools import backing_file
from tests.support.memory_file import MemoryFile
from tests.support.page_kinds import block, hard, noise, prose
from tests.support.unit_tools import make_units, set_word, unit_of, unpacked, word_of
from zramfs.codecs.codec import Codec
from zramfs.model.stats import UnitMakingStats
from zramfs.store import block_state
from zramfs.store.backing import Backing
from zramfs.store.recompress import Recompression
from zramfs.store.store import Store
from zramfs.store.unit_making import UnitMaking
from zramfs.store.writeback import WritebackRun

PAGE = 4096
GROUP = 16 * PAGE


def page(number: int) -> bytes:
    return prose(number % 64)


def filled(groups: int = 4, **how: object) -> Store:
    store = Store(groups * GROUP, **{"secondary": [Codec("zstd", 3)], **how})
    for number in range(groups * 16):
        store.write(number * PAGE, page(number))
    return store


def with_units(groups: int = 4, **how: object) -> Store:
    store = filled(groups, **how)
    done = make_units(store)
    assert done.made == groups and done.pages == 16 * groups
    return store


def kinds(store: Store, n: int = 16) -> list[str]:
    file = MemoryFile(store.migration.arena.fileno())
    return [file.slot(number).type for number in range(n)]


def holds(store: Store, groups: int = 4, changed: dict[int, bytes] | None = None) -> bool:
    changed = changed or {}
    store.check(3)
    return all(store.peek(n) == changed.get(n, page(n)) for n in range(groups * 16))


# ---- making -----------------------------------------------------------------------------------------

def test_neighbours_become_a_unit_that_takes_less_memory_than_they_do_singly() -> None:
    store, singly = filled(64), filled(64)
    words = random.Random(3).choices(prose(1).split() + prose(2).split(), k=64 * GROUP // 5)
    text = b" ".join(words)[:64 * GROUP]
    assert len(text) == 64 * GROUP
    for each in (store, singly):
        each.write(0, text)
    assert make_units(store).pages == 1024
    job = Recompression(singly, 1)
    while job.select(1 << 30) or job.step(1 << 30):
        pass
    job.finish()
    for each in (store, singly):
        each.compact()
    store.check(3)
    assert store.read(0, 64 * GROUP) == text
    now, before = store.stats(), singly.stats()
    assert now.compr_data_size < 0.9 * before.compr_data_size
    assert now.mem_used_total < 0.95 * before.mem_used_total
    assert (now.units, now.unit_pages, now.unit_dead) == (64, 1024, 0)
    assert now.unit_bytes == now.compr_data_size


def test_a_unit_lies_in_the_pool_as_it_is_drawn() -> None:
    store = Store(4 * GROUP)
    for number in (*range(16, 20), *range(22, 32)):
        store.write(number * PAGE, hard(number))
    store.write(20 * PAGE, bytes(PAGE))
    assert make_units(store, level=5).pages == 14
    file = MemoryFile(store.migration.arena.fileno())
    unit = unit_of(file, 1)
    assert word_of(file, 1)[1:] == (0b1111111111001111, False, False)
    assert (unit.magic, unit.members, unit.serial) == (0x7502, 0b1111111111001111, 1)
    assert (unit.prio, unit.level) == (0, 5)
    assert unit.size == len(unit.stream) and len(unit.parts) == unit.size // PAGE > 8
    assert unit.tags == (1 << 47 | 1, *(1 << 47 | k << 32 | 1 for k in range(1, len(unit.parts) + 1)))
    assert unpacked(unit.stream) == b"".join(hard(n) for n in (*range(16, 20), *range(22, 32)))
    assert [file.slot_word(number) for number in (16, 31)] == [6 << 1 | 1 << 6] * 2
    # The first bytes of a head, as they are in the file.
    _, head = file.object(word_of(file, 1).location)
    assert head[:16] == bytes.fromhex("0275cfff") + struct.pack("<HBbQ", unit.size, 0, 5, 1)


def test_only_idle_pages_join_where_that_is_asked_for() -> None:
    store = filled()
    store.mark_idle()
    store.read(3 * PAGE, 2 * PAGE)
    store.write(17 * PAGE, page(17))
    done = make_units(store, idle=True)
    assert (done.groups, done.made, done.pages) == (4, 4, 61)
    assert kinds(store)[2:6] == ["unit", "obj", "obj", "unit"] and kinds(store, 18)[17] == "obj"
    assert holds(store)


def test_pages_that_are_the_same_everywhere_and_empty_ones_stay_as_they_are() -> None:
    store = filled()
    store.write(2 * PAGE, bytes(PAGE))
    store.write(5 * PAGE, block("odd word", 1, PAGE))
    store.zero(9 * PAGE, PAGE)
    assert make_units(store).pages == 61
    assert [kinds(store)[n] for n in (2, 5, 9)] == ["same", "same_obj", "empty"]
    assert holds(store, changed={2: bytes(PAGE), 5: block("odd word", 1, PAGE), 9: bytes(PAGE)})


def test_a_page_alone_and_pages_that_nothing_makes_smaller_become_no_unit() -> None:
    store = Store(4 * GROUP)
    store.write(0, page(1))
    for number in range(16, 32):
        store.write(number * PAGE, noise(number))
    done = make_units(store)
    assert (done.groups, done.kept, done.made) == (1, 1, 0)
    store.check(3)
    assert store.stats().units == 0


def test_a_unit_is_made_with_the_level_of_the_secondary_zstd_or_the_one_that_is_named() -> None:
    sizes = {}
    for level, asked in ((1, None), (19, None), (1, 19)):
        store = filled(secondary=[Codec("lz4hc"), Codec("zstd", level)])
        make_units(store, level=asked)
        sizes[level, asked] = store.stats().unit_bytes
    assert sizes[19, None] == sizes[1, 19] < sizes[1, None]


@pytest.mark.parametrize("level", [0, 23, -8])
def test_a_level_that_zstd_does_not_have_is_refused(level: int) -> None:
    with pytest.raises(ValueError, match="a level of -7 to 22"):
        UnitMaking(filled(), level=level)


def test_a_store_that_wipes_makes_no_units() -> None:
    with pytest.raises(ValueError, match="wipes what is discarded"):
        UnitMaking(filled(wipe=True))


def test_units_are_made_beside_no_other_post_processing() -> None:
    store = filled()
    making = UnitMaking(store)
    with pytest.raises(OSError, match="another") as caught:
        UnitMaking(store)
    assert caught.value.errno == errno.EBUSY
    making.finish()
    assert make_units(store).made == 4


def test_the_making_can_end_after_any_group() -> None:
    store = filled()
    making = UnitMaking(store)
    assert making.step(0)
    assert making.finish().made == 1
    with pytest.raises(ValueError, match="finished"):
        making.step(0)
    assert holds(store)
    assert make_units(store).made == 3


# ---- reading ----------------------------------------------------------------------------------------

def test_a_page_that_is_read_again_comes_back_as_a_single_page() -> None:
    store = with_units()
    assert store.read(3 * PAGE, PAGE) == page(3)
    assert kinds(store)[3] == "unit"
    assert store.read(3 * PAGE, PAGE) == page(3)
    assert kinds(store)[2:5] == ["unit", "obj", "unit"]
    assert (store.stats().unit_pages, store.stats().unit_dead) == (63, 1)
    store.read(5 * PAGE, PAGE)
    store.mark_idle()
    store.read(5 * PAGE, PAGE)
    assert kinds(store)[5] == "unit", "it was marked idle in between"
    assert holds(store)


def test_a_page_stays_in_its_unit_where_the_pool_is_full_and_on_a_swap_device() -> None:
    full, swap = with_units(), with_units(reserve=4 << 20)
    full.set_mem_limit(full.stats().mem_used_total)
    for store in (full, swap):
        for _ in range(3):
            assert store.read(3 * PAGE, PAGE) == page(3)
        assert kinds(store)[3] == "unit"
        assert holds(store)


def test_a_peek_is_no_use_of_a_page() -> None:
    store = with_units()
    for _ in range(3):
        assert store.peek(3) == page(3)
    store.read(3 * PAGE, PAGE)
    assert kinds(store)[3] == "unit"


def test_reading_in_order_unpacks_each_unit_once() -> None:
    store = with_units()
    for number in range(64):
        assert store.read(number * PAGE, PAGE) == page(number)
    assert store.stats().units_unpacked == 4


def test_the_last_units_stay_unpacked() -> None:
    store = with_units(6)
    rng = random.Random(1)
    for number in [15, 31, 47, 63, *(rng.randrange(64) for _ in range(100)), 15, 31, 47, 63]:
        assert store.peek(number) == page(number)
    assert store.stats().units_unpacked == 4
    for number in (79, 95, 95, 79):
        assert store.peek(number) == page(number)
    assert store.stats().units_unpacked == 6
    assert store.peek(47) == page(47)
    assert store.stats().units_unpacked == 6
    assert store.peek(0) == page(0)
    assert store.stats().units_unpacked == 7, "the cache has no bound"


def test_a_read_goes_on_where_the_last_one_of_that_unit_ended() -> None:
    store = with_units()
    for number in (0, 7, 8, 15, 3):
        assert store.peek(number) == page(number)
    assert store.stats().units_unpacked == 1
    # With another unit in between, what lies behind the place has to be unpacked anew, and nothing else.
    for number in (16, 32, 20, 40):
        assert store.peek(number) == page(number)
    assert store.stats().units_unpacked == 3
    assert store.peek(31) == page(31)
    assert store.stats().units_unpacked == 4


# ---- pages that leave -------------------------------------------------------------------------------

def test_what_was_unpacked_is_not_used_for_a_page_that_joined_again() -> None:
    store = with_units()
    assert store.peek(15) == page(15)
    changed = {}
    for turn in range(5):
        for number in (2, 9):
            changed[number] = prose(100 + 2 * turn + number)
            store.write(number * PAGE, changed[number])
        assert make_units(store).made == 1
        assert kinds(store) == ["unit"] * 16
        assert holds(store, changed=changed)


def test_an_overwritten_and_a_discarded_page_leave_a_dead_place() -> None:
    store = with_units()
    store.write(1 * PAGE, noise(1))
    store.write(2 * PAGE + 100, b"a part")
    store.zero(3 * PAGE, PAGE)
    parts = page(2)[:100] + b"a part" + page(2)[106:]
    assert (store.stats().unit_pages, store.stats().unit_dead) == (61, 3)
    assert holds(store, changed={1: noise(1), 2: parts, 3: bytes(PAGE)})


def test_a_unit_is_made_anew_when_more_than_half_of_it_is_dead() -> None:
    store = with_units()
    store.zero(0, 8 * PAGE)
    assert make_units(store, thorough=False) == UnitMakingStats()
    store.zero(8 * PAGE, PAGE)
    before = store.stats().unit_bytes
    done = make_units(store, thorough=False)
    assert (done.made, done.pages) == (1, 0)
    assert done.bytes_saved > 0
    assert store.stats().unit_dead == 0
    assert store.stats().unit_bytes < before - done.bytes_saved // 2
    assert holds(store, changed=dict.fromkeys(range(9), bytes(PAGE)))


def test_a_page_that_is_idle_again_joins_the_unit_of_its_neighbours() -> None:
    store = with_units()
    for _ in range(2):
        store.read(5 * PAGE, PAGE)
    assert kinds(store)[5] == "obj"
    done = make_units(store)
    assert (done.made, done.pages) == (1, 1)
    assert store.stats().unit_dead == 0 and holds(store)


def test_the_last_page_of_a_unit_becomes_a_single_page() -> None:
    store = with_units()
    store.zero(0, 13 * PAGE)
    store.zero(14 * PAGE, 2 * PAGE)
    done = make_units(store)
    assert (done.dissolved, done.made) == (1, 0)
    assert kinds(store)[13] == "obj" and store.stats().units == 3
    assert holds(store, changed=dict.fromkeys({*range(16)} - {13}, bytes(PAGE)))


def test_an_empty_unit_is_freed_at_once() -> None:
    store = with_units(1)
    store.zero(0, 15 * PAGE)
    assert store.stats().units == 1
    store.zero(15 * PAGE, PAGE)
    stats = store.stats()
    assert stats.units == stats.unit_pages == stats.unit_dead == stats.unit_bytes == stats.mem_used_total == 0
    store.check(3)


def test_heads_move_and_parts_migrate() -> None:
    store = with_units(40)
    file = MemoryFile(store.migration.arena.fileno())
    before = [word_of(file, group).location for group in range(40)]
    for group in range(0, 40, 2):
        store.zero(group * GROUP, GROUP)
    used = store.stats().mem_used_total
    store.compact()
    store.migration.run()
    after = [word_of(file, group).location for group in range(40)]
    assert store.stats().mem_used_total < used
    assert any(new not in (0, old) for old, new in zip(before, after, strict=True))
    gone = dict.fromkeys((n for n in range(640) if n // 16 % 2 == 0), bytes(PAGE))
    assert holds(store, 40, changed=gone)


# ---- with other work --------------------------------------------------------------------------------

def test_recompression_leaves_pages_of_units_alone() -> None:
    store = with_units()
    job = Recompression(store, 1)
    while job.select(1 << 30) or job.step(1 << 30):
        pass
    assert job.finish().tried == 0
    assert holds(store)


def test_pages_of_units_that_a_batch_has_no_room_for_are_written_back_singly(tmp_path: Path) -> None:
    store = filled(backing=Backing(str(backing_file(tmp_path / "backing"))))
    store.write(3 * PAGE, hard(3))
    make_units(store)
    store.mark_idle()
    store.read(4 * PAGE, PAGE)
    pages = store.stats().mem_used_total
    run = WritebackRun(store, 2)
    run.select(0, 32, "idle")
    while run.left:
        run.write()
    run.finish()
    assert (run.pages, run.units, run.failed, store.stats().written_back) == (31, 0, 0, 31)
    assert store.stats().units_unpacked == 1 + 2, "for the read, and each unit once for all its pages"
    assert kinds(store)[3:6] == ["written_back", "unit", "written_back"]
    assert store.stats().mem_used_total < pages
    for number in range(64):
        assert store.read(number * PAGE, PAGE) == (hard(3) if number == 3 else page(number))
    store.check(3)


def test_block_state_shows_pages_of_units_as_recompressed_and_idle() -> None:
    store = with_units(1)
    store.read(1 * PAGE, PAGE)
    lines = block_state.lines(store, 0, 4096)[0].decode().splitlines()
    assert [line.split()[-1] for line in lines[:3]] == ["...ir.", "....r.", "...ir."]


# ---- damage and recovery ----------------------------------------------------------------------------

def adopted(store: Store) -> Store:
    fd = os.dup(store.migration.arena.fileno())
    store.leave()
    try:
        return Store.adopt(fd)
    finally:
        os.close(fd)


def kept_store(groups: int = 4) -> Store:
    fd = os.memfd_create("kept")
    try:
        return with_units(groups, fd=fd)
    finally:
        os.close(fd)


def test_units_are_adopted_with_their_counts() -> None:
    store = kept_store()
    store.zero(2 * PAGE, 3 * PAGE)
    before = store.stats()
    store = adopted(store)
    after = store.stats()
    assert (after.units, after.unit_pages, after.unit_dead, after.unit_bytes, after.compr_data_size) == (
        before.units, before.unit_pages, before.unit_dead, before.unit_bytes, before.compr_data_size)
    assert holds(store, changed=dict.fromkeys((2, 3, 4), bytes(PAGE)))
    store.write(2 * PAGE, page(2))
    assert make_units(store).pages == 1
    file = MemoryFile(store.migration.arena.fileno())
    assert unit_of(file, 0).serial == 5


@pytest.mark.parametrize("what", ["head", "part", "word", "magic"])
def test_damage_costs_the_pages_of_one_unit(what: str) -> None:
    store = Store(4 * GROUP, fd=os.memfd_create("kept"))
    for number in range(64):
        store.write(number * PAGE, hard(number))
    assert make_units(store).made == 4
    file = MemoryFile(store.migration.arena.fileno())
    unit, word = unit_of(file, 1), word_of(file, 1)
    location = unit.parts[3] if what == "part" else word.location
    zspage = file.zspage(location >> 8)
    size = 32 + 16 * zspage.class_idx
    header = file.header_off(location, size)
    if what == "word":
        set_word(file, 1, 0)
    elif what == "magic":
        start = 0 if size == PAGE else (location & 0xFF) * size + 8
        frame, at = divmod(start, PAGE)
        os.pwrite(file.fd, b"\0\0", file.frame_off(zspage.frames[frame]) + at)
    else:
        os.pwrite(file.fd, bytes(8), header)
    for number in range(16, 32):
        with pytest.raises(OSError) as caught:
            store.read(number * PAGE, PAGE)
        assert caught.value.errno == errno.EIO
    assert store.read(0, PAGE) == hard(0)
    store = adopted(store)
    assert store.recovered.lost == 16 and store.stats().units == 3
    store.check(3)
    for number in (*range(16), *range(32, 64)):
        assert store.peek(number) == hard(number)
    with pytest.raises(OSError):
        store.read(16 * PAGE, PAGE)
    store.write(16 * PAGE, page(16))
    store.zero(17 * PAGE, 15 * PAGE)
    store.check(3)
    # What was left of the unit is gone, too.
    assert store.stats().compr_data_size < 3.2 * GROUP


def test_a_slot_that_claims_a_unit_without_its_page_is_lost() -> None:
    store = kept_store()
    store.zero(3 * PAGE, PAGE)
    make_units(store)
    store.zero(0, 9 * PAGE)
    make_units(store)
    file = MemoryFile(store.migration.arena.fileno())
    file.set_slot_word(40, 6 << 1 | 1 << 30)
    store.zero(3 * PAGE, PAGE)
    file.set_slot_word(3, 6 << 1)
    store = adopted(store)
    assert store.recovered.lost == 2
    store.check(2)


# ---- shortage ---------------------------------------------------------------------------------------

def test_each_allocation_of_the_making_can_fail() -> None:
    point, refused = 0, 0
    while True:
        point += 1
        store = filled(2)
        store.write(20 * PAGE, hard(1))
        store.inject_failure(point)
        done = make_units(store)
        store.inject_failure(0)
        assert holds(store, 2, changed={20: hard(1)})
        assert done.made + done.no_room == 2
        assert make_units(store).made == done.no_room
        refused += done.no_room
        if not done.no_room:
            break
    assert refused > 1


def test_a_pool_at_its_limit_becomes_smaller() -> None:
    store = filled(64)
    limit = store.stats().mem_used_total
    store.set_mem_limit(limit)
    done = make_units(store)
    assert done.made == 64 and not done.no_room
    assert store.stats().mem_used_total < limit
    assert holds(store, 64)
