# SPDX-License-Identifier: Apache-2.0
"""Idle marks and access times: what sets them, what clears them, and what they cost."""
from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from tests.support.memory_file import MemoryFile
from tests.support.page_kinds import block
from tests.support.side_by_side import together
from zramfs.codecs.codec import Codec
from zramfs.store.store import Store

PAGE = 4096
KINDS = {0: "text", 1: "random", 2: "zeros", 3: "halves", 4: "odd word", 5: "text"}


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store(4 << 20, secondary=[Codec("zstd", 9)])
    for slot, kind in KINDS.items():
        store.write(slot * PAGE, block(kind, slot, PAGE))
    yield store
    store.check(3)
    store.close()


def idle(store: Store) -> set[int]:
    file = MemoryFile(store.migration.arena.fileno())
    return {slot for slot in range(store.disksize // PAGE) if file.slot(slot).idle}


def test_all_marks_every_page_with_compressed_or_raw_data(store: Store) -> None:
    assert store.mark_idle() is None
    # Same-filled pages are never idle, whether their word fits into the slot or not.
    assert idle(store) == {0, 1, 5}


@pytest.mark.parametrize("access", [
    lambda store: store.read(0, PAGE),
    lambda store: store.read(100, 1),
    lambda store: store.write(0, block("text", 9, PAGE)),
    lambda store: store.write(0, block("random", 9, PAGE)),
    lambda store: store.write(10, b"x"),
    lambda store: store.zero(10, 5),
    lambda store: store.zero(0, PAGE),
], ids=["read", "read a part", "write", "write raw", "write a part", "zero a part", "discard"])
def test_any_access_clears_the_mark(store: Store, access: Callable[[Store], object]) -> None:
    store.mark_idle()
    access(store)
    assert idle(store) == {1, 5}


def test_what_is_no_access_keeps_the_mark(store: Store) -> None:
    store.mark_idle()
    store.check(3)
    store.stats()
    store.seek(0, True)
    store.compact()
    store.migration.run()
    assert idle(store) == {0, 1, 5}


def test_peek_is_no_access(store: Store) -> None:
    store.access_times = True
    store.mark_idle()
    for slot, kind in KINDS.items():
        assert store.peek(slot) == block(kind, slot, PAGE)
    assert store.peek(6) == bytes(PAGE)
    assert store.peek(-1) is store.peek(1024) is store.peek(1 << 70) is None
    assert idle(store) == {0, 1, 5}


def test_an_age_needs_access_times(store: Store) -> None:
    assert not store.access_times
    with pytest.raises(ValueError, match="access times are not kept"):
        store.mark_idle(5)


def test_by_age_marks_the_old_and_unmarks_the_young(store: Store) -> None:
    store.access_times = True
    store.write(0, block("text", 1, PAGE))
    time.sleep(2.1)
    while True:
        began = time.monotonic()
        store.read(PAGE, PAGE)
        store.mark_idle()
        store.mark_idle(1)
        if time.monotonic() - began < 1:  # or what was read may be old, too, on a busy machine
            break
    # 5 was last used before times were kept: it counts as used then.
    assert idle(store) == {0, 5}
    store.mark_idle(3600)
    assert idle(store) == set()
    store.mark_idle(1 << 70)
    assert idle(store) == set()
    store.mark_idle(0)
    assert idle(store) == {0, 1, 5}


def test_switching_off_forgets(store: Store) -> None:
    store.access_times = True
    time.sleep(2.1)
    store.access_times = False
    with pytest.raises(ValueError):
        store.mark_idle(1)
    while True:
        began = time.monotonic()
        store.access_times = True
        store.mark_idle(1)
        if time.monotonic() - began < 1:  # or the tracking may be old, too, on a busy machine
            break
        store.access_times = False
    assert idle(store) == set(), "nothing counts as older than the tracking"


def rss() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


@pytest.mark.requires("unsanitized")
@pytest.mark.requires("unsanitized")
def test_access_times_cost_4_bytes_a_page_that_was_used() -> None:
    store = Store(1 << 46)
    before = rss()
    store.access_times = True
    assert rss() - before < 1 << 20
    page = bytes(PAGE)
    for slot in range(0, 1 << 20, 512):
        store.write(slot * PAGE, page * 8)
    assert rss() - before < 20 << 20
    store.close()


def test_slices_cover_everything_once() -> None:
    store = Store(256 << 20)
    for chunk in range(0, 128, 3):
        store.write(chunk * 512 * PAGE, block("text", chunk, 20 * PAGE))
    at: int | None = 0
    calls = 0
    while at is not None:
        following = store.mark_idle(None, at, 1)
        assert following is None or following > at
        at, calls = following, calls + 1
    assert calls > 3
    assert len(idle(store)) == 43 * 20
    store.close()


def test_under_load(store: Store) -> None:
    """Marks by both kinds beside writers and readers: no page is lost, no mark on a same-filled one."""
    store.access_times = True
    stop = time.monotonic() + 1

    def user(first: int) -> None:
        rng = random.Random(first)
        mine = {}
        while time.monotonic() < stop:
            slot = first + rng.randrange(200)
            mine[slot] = block(rng.choice(("text", "random", "zeros", "odd word")), rng.randrange(50), PAGE)
            store.write(slot * PAGE, mine[slot])
            slot = rng.choice(list(mine))
            assert store.read(slot * PAGE, PAGE) == mine[slot]

    def marker() -> None:
        while time.monotonic() < stop:
            store.mark_idle()
            store.mark_idle(0)

    together(marker, *(partial(user, 100 + 200 * k) for k in range(3)))
    store.check(3)
