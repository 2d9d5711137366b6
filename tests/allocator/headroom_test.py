# SPDX-License-Identifier: Apache-2.0
"""Headroom: what the host and its cgroups can give, and that no writer takes more."""
from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from allocator import Arena, Headroom, Pool
from allocator.check import check
from tests.support.fake_groups import MIB, FakeGroup, meminfo

PAGE = 4096


@pytest.fixture
def host(tmp_path: Path) -> Path:
    return meminfo(tmp_path / "meminfo", 1000)


def fill(pool: Pool, pages: int, first: int = 0) -> int:
    """Stores incompressible pages until one is refused: how many there were."""
    for tag in range(first, first + pages):
        try:
            pool.malloc(tag, os.urandom(PAGE))
        except OSError as error:
            assert error.errno == errno.ENOSPC
            return tag - first
    return pages


def pool_below(headroom: Headroom) -> Pool:
    pool = Pool(Arena(0, 64))
    pool.set_headroom(headroom)
    return pool


@pytest.mark.parametrize(("keep", "room"), [(0, None), (64, 936), (1000, 0), (5000, 0)])
def test_the_room_of_the_host_is_what_is_available_above_the_floor(
    host: Path, keep: int, room: int | None
) -> None:
    headroom = Headroom(keep * MIB, host)
    headroom.look(0)
    stats = headroom.stats()
    assert (stats.room, stats.group_room) == (None if room is None else room * MIB, None)
    assert stats.keep_free == keep * MIB


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("state", "room"), [
    ({}, None),
    ({"limit": 1000, "used": 100}, 900 - 62.5),  # the margin is a 16th of the limit
    ({"limit": 100, "used": 50}, 18),  # and at least 32 MiB
    ({"limit": 100, "used": 90}, 0),
    ({"limit": 100, "used": 200}, 0),
    ({"limit": 100, "used": 90, "clean": 60}, 38),
    ({"limit": 100, "used": 90, "clean": 40, "dirty": 20}, 18),  # what is dirty may wait for the pool
])
def test_the_room_of_a_group(
    host: Path, tmp_path: Path, version: int, state: dict[str, int], room: float | None
) -> None:
    group = FakeGroup(tmp_path / "g", version).set(**state)
    headroom = Headroom(0, host)
    headroom.set_groups([(group.path, version)])
    headroom.look(0)
    assert headroom.stats().group_room == (None if room is None else int(room * MIB))


def test_memory_high_and_limits_out_of_sight_bound_as_well(host: Path, tmp_path: Path) -> None:
    headroom = Headroom(0, host)
    for version, state in ((2, {"limit": 500, "high": 100}), (1, {"above": 100}),
                           (1, {"limit": 500, "above": 100})):
        group = FakeGroup(tmp_path / "g", version).set(used=20, **state)
        headroom.set_groups([(group.path, version)])
        headroom.look(0)
        assert headroom.stats().group_room == 48 * MIB


def test_of_all_groups_and_the_host_the_one_with_least_room_counts(host: Path, tmp_path: Path) -> None:
    headroom = Headroom(64 * MIB, host)
    groups = [FakeGroup(tmp_path / name, 2) for name in ("a/b", "a", ".")]
    groups[0].set()
    groups[1].set(limit=300, used=200)
    groups[2].set(limit=800, used=780, clean=700)
    headroom.set_groups([(group.path, 2) for group in groups])
    headroom.look(0)
    assert headroom.stats().room == (100 - 32) * MIB
    groups[2].set(limit=800, used=780)
    headroom.look(0)
    assert headroom.stats().room == 0
    groups[2].set()
    meminfo(host, 70)
    headroom.look(0)
    assert (headroom.stats().room, headroom.stats().host_room) == (6 * MIB, 6 * MIB)


def test_a_pool_stops_at_the_floor_and_goes_on_when_there_is_memory_again(host: Path) -> None:
    """The host does not change here, so a pool gets all of the room but the last, which is below 1 MiB."""
    meminfo(host, 64 + 8)
    headroom = Headroom(64 * MIB, host)
    headroom.look(0)
    pool = pool_below(headroom)
    stored = 0
    while True:
        got = fill(pool, 64, stored)
        stored += got
        meminfo(host, max(0, 64 + 8 - stored * PAGE // MIB))
        if got < 64:
            break
    # Each look saw what had been taken, to a MiB.
    assert 7 * MIB <= stored * PAGE <= 9 * MIB
    assert headroom.stats().refused >= 1
    assert fill(pool, 1, stored) == 0
    assert pool.read(0) and pool.read(stored - 1)
    check(pool, 2)
    meminfo(host, 200)
    headroom.look(pool.stats().pages)
    assert fill(pool, 500, stored) == 500


def test_a_writer_is_not_refused_while_there_is_room_and_nobody_else_looks(host: Path) -> None:
    """64 MiB fit into the room of 936; a first grant of a quarter of it is not what it ends with."""
    headroom = Headroom(64 * MIB, meminfo(host, 64 + 100))
    headroom.look(0)
    pool = pool_below(headroom)
    assert fill(pool, 64 * MIB // PAGE) == 64 * MIB // PAGE
    stats = headroom.stats()
    assert stats.refused == 0
    assert 2 <= stats.looks <= 6  # one for each quarter of 100 MiB


def test_threads_together_take_no_more_than_the_grant(host: Path) -> None:
    headroom = Headroom(64 * MIB, meminfo(host, 64 + 4))
    headroom.look(0)
    pool = pool_below(headroom)
    meminfo(host, 64)  # somebody else has taken the rest
    got = []

    def work(first: int) -> None:
        got.append(fill(pool, 2000, first))

    threads = [threading.Thread(target=work, args=(n * 10000,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # A quarter of 4 MiB, which is the least grant as well.
    assert sum(got) == MIB // PAGE == pool.stats().pages


@pytest.mark.parametrize("before", [{}, {"limit": 4000}])
def test_a_limit_that_comes_is_seen_within_a_grant_though_nobody_else_looks(
    host: Path, tmp_path: Path, before: dict[str, int]
) -> None:
    group = FakeGroup(tmp_path / "g", 2).set(**before)
    headroom = Headroom(0, host)
    headroom.set_groups([(group.path, 2)])
    headroom.look(0)
    pool = pool_below(headroom)
    assert fill(pool, MIB // PAGE) == MIB // PAGE
    group.set(limit=100, used=90)
    assert fill(pool, 64 * MIB // PAGE, MIB // PAGE) <= 15 * MIB // PAGE


def test_files_that_are_not_there_or_say_nonsense_bound_nothing(host: Path, tmp_path: Path) -> None:
    headroom = Headroom(64 * MIB, tmp_path / "none")
    headroom.set_groups([(tmp_path / "gone", 1), (tmp_path / "gone", 2)])
    headroom.look(0)
    assert headroom.stats().room is None
    # A host that says nothing of what is available has nothing to give away.
    host.write_text("Mem" * 10000)
    headroom = Headroom(64 * MIB, host)
    headroom.look(0)
    assert headroom.stats().room == 0


def test_wrong_arguments_are_refused(host: Path) -> None:
    headroom = Headroom(0, host)
    for wrong in (-1, 1 << 62):
        with pytest.raises(ValueError, match="2\\^62"):
            headroom.keep_free = wrong
    with pytest.raises(ValueError, match="16 groups"):
        headroom.set_groups([(host.parent, 2)] * 17)
    headroom.set_groups([(host.parent, 2)] * 16)
    headroom.set_groups([])
    headroom.look(0)
    assert headroom.stats().room is None
