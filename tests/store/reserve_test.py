# SPDX-License-Identifier: Apache-2.0
"""A store with a reserve: nothing that a request does makes memory resident."""
from __future__ import annotations

import os
import random
import resource
import time

import pytest

from tests.support.memory_file import MemoryFile
from zramfs.store.store import Store

MIB = 1 << 20
PAGE = 4096
RESERVE = 16 * MIB


def faults() -> int:
    """Page faults of this thread so far."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt


@pytest.mark.requires("unsanitized")
@pytest.mark.parametrize("reserve", [0, RESERVE])
@pytest.mark.parametrize("algo", ["lz4", "zstd", "lz4hc", "none"])
def test_writes_use_memory_that_is_there(reserve: int, algo: str) -> None:
    store = Store(256 * MIB, algo=algo, reserve=reserve)
    pieces = [random.randbytes(MIB) for _ in range(8)]
    store.write(0, pieces[0])  # makes the context, and Python's own pages
    store.read(0, MIB)
    before = faults()
    for number, piece in enumerate(pieces):
        store.write((number + 1) * 7 * MIB, piece)
    written = faults() - before
    before = faults()
    store.zero(7 * MIB, 20 * MIB)
    assert faults() - before <= 2
    assert store.stats().reserve_misses == 0
    if reserve:
        assert written <= 2
    else:
        assert written > 8 * MIB // PAGE
    store.check(3)
    store.close()


def test_the_slot_table_is_resident_and_stays() -> None:
    before = memory_files()
    store = Store(1024 * MIB, reserve=2 * MIB)
    [fd] = memory_files() - before
    table = 1024 * MIB // 512
    file = MemoryFile(fd)
    assert file.resident() >= table + 2 * MIB
    store.write(5 * MIB, b"x" * MIB)
    store.zero(0, 1024 * MIB)
    assert file.resident() >= table + 2 * MIB
    assert store.seek(0, True) == 0
    store.check(2)
    store.close()


def memory_files() -> set[int]:
    links = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in range(3, 1000)
             if os.path.lexists(f"/proc/self/fd/{fd}")}
    return {fd for fd, link in links.items() if "memfd:zramfs" in link}


def test_statistics_count_it() -> None:
    store = Store(64 * MIB, reserve=5 * MIB)
    stats = store.stats()
    assert (stats.reserve, stats.reserve_target, stats.resident) == (6 * MIB, 6 * MIB, 6 * MIB)
    assert (stats.mem_used_total, stats.pageblocks_in_use) == (0, 0)
    store.write(0, random.randbytes(4 * MIB))
    end = time.monotonic() + 60
    while store.stats().reserve < 6 * MIB and time.monotonic() < end:
        time.sleep(0.001)
    stats = store.stats()
    assert stats.resident == stats.pageblocks_in_use * 2 * MIB + stats.reserve
    store.zero(0, 64 * MIB)
    while store.stats().reserve > 8 * MIB and time.monotonic() < end:
        time.sleep(0.001)
    assert 6 * MIB <= store.stats().resident <= 8 * MIB
    store.close()
