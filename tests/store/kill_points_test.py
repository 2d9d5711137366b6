# SPDX-License-Identifier: Apache-2.0
"""A process that is killed between any two stores into its memory file leaves each page old or new."""
from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.backing_tools import backing_file
from tests.support.kill_points import PAGE, Op, copy_of, each_point, held_by_frames
from zramfs.store.backing import Backing
from zramfs.store.resize import resize, room_to_grow
from zramfs.store.store import Store

SIZE = 520 * PAGE
KINDS = ("zeros", "small word", "odd word", "text", "half random", "random")

# Pages of every kind, in sparse zspages, with some that do not compress.
FULL: list[Op] = [
    *(["write", i * PAGE, KINDS[i % 6], i, PAGE] for i in range(60)),
    *(["write", i * PAGE, "half random", i, PAGE] for i in range(60, 100)),
    *(["zero", i * PAGE, PAGE] for i in range(62, 100, 3)),
]


def old_or_new(backing: Path | None = None) -> Callable[[int, bytes, bytes], None]:
    def look(fd: int, old: bytes, new: bytes) -> None:
        copy = copy_of(fd)
        kept = None
        if backing is not None:
            opened = os.open(backing, os.O_RDWR)
            kept = Backing(str(backing), kept=opened)
            os.close(opened)
        store = Store.adopt(copy, backing=kept)
        os.close(copy)
        try:
            held = held_by_frames(store.migration.arena.fileno())
            assert held <= store.stats().pageblocks_in_use * (2 << 20), "what is free keeps its memory"
            assert store.recovered.lost == store.recovered.zspages_damaged == 0
            store.check(3)
            assert store.disksize in (len(old), len(new))
            found = store.read(0, store.disksize)
            if found not in (old[:len(found)], new[:len(found)]):
                for at in range(0, len(found), PAGE):
                    pages = (each[at:at + PAGE] for each in (old, new))
                    assert found[at:at + PAGE] in pages, f"page {at // PAGE}"
            if len(old) != len(new):
                # What was behind the end is gone, and does not come back with a larger device.
                end, most = store.disksize, resize(store, room_to_grow(store))
                assert store.read(end, most - end) == bytes(most - end)
            # The lists are good for more.
            store.write(300 * PAGE, bytes(range(256)) * 64)
            store.zero(0, 20 * PAGE)
            store.compact()
            store.migration.run()
            store.check(3)
        finally:
            store.leave()

    return look


# Two pageblocks, the second of which holds little.
SPREAD: list[Op] = [
    *(["write", i * PAGE, "noise", i, PAGE] for i in range(515)),
    *(["write", i * PAGE, "half random", i, PAGE] for i in range(515, 527)),
    *(["zero", i * PAGE, PAGE] for i in range(100, 506)),
]

WRITES: dict[str, Op] = {
    "a page goes into a zspage with room": ["write", 200 * PAGE, "text", 1, PAGE],
    "a page gets a zspage of its own": ["write", 201 * PAGE, "random", 2, PAGE],
    "a page is the first of its chunk": ["write", 515 * PAGE, "odd word", 3, PAGE],
    "a page takes the place of one that did not compress": ["write", 5 * PAGE, "half random", 4, PAGE],
    "a same-filled page takes the place of another": ["write", 4 * PAGE, "zeros", 5, PAGE],
    "a part of a page is written": ["write", 3 * PAGE + 100, "text", 6, 3000],
    "parts and whole pages are written": ["write", 61 * PAGE + 7, "half random", 7, 4 * PAGE],
    "a zspage becomes empty": ["zero", 5 * PAGE, PAGE],
    "pages are discarded": ["zero", 60 * PAGE, 8 * PAGE],
    "parts of pages are zeroed": ["zero", 3 * PAGE + 5, 2 * PAGE],
    "pages are read": ["read", 0, 70 * PAGE],
}
WORK: dict[str, Op] = {
    "objects move": ["compact"],
    "a balloon grows": ["balloon", 40],
    "pages are compressed again": ["recompress", 8],
    "pages are marked idle": ["idle"],
    "access times are switched on": ["times", True],
    "a note is written": ["note", "ledger", 300],
}


@pytest.mark.parametrize("op", WRITES.values(), ids=WRITES)
@pytest.mark.requires("cc", "unsanitized")
def test_a_kill_in_a_request_leaves_each_page_old_or_new(op: Op) -> None:
    # Wiping what goes away has more stores, and must not come too early.
    found = each_point(FULL, [op], old_or_new(), size=SIZE, wipe=op[0] == "zero" or op[2] == "half random")
    assert found >= (2 if op[0] == "read" else 4)


