# SPDX-License-Identifier: Apache-2.0
"""Automatic policies: what they are called, when they look, what they may write in a day, who goes first."""
from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from trio.testing import MockClock

from zramfs.device.policies import (
    BUSY_DUTY,
    DAY,
    IDLE_DUTY,
    LEDGER_STEP,
    MAX_DEFER,
    MAX_INTERVAL,
    UPKEEP_INTERVAL,
    UPKEEP_SHARE,
    Did,
    Ledger,
    Policies,
    Rest,
)
from zramfs.errors import ZramfsError
from zramfs.model.policy import Policy, Recompress, Units, Writeback, format_age, parse_age
from zramfs.model.policy import parse_policy as parse
from zramfs.model.stats import Progress

GIB = 1 << 30


@pytest.mark.parametrize(("text", "expected"), [
    ("recompress idle=10min", Recompress(600)),
    ("recompress  idle=2h algo=zstd", Recompress(7200, "zstd")),
    ("recompress algo=lz4hc idle=7", Recompress(7, "lz4hc")),
    ("writeback idle=7d limit=1G", Writeback(7 * 86400, GIB)),
    ("writeback idle=90s", Writeback(90)),
    ("writeback idle=1m limit=0", Writeback(60, 0)),
    ("units idle=30min", Units(1800)), ("units level=-7 idle=1", Units(1, -7)),
    ("units idle=1d level=19", Units(86400, 19)),
])
def test_policies(text: str, expected: Policy) -> None:
    assert parse(text) == (text.split()[0], expected)
    assert parse(str(expected)) == (expected.kind, expected)


def test_off() -> None:
    for kind in ("recompress", "writeback", "units"):
        assert parse(f"{kind} off") == (kind, None)


