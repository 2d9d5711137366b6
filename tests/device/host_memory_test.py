# SPDX-License-Identifier: Apache-2.0
"""The watcher of the host's memory: what it keeps free, when it has the pool made smaller, what it says."""
from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.support.fake_groups import MIB, FakeGroup, meminfo
from zramfs.device import host_memory
from zramfs.device.host_memory import FAR, NEAR, HostMemory, default_keep_free
from zramfs.host import memcg, safety
from zramfs.model.config import DeviceConfig
from zramfs.store.store import Store

GIB = 1 << 30


@pytest.fixture(autouse=True)
def no_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memcg, "hierarchy", lambda: None)


class Host:
    """A machine with 8 GiB, and a device on it."""

    def __init__(self, tmp_path: Path, **config: object) -> None:
        self.file = tmp_path / "meminfo"
        self.available(4000)
        self.shrunk = 0
        self.store: Store | None = None
        self.memory = HostMemory(
            DeviceConfig(**config), lambda: self.store, [self._shrink], self.file)

    def _shrink(self) -> None:
        self.shrunk += 1

    def available(self, mib: int) -> None:
        meminfo(self.file, mib)

    def set_up(self, **more: object) -> Store:
        self.store = Store(64 * MIB, headroom=self.memory.headroom, **more)
        return self.store


def refused(store: Store, where: int) -> bool:
    """Whether 4 MiB of incompressible data find no memory."""
    try:
        store.write(where, os.urandom(4 * MIB))
    except OSError as error:
        assert error.errno == errno.ENOSPC
        return True
    return False


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    yield made
    if made.store:
        made.store.close()


def test_what_is_kept_free_by_default() -> None:
    sizes = (128 * MIB, 512 * MIB, 1 * GIB, 8 * GIB, 64 * GIB)
    assert [default_keep_free(size) // MIB for size in sizes] == [32, 64, 64, 245, 1966]


@pytest.mark.parametrize(("config", "keep"), [
    ({}, 8 * GIB * 3 // 100), ({"keep_free": 0}, 0), ({"keep_free": 5}, 5),
    ({"reserve": 16 * MIB}, 0),  # swap
    ({"reserve": 16 * MIB, "keep_free": 5}, 5),
])
def test_what_is_kept_free(tmp_path: Path, config: dict[str, int], keep: int) -> None:
    assert Host(tmp_path, **config).memory.headroom.keep_free == keep


async def test_a_store_does_not_grow_below_the_floor_and_old_data_stays(host: Host) -> None:
    """And mem_stat shows the user's limit, whatever the host allows."""
    await host.memory.set_keep_free(64 * MIB)
    store = host.set_up(mem_limit=48 * MIB)
    data = os.urandom(1 * MIB)
    store.write(0, data)
    host.available(64)
    host.memory._look()
    assert host.memory.room() == 0
    assert refused(store, MIB)
    assert store.read(0, MIB) == data
    assert store.stats().mem_limit == 48 * MIB
    host.available(1000)
    host.memory._look()
    assert not refused(store, MIB)
    store.check(2)


async def test_the_room_is_the_least_of_limit_host_and_groups(host: Host, tmp_path: Path) -> None:
    await host.memory.set_keep_free(0)
    assert host.memory.room() is None
    store = host.set_up()
    assert host.memory.room() is None
    store.set_mem_limit(32 * MIB)
    assert host.memory.room() == 32 * MIB
    host.available(100)
    await host.memory.set_keep_free(80 * MIB)
    assert host.memory.room() == 20 * MIB
    group = FakeGroup(tmp_path / "g", 2).set(limit=100, used=58)
    host.memory.headroom.set_groups([(group.path, 2)])
    host.memory._look()
    assert host.memory.room() == 10 * MIB


async def test_the_supply_is_short_fair_or_plenty(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the room, the limit, what tasks wait for, and what is available of 8 GiB."""
    stall = 0.0
    monkeypatch.setattr(host_memory, "memory_stall", lambda: stall)

    def supply(available: int) -> str:
        host.available(available)
        host.memory._look()
        return host.memory.supply

    assert (supply(5000), supply(3000), supply(250)) == ("plenty", "fair", "short")
    stall = host_memory.STALLED
    assert (supply(5000), supply(3000)) == ("plenty", "short")
    stall = 0.0
    group = FakeGroup(tmp_path / "g", 2).set(limit=1000, used=58)
    host.memory.headroom.set_groups([(group.path, 2)])
    assert supply(5000) == "fair"
    host.memory.headroom.set_groups([])
    store = host.set_up(mem_limit=8 * MIB)
    assert supply(5000) == "fair"
    while store.stats().mem_used_total <= host_memory.NEAR_LIMIT * 8 * MIB:
        assert host.memory.supply == "fair"
        store.write(store.stats().orig_data_size, os.urandom(MIB // 4))
    assert supply(5000) == "short"


async def test_a_floor_above_all_memory_stops_any_growth(host: Host) -> None:
    await host.memory.set_keep_free((1 << 64) - 1)
    assert host.memory.room() == 0
    host.memory.forget()
    host.memory._look()
    assert host.memory.headroom.keep_free == 8 * GIB * 3 // 100


async def test_the_pool_is_made_smaller_before_the_room_ends(
    host: Host, autojump_clock: MockClock
) -> None:
    keep = 8 * GIB * 3 // 100 // MIB
    async with trio.open_nursery() as nursery:
        nursery.start_soon(host.memory.run)
        await trio.sleep(10.5 * FAR)
        assert host.shrunk == 0
        assert 10 <= host.memory.headroom.stats().looks <= 13
        host.available(2 * keep - 5)
        await trio.sleep(0.5 * FAR + 10.5 * NEAR)
        assert 10 <= host.shrunk <= 12
        assert host.memory.room() > 0, "that is before writes are refused"
        nursery.cancel_scope.cancel()


async def test_refused_writes_are_said_once_and_so_is_their_end(
    host: Host, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    store = host.set_up()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(host.memory.run)
        host.available(10)
        await trio.sleep(2 * FAR)
        assert caplog.text == ""
        for _ in range(20):
            assert refused(store, 0)
            await trio.sleep(FAR)
        host.available(4000)
        await trio.sleep(3 * FAR)
        nursery.cancel_scope.cancel()
    said = [record.message for record in caplog.records]
    assert len(said) == 2
    assert "less than 245.8M of the host's memory are available (keep_free)" in said[0]
    assert "there is memory for new data again" in said[1]


async def test_other_groups_and_limits_are_noticed(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    top = tmp_path / "top"
    place = "/a"
    FakeGroup(top, 2).set(limit=500)
    one, other = FakeGroup(top / "a", 2).set(), FakeGroup(top / "b", 2).set(limit=100, used=60)
    monkeypatch.setattr(memcg, "hierarchy", lambda: memcg.Hierarchy(top, 2, place))
    monkeypatch.setattr(host_memory.time, "monotonic", trio.current_time)
    left = []
    monkeypatch.setattr(safety, "leave_group", lambda: left.append(1) or (None, "left"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(host.memory.run)
        await trio.sleep(6)
        assert host.memory.headroom.stats().group_room == (500 - 32) * MIB
        one.set(limit=64, used=8)
        await trio.sleep(1.1)
        assert host.memory.headroom.stats().group_room == 24 * MIB
        place = "/b"
        await trio.sleep(6)
        assert host.memory.headroom.stats().group_room == 8 * MIB
        assert not left, "the topmost has a limit too, so nothing would be won"
        FakeGroup(top, 2).set()
        await trio.sleep(6)
        assert left
        other.set()
        nursery.cancel_scope.cancel()