@pytest.mark.parametrize("op", WORK.values(), ids=WORK)
@pytest.mark.requires("cc", "unsanitized")
def test_a_kill_in_the_background_changes_no_page(op: Op) -> None:
    found = each_point(FULL, [op], old_or_new(), size=SIZE, secondary=["zstd"])
    assert found >= (2 if op[0] == "times" else 50)


@pytest.mark.requires("cc", "unsanitized")
def test_a_pageblock_that_becomes_free_keeps_no_memory_after_a_kill() -> None:
    setup: list[Op] = [["write", i * PAGE, "noise", i, PAGE] for i in range(513)]
    assert each_point(setup, [["zero", 512 * PAGE, PAGE]], old_or_new(), size=SIZE) > 10


@pytest.mark.parametrize("wipe", [False, True], ids=["plain", "wiped"])
@pytest.mark.requires("cc", "unsanitized")
def test_a_kill_in_a_migration_changes_no_page(wipe: bool) -> None:
    found = each_point(SPREAD, [["migrate"]], old_or_new(), size=527 * PAGE, wipe=wipe)
    assert found > 200


@pytest.mark.requires("cc", "unsanitized")
def test_a_balloon_survives_a_kill_while_it_moves_and_while_it_shrinks() -> None:
    setup = [*SPREAD, ["balloon", 40]]
    found = each_point(setup, [["balloon", 30], ["migrate"]], old_or_new(), size=527 * PAGE)
    assert found > 200


# Two groups of text. The first has a hole, a page that is the same everywhere, and one that is noise.
NEIGHBOURS: list[Op] = [
    *(["write", i * PAGE, "prose", i, PAGE] for i in range(32) if i != 4),
    ["write", 7 * PAGE, "zeros", 0, PAGE], ["write", 9 * PAGE, "noise", 0, PAGE],
]
WITH_UNITS: list[Op] = [*NEIGHBOURS, ["units"]]
# Of the first group nine of 14 places are dead, and two of its pages are single ones.
WORN: list[Op] = [
    *WITH_UNITS, ["zero", 6 * PAGE, 7 * PAGE], ["write", 1 * PAGE, "text", 1, PAGE],
    ["write", 2 * PAGE, "noise", 1, PAGE], ["zero", 3 * PAGE, PAGE],
]
# One page of the second group is left in its unit.
LAST_PAGE: list[Op] = [*WITH_UNITS, ["zero", 16 * PAGE, 15 * PAGE]]
UNITS: dict[str, tuple[list[Op], Op]] = {
    "units are made": (NEIGHBOURS, ["units"]),
    "a worn unit is made anew": (WORN, ["units"]),
    "upkeep makes a worn unit anew": (WORN, ["upkeep"]),
    "upkeep makes one anew that has rested": (
        [*WITH_UNITS, ["zero", 20 * PAGE, PAGE], ["upkeep"]], ["upkeep"]),
    "the last page of a unit becomes a single page": (LAST_PAGE, ["units"]),
    "a page of a unit is overwritten": (WITH_UNITS, ["write", 5 * PAGE, "text", 1, PAGE]),
    "a part of a page of a unit is written": (WITH_UNITS, ["write", 5 * PAGE + 9, "random", 1, 99]),
    "a page of a unit is discarded": (WITH_UNITS, ["zero", 20 * PAGE, PAGE]),
    "a unit becomes empty": (WITH_UNITS, ["zero", 16 * PAGE, 16 * PAGE]),
    "a page of a unit is read": (WITH_UNITS, ["read", 3 * PAGE, PAGE]),
    "a page of a unit is read again": ([*WITH_UNITS, ["read", 3 * PAGE, PAGE]], ["read", 3 * PAGE, PAGE]),
    "a head moves": ([*WITH_UNITS, *(["write", (100 + i) * PAGE, "half random", i, PAGE] for i in range(40)),
                      *(["zero", (100 + i) * PAGE, 3 * PAGE] for i in range(0, 40, 4)),
                      ["zero", 16 * PAGE, 16 * PAGE]], ["compact"]),
    "pages of units are marked idle": (WITH_UNITS, ["idle"]),
}


@pytest.mark.parametrize(("setup", "op"), UNITS.values(), ids=UNITS)
@pytest.mark.requires("cc", "unsanitized")
def test_a_kill_beside_units_leaves_each_page_old_or_new(setup: list[Op], op: Op) -> None:
    assert each_point(setup, [op], old_or_new(), size=SIZE) >= 4


