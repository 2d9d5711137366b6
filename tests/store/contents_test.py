# SPDX-License-Identifier: Apache-2.0
"""What lies where: the counts of each kind of page against a look at the slot table."""
from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from tests.support import recompress_tools
from tests.support.backing_tools import backing_file, write_back
from tests.support.memory_file import MemoryFile
from tests.support.page_kinds import block, hard, noise, prose
from tests.support.share_tools import share
from tests.support.unit_tools import make_units
from zramfs.codecs.codec import Codec
from zramfs.model.contents import KINDS, Kind, kinds_of, rest_of
from zramfs.store.backing import Backing
from zramfs.store.store import Store

PAGE = 4096
SLOTS = 160
KIND_OF = {"same": "same", "same_obj": "same", "huge": "huge", "written_back": "written_back",
           "unit": "units", "shared": "shared"}


def looked_up(store: Store) -> dict[str, int]:
    """By the drawing of the slot table alone."""
    file = MemoryFile(store.migration.arena.fileno())
    found = Counter()
    for number in range(SLOTS):
        slot = file.slot(number)
        if slot.type != "empty":
            found[KIND_OF.get(slot.type) or ("recompressed" if slot.prio else "hot")] += 1
    return {kind: found[kind] for kind in KINDS}


def expect_sums(store: Store) -> dict[str, Kind]:
    """What must hold at any time."""
    store.check(2)
    stats = store.stats()
    kinds = kinds_of(stats)
    assert list(kinds) == list(KINDS)
    assert {kind: each.pages for kind, each in kinds.items()} == looked_up(store)
    assert sum(each.pages for each in kinds.values()) * PAGE == stats.orig_data_size
    assert sum(each.nbytes for each in kinds.values()) + rest_of(stats) == stats.mem_used_total
    return kinds


def recompress(store: Store, priority: int = 1, **how: object) -> None:
    done = recompress_tools.recompress(store, priority, **how)
    assert done.won
    assert done.cpu_ns > 0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(SLOTS * PAGE, secondary=[Codec("zstd", 1), Codec("zstd", 9)],
                  backing=Backing(str(backing_file(tmp_path / "backing"))))
    for number in range(96):
        store.write(number * PAGE, prose(number % 40))
    for number in range(96, 104):
        store.write(number * PAGE, hard(number))
    for number in range(104, 112):
        store.write(number * PAGE, noise(number))
    for number, kind in enumerate(("zeros", "small word", "halves", "odd word")):
        store.write((112 + number) * PAGE, block(kind, 1, PAGE))
    return store


def test_each_page_is_of_one_kind_whatever_is_done_with_it(store: Store) -> None:
    kinds = expect_sums(store)
    assert (kinds["hot"].pages, kinds["huge"].pages, kinds["same"].pages) == (96, 16, 4)
    assert kinds["huge"].nbytes == 16 * PAGE and kinds["same"].nbytes == 0

    recompress(store, max_pages=50)
    kinds = expect_sums(store)
    # The largest come first, and zstd makes those that are hard smaller.
    assert kinds["huge"].pages == 8 and kinds["recompressed"].pages > 8 and kinds["hot"].pages > 0
    # The objects of a page recompressed twice are counted once.
    recompress(store, 2)
    again = expect_sums(store)
    assert again["recompressed"].pages > kinds["recompressed"].pages

    share(store)
    kinds = expect_sums(store)
    # 96 pages of 40 kinds: three of the first 16, two of the others.
    assert kinds["shared"].pages == 96 and kinds["hot"].pages + kinds["recompressed"].pages == 8
    for number in range(40):
        store.zero(number * PAGE, PAGE)
    for number in range(56, 96):
        store.write(number * PAGE, prose(number))
    expect_sums(store)

    make_units(store)
    kinds = expect_sums(store)
    assert kinds["units"].pages >= 40 and kinds["units"].nbytes == store.stats().unit_bytes > 0


def test_written_back_pages_and_those_that_are_overwritten_leave_their_kind(store: Store) -> None:
    recompress(store)
    write_back(store, (0, 60))
    kinds = expect_sums(store)
    assert kinds["written_back"] == Kind(looked_up(store)["written_back"], 0)
    assert kinds["written_back"].pages > 0
    for number in range(SLOTS):
        store.write(number * PAGE, os.urandom(PAGE))
    kinds = expect_sums(store)
    assert {kind: each.pages for kind, each in kinds.items() if each.pages} == {"huge": SLOTS}
    store.zero(0, SLOTS * PAGE)
    assert not any(each.pages or each.nbytes for each in expect_sums(store).values())


def test_a_store_that_is_taken_over_counts_its_recompressed_pages_anew() -> None:
    fd = os.memfd_create("contents")
    store = Store(SLOTS * PAGE, secondary=[Codec("zstd", 9)], fd=fd)
    for number in range(SLOTS):
        store.write(number * PAGE, prose(number % 40))
    recompress(store, max_pages=70)
    before = expect_sums(store)
    store.leave()
    adopted = Store.adopt(fd)
    assert expect_sums(adopted) == before and before["recompressed"].pages == 70
    adopted.close()
    os.close(fd)
