# SPDX-License-Identifier: Apache-2.0
"""Recompression, sharing and units of pages by the time of their last access, whatever their idle marks."""
from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pytest

from tests.support.memory_file import MemoryFile
from tests.support.page_kinds import prose
from zramfs.codecs.codec import Codec
from zramfs.store.recompress import Recompression
from zramfs.store.sharing import Sharing
from zramfs.store.store import Store
from zramfs.store.unit_making import UnitMaking

MIB = 1 << 20
PAGE = 4096
OLD, EQUAL, USED = range(48), range(48, 64), range(64, 96)
CONTENT = [*map(prose, OLD), *[prose(1000)] * len(EQUAL), *map(prose, USED)]
MACHINES = [partial(Recompression, priority=1), Sharing, UnitMaking]


def boot() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@pytest.mark.parametrize("machine", MACHINES, ids=["recompress", "share", "units"])
def test_without_access_times_there_is_no_age(machine: Callable) -> None:
    store = Store(MIB, secondary=[Codec("zstd", 3)])
    with pytest.raises(ValueError, match="access times are not kept"):
        machine(store, age=1)
    store.access_times = True
    machine(store, age=1).finish()
    store.close()


def begin(machine: Callable, store: Store) -> object:
    """A pass for pages that were not used for more than a second, just after some have been."""
    while True:
        began = int(boot())
        for number in USED:
            store.read(number * PAGE, PAGE)
        job = machine(store, age=1)
        if int(boot()) - began <= 1:
            return job
        job.finish()


def test_only_pages_that_were_not_used_for_so_long_are_taken_and_marks_stay() -> None:
    store = Store(MIB, secondary=[Codec("zstd", 3)])
    store.access_times = True
    store.write(0, b"".join(CONTENT))
    written = int(boot())
    # Some are marked, and some are not: that makes no difference.
    store.mark_idle()
    for number in range(0, 16):
        store.read(number * PAGE, PAGE)
    while boot() < written + 3.1:
        time.sleep(0.05)
    file = MemoryFile(store.migration.arena.fileno())
    marked = [file.slot(number).idle for number in range(len(CONTENT))]
    assert not any(marked[:16]) and all(marked[16:])

    job = begin(partial(Recompression, priority=1), store)
    while job.select(1_000_000) or job.step(1_000_000):
        pass
    done = job.finish()
    assert done.tried == done.won == len(OLD) + len(EQUAL) and done.cpu_ns > 0
    for number in (*OLD, *EQUAL):
        assert file.slot(number).prio == 1 and file.slot(number).idle == marked[number]
    assert all(file.slot(number).prio == 0 for number in USED)

    job = begin(Sharing, store)
    while job.step(1_000_000):
        pass
    done = job.finish()
    assert (done.looked, done.joined) == (len(OLD) + len(EQUAL), len(EQUAL)) and done.cpu_ns > 0

    job = begin(UnitMaking, store)
    while job.step(1_000_000):
        pass
    done = job.finish()
    assert done.pages == store.stats().unit_pages == len(OLD) and done.cpu_ns > 0
    store.check(3)
    assert store.read(0, len(CONTENT) * PAGE) == b"".join(CONTENT)
    store.close()


def test_an_age_of_more_than_the_machine_has_run_takes_nothing() -> None:
    store = Store(MIB, secondary=[Codec("zstd", 3)])
    store.access_times = True
    store.write(0, b"".join(CONTENT))
    job = Recompression(store, 1, age=1 << 40)
    assert not job.select(1_000_000_000) and not job.step(1_000_000_000)
    assert job.finish().tried == 0
    store.close()