@pytest.mark.parametrize(("text", "got"), [
    ("", "''"), ("compact", "'compact'"), ("recompress", "idle= is missing in 'recompress'"),
    ("recompress off idle=1", "'off'"), ("recompress idle=", "'idle='"), ("recompress idle", "'idle'"),
    ("recompress idle=1 limit=1G", "'limit=1G'"), ("writeback idle=1 idle=2", "'idle=2'"),
    ("writeback idle=1 limit=many", "'many' is not a size"), ("writeback idle=ten", "'ten'"),
    ("writeback idle=1w", "'1w'"), ("writeback idle=0", "from 1 second to ten years, got 0"),
    ("units level=3", "idle= is missing"), ("units idle=1 algo=zstd", "'algo=zstd'"),
    ("units idle=1 level=0", "from -7 to 22 but 0, got '0'"), ("units idle=1 level=23", "got '23'"),
    ("units idle=1 level=-8", "got '-8'"), ("units idle=1 level=best", "got 'best'"),
    ("recompress idle=3651d", "got 3651d"), ("recompress idle=-1", "'-1'"),
])
def test_what_is_no_policy(text: str, got: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(text)
    assert got in str(caught.value)


@limits(deadline=None)  # a busy machine is no failure
@given(st.integers(1, 10 * 365 * 86400))
def test_ages_survive(seconds: int) -> None:
    assert parse_age(format_age(seconds)) == seconds


@limits(deadline=None)  # a busy machine is no failure
@given(st.lists(st.tuples(st.floats(0, 2 * DAY), st.integers(1, 1000)), max_size=40), st.floats(0, 2 * DAY))
def test_the_ledger_never_forgets_what_is_younger_than_a_day(
    entries: list[tuple[float, int]], wait: float
) -> None:
    """And remembers nothing for longer than a step more."""
    ledger, now, written = Ledger(), 0.0, []
    for pause, size in entries:
        now += pause
        ledger.add(now, size)
        written.append((now, size))
    now += wait
    young = sum(size for at, size in written if at > now - DAY)
    not_old = sum(size for at, size in written if at > now - DAY - LEDGER_STEP * 1.001)
    assert young <= ledger.sum(now) <= not_old


class Device:
    """Stands for a device. supply: pages that each round finds idle; a page is 4096 bytes."""

    def __init__(self, supply: int = 0, won: float = 1.0) -> None:
        self.supply, self.won = supply, won
        self.rounds: list[float] = []
        self.upkeep: list[tuple[float, int | None]] = []
        self.worn = 0  # slices of upkeep that are left
        self.written: list[tuple[float, int]] = []
        self.ready = True
        self.busy = False
        self.slice = 0.01
        self.error: OSError | None = None

    def requests(self) -> int:
        return int(trio.current_time() * 1e6) if self.busy else 0

    async def recompress_idle(self, policy: Recompress, did: Did, rest: Rest) -> None:
        self.rounds.append(trio.current_time())
        if self.error:
            raise self.error
        for _ in range(self.supply):
            did(Progress(1, int(self.won), 100 * int(self.won)))
            await rest(self.slice)

    async def make_units_idle(self, policy: Units, did: Did, rest: Rest) -> None:
        await self.recompress_idle(Recompress(policy.idle), did, rest)

    async def keep_units(self, level: int | None, rest: Rest) -> None:
        self.upkeep.append((trio.current_time(), level))
        if self.error:
            raise self.error
        for _ in range(self.worn):
            await rest(self.slice)
            self.worn -= 1

    @property
    def units_worn(self) -> bool:
        return self.worn > 0

    async def write_back_idle(self, policy: Writeback, budget: int | None, did: Did, rest: Rest) -> None:
        self.rounds.append(trio.current_time())
        for _ in range(self.supply if budget is None else min(self.supply, budget // 4096)):
            self.written.append((trio.current_time(), 4096))
            did(Progress(1, 1, 4096))
            await rest(self.slice)


@asynccontextmanager
async def running(device: Device, *texts: str) -> AsyncIterator[Policies]:
    policies = Policies(device, trio.current_time)
    for text in texts:
        policies.set(*parse(text))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(policies.run)
        await trio.testing.wait_all_tasks_blocked()
        yield policies
        nursery.cancel_scope.cancel()


async def test_off_by_default(autojump_clock: MockClock) -> None:
    device = Device(10)
    async with running(device) as policies:
        await trio.sleep(DAY)
        assert [each.policy for each in policies.stats()] == [None] * 3
    assert device.rounds == device.upkeep == []


async def test_looks_come_at_a_quarter_of_the_age(autojump_clock: MockClock) -> None:
    device = Device()
    async with running(device, "recompress idle=10min"):
        await trio.sleep(601)
    assert device.rounds == [150, 300, 450, 600]


@pytest.mark.parametrize(("age", "interval"), [("1s", 1), ("30d", MAX_INTERVAL)])
async def test_looks_are_not_too_often_and_not_too_rare(
    age: str, interval: float, autojump_clock: MockClock
) -> None:
    device = Device()
    async with running(device, f"writeback idle={age}"):
        await trio.sleep(interval * 3.5)
    assert device.rounds == pytest.approx([interval, 2 * interval, 3 * interval])


async def test_looks_come_at_once_when_memory_is_short_but_not_more_than_once_a_second(
    autojump_clock: MockClock
) -> None:
    """And at their usual times when nobody hurries any more."""
    device = Device()
    async with running(device, "recompress idle=10min") as policies:
        await trio.sleep(20)
        for _ in range(35):
            policies.hurry()
            await trio.sleep(0.1)
        await trio.sleep(200)
    assert device.rounds[:4] == pytest.approx([20, 21, 22, 23], abs=0.2)
    assert device.rounds[4:] == pytest.approx([device.rounds[3] + 150], abs=0.2)


async def test_nothing_is_done_without_a_store(autojump_clock: MockClock) -> None:
    device = Device(1)
    device.ready = False
    async with running(device, "recompress idle=4s") as policies:
        await trio.sleep(10.2)
        assert (device.rounds, policies.stats()[0].rounds) == ([], 0)
        device.ready = True
        await trio.sleep(1)
        assert len(device.rounds) == 1


async def test_a_policy_follows_its_changes(autojump_clock: MockClock) -> None:
    device = Device()
    async with running(device, "recompress idle=40s") as policies:
        await trio.sleep(35)
        policies.set(*parse("recompress idle=4s"))
        await trio.sleep(2.5)
        policies.set(*parse("recompress off"))
        await trio.sleep(100)
        assert device.rounds == [10, 20, 30, 36, 37]
        assert policies.stats()[0].policy is None
        policies.set(*parse("recompress idle=4s"))
        policies.forget()
        await trio.sleep(100)
    assert len(device.rounds) == 5


@pytest.mark.parametrize(("busy", "duty"), [(False, IDLE_DUTY), (True, BUSY_DUTY)])
async def test_slices_take_their_share_of_the_time(
    busy: bool, duty: float, autojump_clock: MockClock
) -> None:
    """A slice takes no time of the mocked clock: what passes is the rest."""
    device = Device(100)
    device.busy = busy
    async with running(device, "recompress idle=4s") as policies:
        await trio.sleep(1.0001)
        while policies.stats()[0].rounds == 0:
            await trio.sleep(0.01)
        rest = trio.current_time() - 1
    assert 100 * device.slice / (rest + 100 * device.slice) == pytest.approx(duty, rel=0.05)


async def test_looks_in_vain_become_rarer_and_a_gain_brings_them_back(autojump_clock: MockClock) -> None:
    device = Device(20, won=0)
    device.slice = 0
    async with running(device, "recompress idle=4s") as policies:
        await trio.sleep(1 + 2 + 4 + 8 + 16 + 16 + 0.5)
        assert device.rounds == [1, 3, 7, 15, 31, 47]
        assert MAX_DEFER == 16
        assert policies.stats()[0].done == Progress(120, 0, 0)
        device.won = 1
        await trio.sleep(16 + 2)
        assert device.rounds[6:] == [63, 64, 65]
        assert policies.stats()[0].done == Progress(180, 60, 6000)


async def test_the_limit_holds_for_any_24_hours(autojump_clock: MockClock) -> None:
    """A device that would write far more, for five days."""
    device = Device(10_000)
    device.slice = 0
    limit = 1000 * 4096
    async with running(device, f"writeback idle=2h limit={limit}") as policies:
        await trio.sleep(5 * DAY)
        today = policies.stats()[1].today
    assert 0 < today <= limit
    times = [at for at, _ in device.written]
    for start in times:
        assert sum(size for at, size in device.written if start <= at < start + DAY) <= limit
    # And it is used: a step later than a day after the last time at the latest.
    assert len(device.written) >= 1000 * int(5 * DAY / (DAY + LEDGER_STEP + MAX_INTERVAL))


async def test_a_limit_of_zero_writes_nothing_and_none_writes_all(autojump_clock: MockClock) -> None:
    device = Device(10)
    async with running(device, "writeback idle=4s limit=0"):
        await trio.sleep(10)
    assert (device.rounds, device.written) == ([], [])
    async with running(device, "writeback idle=4s") as policies:
        await trio.sleep(1.5)
        assert policies.stats()[1].done == Progress(10, 10, 40960)
        assert policies.stats()[1].today == 40960


async def test_a_reset_makes_no_limit_larger(autojump_clock: MockClock) -> None:
    device = Device(10)
    async with running(device, "writeback idle=4s limit=40960") as policies:
        await trio.sleep(1.5)
        policies.forget()
        assert policies.stats()[1].done == Progress()
        policies.set(*parse("writeback idle=4s limit=40960"))
        await trio.sleep(10)
        assert len(device.written) == 10
        assert policies.stats()[1].today == 40960


async def test_a_command_goes_first(autojump_clock: MockClock) -> None:
    """It cuts a round short, no round begins while it runs, and what was done until then is counted."""
    device = Device(1000)
    device.slice = 1
    async with running(device, "recompress idle=4s") as policies:
        await trio.sleep(1 + 10.5)
        async with policies.aside():
            assert trio.current_time() == 11.5
            done = policies.stats()[0].done.pages
            assert done == 11
            await trio.sleep(50)
            assert policies.stats()[0].done.pages == done
            assert len(device.rounds) == 1
        await trio.sleep(5)
        assert len(device.rounds) == 2
        async with policies.aside(), trio.open_nursery():
            pass


async def test_an_error_is_said_once_and_ends_nothing(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    device = Device(1)
    device.error = ZramfsError(errno.EINVAL, "no algorithm is configured")
    async with running(device, "recompress idle=4s") as policies:
        await trio.sleep(3.5)
        assert policies.stats()[0].last_error == "no algorithm is configured"
        assert policies.stats()[0].rounds == 3
        device.error = ZramfsError(errno.EINTR, "cut short")
        await trio.sleep(1)
        assert policies.stats()[0].last_error is None
    assert [record.getMessage() for record in caplog.records] == [
        "policy recompress idle=4s: no algorithm is configured"]


async def test_a_round_that_is_taken_off_is_ended_with_its_policy(autojump_clock: MockClock) -> None:
    device = Device(1000)
    device.slice = 1
    async with running(device, "recompress idle=4s") as policies:
        await trio.sleep(3)
        policies.set("recompress", None)
        await trio.sleep(0.1)
        with trio.fail_after(1):
            async with policies.aside():
                pass


# ---- upkeep of units --------------------------------------------------------------------------------

async def test_upkeep_comes_without_a_policy_where_units_are_worn(autojump_clock: MockClock) -> None:
    device = Device()
    device.slice = 0.0
    async with running(device) as policies:
        await trio.sleep(UPKEEP_INTERVAL * 3.5)
        assert device.upkeep == []
        device.worn = 10
        await trio.sleep(UPKEEP_INTERVAL * 5)
        assert device.upkeep == [(UPKEEP_INTERVAL * 4, None)]
        assert all(each.rounds == 0 for each in policies.stats()), "it is no policy"


async def test_upkeep_takes_its_share_of_the_time_and_no_more(autojump_clock: MockClock) -> None:
    """A slice takes no time of the mocked clock: what passes is the rest."""
    device = Device()
    device.slice = 1.0

    async def wear() -> None:
        while True:
            device.worn = 10
            await trio.sleep(0.5)

    async with running(device), trio.open_nursery() as nursery:
        nursery.start_soon(wear)
        await trio.sleep(5000)
        nursery.cancel_scope.cancel()
    pauses = [after[0] - before[0] for before, after in zip(device.upkeep, device.upkeep[1:], strict=False)]
    assert len(pauses) > 5
    assert all(pause >= 10 / UPKEEP_SHARE for pause in pauses)


async def test_upkeep_has_the_level_of_the_policy(autojump_clock: MockClock) -> None:
    device = Device()
    device.slice, device.worn = 0.0, 1
    async with running(device, "units idle=1d level=9"):
        await trio.sleep(UPKEEP_INTERVAL + 1)
    assert device.upkeep == [(UPKEEP_INTERVAL, 9)]


async def test_a_command_cuts_upkeep_short_and_it_goes_on_afterwards(autojump_clock: MockClock) -> None:
    device = Device()
    device.slice, device.worn = 1.0, 100
    async with running(device) as policies:
        await trio.sleep(UPKEEP_INTERVAL + 10.5)
        async with policies.aside():
            left = device.worn
            assert 80 < left < 100
            await trio.sleep(1000)
            assert device.worn == left and len(device.upkeep) == 1
        await trio.sleep(300)
    assert device.worn == 0 and len(device.upkeep) == 2


async def test_an_error_of_upkeep_is_said_once_and_ends_nothing(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    device = Device()
    device.worn, device.error = 5, ZramfsError(errno.ENOMEM, "the pool is full")
    async with running(device):
        await trio.sleep(UPKEEP_INTERVAL * 3.5)
        assert len(device.upkeep) == 3
    assert [record.getMessage() for record in caplog.records] == ["policy upkeep: the pool is full"]


async def test_units_are_a_policy_like_the_others(autojump_clock: MockClock) -> None:
    device = Device(10)
    device.slice = 0
    async with running(device, "units idle=4s") as policies:
        await trio.sleep(2.5)
        [stats] = [each for each in policies.stats() if each.kind == "units"]
    assert (device.rounds, stats.rounds, stats.done) == ([1, 2], 2, Progress(20, 20, 2000))
