# SPDX-License-Identifier: Apache-2.0
"""Units beside readers, writers and discarders of the same groups. All of it works without the GIL."""
from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator

import pytest

from tests.store.store_threads_test import run
from tests.support.page_kinds import block, hard, noise, prose
from tests.support.unit_tools import make_units
from zramfs.codecs.codec import Codec
from zramfs.store.resize import resize
from zramfs.store.store import Store

PAGE = 4096
PAGES = 20 * 16
USERS = 3
KINDS = (prose, prose, prose, hard, noise, lambda seed: block("zeros", seed, PAGE))


@pytest.fixture(autouse=True)
def eager_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0002)
    yield
    sys.setswitchinterval(before)


class User:
    """Has every USERS-th page, so that each group has pages of all of them."""

    def __init__(self, store: Store, first: int) -> None:
        self.store, self.rng = store, random.Random(first)
        self.pages = {number: bytes(PAGE) for number in range(first, PAGES, USERS)}

    def job(self) -> None:
        rng = self.rng
        number = rng.choice(list(self.pages))
        action = rng.random()
        if action < 0.25:
            self.pages[number] = rng.choice(KINDS)(rng.randrange(20))
            self.store.write(number * PAGE, self.pages[number])
        elif action < 0.3:
            self.pages[number] = self.pages[number][:500] + b"changed" + self.pages[number][507:]
            self.store.write(number * PAGE + 500, b"changed")
        elif action < 0.4:
            self.store.zero(number * PAGE, PAGE)
            self.pages[number] = bytes(PAGE)
        else:
            assert self.store.read(number * PAGE, PAGE) == self.pages[number]

    def verify(self) -> None:
        for number, content in self.pages.items():
            assert self.store.read(number * PAGE, PAGE) == content


def test_units_are_made_and_worn_beside_all_that_uses_their_pages() -> None:
    store = Store(PAGES * PAGE, secondary=[Codec("zstd", 1)])
    users = [User(store, first) for first in range(USERS)]
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
    chunk = 512 * PAGE
    store = Store(2 * chunk, secondary=[Codec("zstd", 1)], grows_to=2 * chunk)
    user = User(store, 0)

    def fill() -> None:
        number = random.randrange(512, 1024)
        try:
            store.write(number * PAGE, prose(number % 9))
        except OSError:
            time.sleep(0.0005)

    def change() -> None:
        resize(store, chunk, discard=True)
        time.sleep(0.001)
        resize(store, 2 * chunk)
        time.sleep(0.01)

    run(user.job, fill, fill, change, lambda: make_units(store) and None)
    user.verify()
    store.check(3)
