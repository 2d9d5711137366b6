# SPDX-License-Identifier: Apache-2.0
"""The log of failing I/O: two lines for a time of failures, however long it lasts."""
from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path

import pytest
import trio

from tests.support.fakes import FakeLane
from zramfs.daemon.log_file import LOG_INTERVAL, LOG_KEPT, LOG_MOST, watch_log
from zramfs.device.device import Device
from zramfs.model.config import DeviceConfig
from zramfs.model.device_stats import DeviceStats
from zramfs.model.stats import EMPTY, BallastStats
from zramfs.tree.watch import BALLAST_COUNTERS, CALM, LANE_COUNTERS, STORE_COUNTERS, ErrorWatch


@functools.cache
def _stats() -> DeviceStats:
    """Of a device that has done nothing. One for all: a device has descriptors until it is collected."""
    return Device(DeviceConfig(directory=Path("/mnt/z0"), rundir=Path("/run/z0")), FakeLane()).stats()


def stats_with(store: dict | None, released: int = 0, **lane: int):
    """store None: a device that is not set up."""
    stats = _stats()
    return dataclasses.replace(
        stats, store=None if store is None else dataclasses.replace(EMPTY, **store),
        lane=dataclasses.replace(stats.lane, **lane), ballast=BallastStats(released=released))


@pytest.mark.parametrize("name", [*STORE_COUNTERS, *LANE_COUNTERS, *BALLAST_COUNTERS])
def test_every_counter_is_watched(name):
    def stats(value: int):
        return stats_with({name: value}) if name in STORE_COUNTERS else stats_with({}, **{name: value})

    watch = ErrorWatch(stats(3))
    assert watch.look(stats(3)) == []
    [line] = watch.look(stats(5))
    assert line.startswith(f"{name} went from 3 to 5: ")


def test_a_long_time_of_failures_makes_two_lines():
    watch = ErrorWatch(stats_with({}))
    assert len(watch.look(stats_with({"failed_writes": 1}))) == 1
    for value in range(2, 500):
        assert watch.look(stats_with({"failed_writes": value})) == []
        # A pause that is shorter than calm does not end it.
        for _ in range(CALM - 1):
            assert watch.look(stats_with({"failed_writes": value})) == []
    [line] = watch.look(stats_with({"failed_writes": 499}))
    assert line == "failed_writes rises no more: 499 in all, 499 now"
    assert watch.look(stats_with({"failed_writes": 499})) == []
    [line] = watch.look(stats_with({"failed_writes": 500}))
    assert line.startswith("failed_writes went from 499 to 500")


def test_reset_is_a_new_start():
    watch = ErrorWatch(stats_with({"failed_reads": 7}))
    assert watch.look(stats_with(None)) == []
    assert watch.look(stats_with({"failed_reads": 0})) == []
    [line] = watch.look(stats_with({"failed_reads": 2}))
    assert line.startswith("failed_reads went from 0 to 2")
    for _ in range(CALM + 1):
        watch.look(stats_with({"failed_reads": 2}))
    # More failures at once than before the reset are failures since the reset.
    watch.look(stats_with(None))
    [line] = watch.look(stats_with({"failed_reads": 9}))
    assert line.startswith("failed_reads went from 0 to 9")


LINES = [b"%049d\n" % n for n in range(LOG_MOST // 50 + 2)]


async def watched_log(path: Path, fd: int) -> bytes:
    """What the log has after two looks at it and another line."""
    with trio.move_on_after(2.5 * LOG_INTERVAL):
        await watch_log(path, fd)
    os.write(fd, b"the next line\n")
    return path.read_bytes()


async def test_a_long_log_keeps_its_last_lines(tmp_path: Path, autojump_clock) -> None:
    path = tmp_path / "log"
    with open(path, "ab", buffering=0) as file:
        file.write(b"".join(LINES))
        note, *kept, last = (await watched_log(path, file.fileno())).splitlines(keepends=True)
    assert (note, last) == (b"(older lines are left out)\n", b"the next line\n")
    assert kept == LINES[-len(kept):] and LOG_KEPT - 100 < len(b"".join(kept)) <= LOG_KEPT


async def test_a_short_log_and_one_that_is_not_written_to_are_left_alone(
    tmp_path: Path, autojump_clock
) -> None:
    path, other = tmp_path / "log", tmp_path / "journal"
    short = b"".join(LINES)[:LOG_MOST]
    with open(path, "ab", buffering=0) as file:
        file.write(short)
        assert await watched_log(path, file.fileno()) == short + b"the next line\n"
    with open(other, "ab", buffering=0) as file:
        assert await watched_log(path, file.fileno()) == short + b"the next line\n"
        path.unlink()
        with trio.move_on_after(LOG_INTERVAL * 2):
            await watch_log(path, file.fileno())
    assert not path.exists()
