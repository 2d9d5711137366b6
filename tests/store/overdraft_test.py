# SPDX-License-Identifier: Apache-2.0
"""What a governed store may take beyond its limit, and how it says that it has changed."""
from __future__ import annotations

import errno
import os
import time

import pytest

from zramfs.store.store import Store

PAGE = 4096
LIMIT, RESERVE = 64, 64  # pool pages


def raw() -> bytes:
    return os.urandom(PAGE)


def fill(store: Store, first: int, page: bytes | None = None) -> int:
    """Writes page after page until ENOSPC: the number of the first that was refused."""
    for number in range(first, 10_000):
        try:
            store.write(number * PAGE, page or raw())
        except OSError as error:
            assert error.errno == errno.ENOSPC
            return number
    raise AssertionError("never full")


def used(store: Store) -> int:
    return store.stats().mem_used_total // PAGE


@pytest.fixture
def store():
    made = Store(64 << 20, mem_limit=LIMIT * PAGE)
    yield made
    made.check(3)
    made.close()


def test_without_an_overdraft_the_limit_is_exact(store):
    fill(store, 0)
    assert used(store) == LIMIT


def test_pages_that_do_not_compress_leave_the_last_quarter_of_the_reserve_to_others(store):
    store.set_overdraft(RESERVE, RESERVE)
    refused = fill(store, 0)
    assert used(store) == LIMIT + RESERVE * 3 // 4
    half = os.urandom(PAGE // 2) + bytes(PAGE // 2)
    fill(store, refused, half)
    assert LIMIT + RESERVE - 4 <= used(store) <= LIMIT + RESERVE
    assert store.stats().mem_limit == LIMIT * PAGE


def test_what_lies_above_a_lowered_limit_does_not_use_the_reserve_up(store):
    fill(store, 0)
    store.set_overdraft(LIMIT // 2 + RESERVE, RESERVE)
    store.set_mem_limit(LIMIT // 2 * PAGE)
    fill(store, LIMIT)
    assert used(store) == LIMIT + RESERVE * 3 // 4


def test_without_its_overdraft_a_store_above_its_limit_takes_nothing_more(store):
    store.set_overdraft(RESERVE, RESERVE)
    count = fill(store, 0)
    store.set_overdraft(0, 0)
    assert fill(store, count) == count
    store.zero(0, RESERVE * PAGE)
    assert used(store) < LIMIT
    store.write(0, raw())


def test_writes_are_slow_past_the_first_quarter_of_the_reserve_and_slower_further_on(store):
    store.set_overdraft(RESERVE, RESERVE)

    def seconds(number: int) -> float:
        began = time.monotonic()
        store.write(number * PAGE, raw())
        return time.monotonic() - began

    took = [seconds(number) for number in range(LIMIT + RESERVE * 3 // 4)]
    slow = LIMIT + RESERVE // 4
    assert min(took[:slow]) < 0.002
    assert min(took[slow + 1:]) > 0.004
    assert min(took[-8:]) > 0.06

    def seconds_of_a_read() -> float:
        began = time.monotonic()
        store.read(0, 64 * PAGE)
        return time.monotonic() - began

    # The best of many: a machine with other work takes the processor away for longer.
    assert min(seconds_of_a_read() for _ in range(50)) < 0.05


def test_changes_wake_once_after_so_many_bytes_written_or_discarded(store):
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        def woken() -> bool:
            try:
                return os.eventfd_read(fd) == 1
            except BlockingIOError:
                return False

        store.write(0, raw())
        store.wake_after_change(3 * PAGE, fd)
        store.write(0, raw() + raw())
        assert not woken()
        store.zero(0, PAGE)
        assert woken()
        store.write(0, 16 * raw())
        assert not woken()
        store.wake_after_change(PAGE, fd)
        store.read(0, 16 * PAGE)
        assert not woken()
        store.write(0, raw())
        assert woken()
        store.wake_after_change(PAGE, fd)
        store.wake_after_change(0, fd)
        store.write(0, raw())
        assert not woken()
    finally:
        os.close(fd)
