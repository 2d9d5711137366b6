# SPDX-License-Identifier: Apache-2.0
"""Units beside readers, writers and discarders of the same groups. All of it works without the GIL."""
from __future__ import annotations

import random
import time
from pathlib import Path

from tests.store.store_threads_test import eager_switches, run
from tests.support.backing_tools import backing_file, write_back
from tests.support.page_kinds import prose
from tests.support.page_users import CHUNK, USERS, PageUser, size_changes
from tests.support.unit_tools import make_units
from zramfs.codecs.codec import Codec
from zramfs.store.backing import Backing
from zramfs.store.store import Store

__all__ = ["eager_switches"]

PAGE = 4096
PAGES = 20 * 16


def test_units_are_made_and_worn_beside_all_that_uses_their_pages() -> None:
    store = Store(PAGES * PAGE, secondary=[Codec("zstd", 1)])
    users = [PageUser(store, first, PAGES, 20, 0.25) for first in range(USERS)]
    made, turn = 0, 0
    # By command, as a policy, and as upkeep.
    ways = ({}, {"idle": True, "thorough": False}, {"joins": False, "thorough": False})

    def make() -> None:
        nonlocal made, turn
        done = make_units(store, **ways[turn % 3])
        turn += 1
        made += done.made
        assert done.no_room == 0

    def housekeeping() -> None:
        store.compact()
        store.migration.run()
        store.mark_idle()
        stats = store.stats()
        assert stats.corrupt == stats.failed_reads == 0
        assert max(stats.units, stats.unit_pages, stats.unit_dead, stats.unit_bytes) < 1 << 40
        time.sleep(0.001)

    run(*(user.job for user in users), make, housekeeping, seconds=3)
    assert made > 30 and turn >= 3
    for user in users:
        user.verify()
    store.check(3)
    store.zero(0, PAGES * PAGE)
    assert store.stats().units == store.stats().mem_used_total == 0
    store.check(3)


def test_a_page_that_many_read_while_its_unit_comes_and_goes_is_always_the_same() -> None:
    store = Store(64 * PAGE, secondary=[Codec("zstd", 1)])
    content = [prose(number) for number in range(64)]
    for number, each in enumerate(content):
        store.write(number * PAGE, each)

    def read() -> None:
        number = random.randrange(64)
        assert store.read(number * PAGE, 4 * PAGE if number < 60 else PAGE) == b"".join(
            content[number:number + 4] if number < 60 else content[number:number + 1])

    def write() -> None:
        """The same bytes again, which make the place in the unit dead all the same."""
        number = random.randrange(64)
        store.write(number * PAGE, content[number])

    run(read, read, write, lambda: make_units(store) and None, store.compact)
    store.check(3)


def test_a_device_that_becomes_smaller_and_larger_beside_the_making_keeps_its_sums() -> None:
    store = Store(2 * CHUNK * PAGE, secondary=[Codec("zstd", 1)], grows_to=2 * CHUNK * PAGE)
    user = PageUser(store, 0, PAGES, 20, 0.25)
    fill, change = size_changes(store)
    run(user.job, fill, fill, change, lambda: make_units(store) and None)
    user.verify()
    store.check(3)


def test_units_go_to_the_backing_store_and_wear_there_beside_all_that_uses_them(tmp_path: Path) -> None:
    """The blocks are few, so that each is used again and again."""
    backing = Backing(str(backing_file(tmp_path / "backing", 300 * PAGE)))
    store = Store(PAGES * PAGE, secondary=[Codec("zstd", 1)], backing=backing)
    users = [PageUser(store, first, PAGES, 20, 0.25) for first in range(USERS)]
    for user in users:
        for number in user.pages:
            user.pages[number] = prose(number % 20)
            store.write(number * PAGE, user.pages[number])
    gone = 0

    def go() -> None:
        nonlocal gone
        make_units(store)
        for first in range(0, PAGES, 64):
            gone += write_back(store, (first, first + 64)).units
        store.backing.trim()

    def housekeeping() -> None:
        store.compact()
        stats = store.stats()
        assert stats.corrupt == stats.failed_reads == store.backing.stats().read_errors == 0
        time.sleep(0.001)

    run(*(user.job for user in users), go, housekeeping, seconds=3)
    go()
    assert gone > 0
    for user in users:
        user.verify()
    store.check(3)
    store.zero(0, PAGES * PAGE)
    assert store.backing.stats().used == store.stats().written_back == 0
    store.close()