@pytest.mark.requires("cc", "unsanitized")
def test_a_kill_in_a_write_back_of_units_changes_no_page(tmp_path: Path) -> None:
    place = backing_file(tmp_path / "backing")
    # The first half of a unit goes as single pages, another one as a whole, all but one page of it.
    ops: list[Op] = [["write back", 16, 24], ["upkeep"], ["write back", 1, 16, 32],
                     ["write", 17 * PAGE + 9, "text", 8, 100], ["units"]]
    assert each_point(WITH_UNITS, ops, old_or_new(place), size=SIZE, backing=place) > 50


@pytest.mark.requires("cc", "unsanitized")
def test_a_kill_beside_units_on_the_backing_store_leaves_each_page_old_or_new(tmp_path: Path) -> None:
    place = backing_file(tmp_path / "backing")
    ops: list[Op] = [
        ["write back", 0, 32, 32], ["write", 5 * PAGE, "text", 1, PAGE],
        ["write", 6 * PAGE + 9, "random", 1, 99], ["zero", 20 * PAGE, PAGE], ["units"],
        ["write back", 0, 32, 32], ["zero", 0, 32 * PAGE],
    ]
    assert each_point(WITH_UNITS, ops, old_or_new(place), size=SIZE, backing=place) > 80


@pytest.mark.requires("cc", "unsanitized")
def test_a_kill_while_a_worn_unit_comes_back_from_the_backing_store_changes_no_page(tmp_path: Path) -> None:
    place = backing_file(tmp_path / "backing")
    setup = [*WITH_UNITS, ["write back", 0, 32, 32], ["zero", 0, 14 * PAGE], ["zero", 17 * PAGE, 14 * PAGE]]
    assert each_point(setup, [["return", 4]], old_or_new(place), size=SIZE, backing=place) > 8


# Pages of which most have equals: three times the same ones. One does not compress, one is same-filled.
EQUALS: list[Op] = [
    *(["write", i * PAGE, "prose", i % 6, PAGE] for i in range(18)),
    *(["write", i * PAGE, "noise", 0, PAGE] for i in (5, 11)), ["write", 4 * PAGE, "zeros", 0, PAGE],
]
WITH_SHARED: list[Op] = [*EQUALS, ["share"]]
# Of one object a single page is left, and one that shares with nobody yet has come.
PARTED: list[Op] = [
    *WITH_SHARED, ["zero", 1 * PAGE, PAGE], ["zero", 7 * PAGE, PAGE], ["write", 30 * PAGE, "prose", 2, PAGE],
    ["write", 31 * PAGE, "prose", 9, PAGE], ["write", 32 * PAGE, "prose", 9, PAGE],
]
SPARSE: list[Op] = [
    *(["write", i * PAGE, "half random", i % 40, PAGE] for i in range(80)), ["share"],
    *(["zero", i * PAGE, 3 * PAGE] for i in range(0, 80, 4)),
]
SHARED: dict[str, tuple[list[Op], Op]] = {
    "pages come to share": (EQUALS, ["share"]),
    "pages join, and one that is alone parts": (PARTED, ["share"]),
    "a shared page is overwritten": (WITH_SHARED, ["write", 3 * PAGE, "text", 1, PAGE]),
    "a part of a shared page is written": (WITH_SHARED, ["write", 3 * PAGE + 9, "random", 1, 99]),
    "a shared page is discarded": (WITH_SHARED, ["zero", 5 * PAGE, PAGE]),
    "all pages of their objects are discarded": (WITH_SHARED, ["zero", 0, 18 * PAGE]),
    "shared pages are read": (WITH_SHARED, ["read", 0, 18 * PAGE]),
    "shared pages are marked idle": (WITH_SHARED, ["idle"]),
    "shared objects move": (SPARSE, ["compact"]),
    "pages beside them become units": (PARTED, ["units"]),
}


@pytest.mark.parametrize(("setup", "op"), SHARED.values(), ids=SHARED)
@pytest.mark.requires("cc", "unsanitized")
def test_a_kill_beside_shared_pages_leaves_each_page_old_or_new(setup: list[Op], op: Op) -> None:
    assert each_point(setup, [op], old_or_new(), size=SIZE) >= 4


@pytest.mark.requires("cc", "unsanitized")
def test_a_kill_while_shared_pages_are_wiped_leaves_each_page_old_or_new() -> None:
    ops: list[Op] = [["zero", 3 * PAGE, PAGE], ["zero", 9 * PAGE, PAGE], ["zero", 15 * PAGE, PAGE]]
    assert each_point(WITH_SHARED, ops, old_or_new(), size=SIZE, wipe=True) > 10


# Two generations, of which the second takes the pages of the first.
GENERATIONS: list[Op] = [
    *(["write", i * PAGE, "record", i, PAGE] for i in range(20)), ["take", 2, 3, 1000], ["recompress", 8, 2],
    ["recompress", 4, 1],
]


@pytest.mark.parametrize("op", [["take", 3, 9, 2000], ["recompress", 8, 2]], ids=["taken", "used"])
@pytest.mark.requires("cc", "unsanitized")
def test_a_kill_beside_a_dictionary_changes_no_page(op: Op) -> None:
    assert each_point(GENERATIONS, [op], old_or_new(), size=SIZE, secondary=["zstd"]) > 0


@pytest.mark.requires("cc", "unsanitized")
def test_a_kill_while_a_dictionary_is_dropped_changes_no_page() -> None:
    setup = [*GENERATIONS, ["take", 3, 9, 2000], ["recompress", 40, 3]]
    assert each_point(setup, [["drop", 2, True]], old_or_new(), size=SIZE, secondary=["zstd"]) > 0


# Two units with a dictionary. A dead place in each makes them smaller with the next one in any case.
WITH_DICTIONARY: list[Op] = [
    *(["write", i * PAGE, "record", i, PAGE] for i in range(32)), ["take", 1, 3, 2000], ["units"],
    ["zero", 6 * PAGE, PAGE], ["zero", 30 * PAGE, PAGE],
]


@pytest.mark.parametrize("ops", [[["take", 2, 3, 1000], ["units"], ["drop", 1, True]],
                                 [["write", i * PAGE, "record", i, PAGE] for i in range(14, 17)]],
                         ids=["made anew with the next one", "left"])
@pytest.mark.requires("cc", "unsanitized")
def test_a_kill_beside_units_with_a_dictionary_changes_no_page(ops: list[Op]) -> None:
    assert each_point(WITH_DICTIONARY, ops, old_or_new(), size=SIZE) > 0


@pytest.mark.requires("cc", "unsanitized")
def test_a_kill_in_a_write_back_of_units_with_a_dictionary_changes_no_page(tmp_path: Path) -> None:
    place = backing_file(tmp_path / "backing")
    ops: list[Op] = [
        ["write back", 0, 32, 32], ["write", 5 * PAGE, "text", 1, PAGE], ["zero", 20 * PAGE, PAGE]]
    assert each_point(WITH_DICTIONARY, ops, old_or_new(place), size=SIZE, backing=place) > 20


@pytest.mark.requires("cc", "unsanitized")
def test_a_kill_in_a_write_back_changes_no_page(tmp_path: Path) -> None:
    place = backing_file(tmp_path / "backing")
    ops: list[Op] = [
        ["write back", 0, 20], ["write", 7 * PAGE, "text", 9, PAGE], ["zero", 10 * PAGE, 5 * PAGE],
        ["write", 17 * PAGE + 9, "text", 8, PAGE], ["write back", 0, 12],
    ]
    found = each_point(FULL, ops, old_or_new(place), size=SIZE, backing=place)
    assert found > 50


RESIZES: dict[str, tuple[Op, int]] = {
    "it grows": (["resize", 1536 * PAGE, False], 1),
    "it grows by less than a chunk": (["resize", 1024 * PAGE, False], 1),
    "an empty end is cut off": (["resize", 1024 * PAGE, False], 2),
    "an end with pages is cut off": (["resize", 512 * PAGE, True], 100),
}


@pytest.mark.parametrize("wipe", [False, True], ids=["plain", "wiped"])
@pytest.mark.parametrize("what", RESIZES)
@pytest.mark.requires("cc", "unsanitized")
def test_a_kill_in_a_resize_leaves_the_old_size_or_the_new_one(what: str, wipe: bool) -> None:
    op, least = RESIZES[what]
    size = 700 * PAGE if "grows" in what else 1300 * PAGE
    setup: list[Op] = [
        ["times", True], *FULL, *(["write", (600 + i) * PAGE, KINDS[i % 6], i, PAGE] for i in range(40)),
    ]
    found = each_point(setup, [op], old_or_new(), size=size, grows_to=2048 * PAGE, wipe=wipe)
    assert found >= least
