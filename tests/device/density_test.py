# SPDX-License-Identifier: Apache-2.0
"""Density: how it is written, when its steps look, what they may cost, and who goes first."""
from __future__ import annotations

import errno
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from zramfs.device.density import (
    AGES,
    BUSY,
    FACTORS,
    LOOKS,
    MAX_AGE,
    MAX_DEFER,
    ORDERS,
    SLACK,
    STRETCH,
    Density,
    Did,
    Rest,
)
from zramfs.device.policies import Policies
from zramfs.errors import ZramfsError
from zramfs.model.density import AUTO, OFF, parse_density
from zramfs.model.density import Density as Wanted
from zramfs.model.policy import Recompress
from zramfs.model.stats import DENSITY_STEPS, StepStats


@pytest.mark.parametrize(("text", "wanted", "shown"), [
    ("off", Wanted("off"), "off"), ("auto", Wanted("auto", 5), "auto"), ("max", Wanted("max"), "max"),
    ("auto:10%", Wanted("auto", 10), "auto:10%"), ("auto:1", Wanted("auto", 1), "auto:1%"),
    ("auto:100%", Wanted("auto", 100), "auto:100%"), ("auto:5%", Wanted("auto", 5), "auto"),
])
def test_density_is_written_and_shown(text: str, wanted: Wanted, shown: str) -> None:
    assert parse_density(text) == wanted
    assert str(wanted) == shown and parse_density(shown) == wanted


@pytest.mark.parametrize("text", [
    "", "on", "AUTO", "auto ", "auto:", "auto:0", "auto:101%", "auto:05", "auto:5%%", "auto:-5", "max:10%",
    "off:5", "auto share=10%", "auto:1e1", "auto:\n5", "auto:\u0665",
])
def test_what_is_no_density(text: str) -> None:
    with pytest.raises(ValueError, match="expected off, max, auto, or auto with the share of a core"):
        parse_density(text)


class Work:
    """Stands for a device, and for a policy's work. slices: of each pass, of `page` bytes saved a page."""

    def __init__(self, slices: int = 0, saved: int = 1000) -> None:
        self.slices, self.saved = slices, saved
        self.began = self.ended = 0.0
        self.passes: list[tuple[float, str, int]] = []  # seconds since then, step, age
        self.levels: set[int] = set()
        self.ready = True
        self.supply = "fair"
        self.looks_at_memory = 0
        self.lacks: dict[str, str] = {}
        self.io = 0
        self.served = 0.0  # share of the time
        self.slice = 0.01
        self.errors: dict[str, Exception] = {}
        self.has_access_times = False
        self.policy_rounds: list[float] = []
        self.units_worn = False

    def requests(self) -> int:
        return self.io

    def served_ms(self) -> int:
        return int(trio.current_time() * 1000 * self.served)

    async def keep_access_times(self) -> None:
        self.has_access_times = True

    async def make_denser(self, step: str, older: int, level: int, did: Did, rest: Rest) -> None:
        self.passes.append((round(trio.current_time() - self.began, 3), step, older))
        self.levels.add(level)
        if step in self.errors:
            raise self.errors[step]
        for _ in range(self.slices):
            did(StepStats(0, 1, self.saved, self.slice))
            await rest(self.slice)
        self.ended = trio.current_time()

    async def recompress_idle(self, policy: object, did: object, rest: object) -> None:
        self.policy_rounds.append(trio.current_time())

    def times(self, step: str) -> list[float]:
        return [at for at, name, _ in self.passes if name == step]


class Scarce(Work):
    """Counts how often it is asked for what costs a look at files."""

    @property
    def supply(self) -> str:
        self.looks_at_memory += 1
        return "fair"

    @supply.setter
    def supply(self, value: str) -> None:
        pass


@asynccontextmanager
async def running(
    work: Work, text: str, kept: dict[str, object] | None = None
) -> AsyncIterator[tuple[Density, Policies]]:
    """kept: of a predecessor, whose process has had another trio clock."""
    if kept is None:
        work.began = trio.current_time()
    policies = Policies(work, trio.current_time)
    density = Density(work, policies, parse_density(text), lambda: trio.current_time() + 1e6)
    density.inherit(kept)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(policies.run)
        nursery.start_soon(density.run)
        await trio.testing.wait_all_tasks_blocked()
        yield density, policies
        nursery.cancel_scope.cancel()


async def use(work: Work, seconds: float) -> None:
    """Requests all along."""
    for _ in range(int(seconds)):
        work.io += 1
        await trio.sleep(1)


async def test_off_does_nothing(autojump_clock: MockClock) -> None:
    work = Work(10)
    async with running(work, "off") as (density, _):
        await use(work, 5000)
        assert density.stats().mode == "off" and not density.stats().is_resting
    assert work.passes == [] and not work.has_access_times


async def test_nothing_is_done_in_the_first_minute_and_no_units_in_the_first_ten(
    autojump_clock: MockClock
) -> None:
    work = Work()
    async with running(work, "auto"):
        await use(work, 800)
    assert 60 < work.times("recompress")[0] <= 90
    assert 600 < work.times("units")[0] <= 630


async def test_the_steps_come_in_their_order_with_their_ages_and_the_level_of_the_mode(
    autojump_clock: MockClock
) -> None:
    work = Work()
    async with running(work, "auto"):
        await use(work, 620)
    last = [(step, older) for _, step, older in work.passes[-4:]]
    assert last == [("recompress", 60), ("dictionaries", 60), ("share", 600), ("units", 600)]
    assert work.levels == {3}
    work = Work()
    async with running(work, "max"):
        await use(work, 6)
    assert [(step, older) for _, step, older in work.passes[:4]] == [
        (step, int(MAX_AGE)) for step in ORDERS["max"]]
    assert MAX_AGE < work.passes[0][0] <= MAX_AGE + 3 and work.levels == {9}


@pytest.mark.parametrize("supply", FACTORS)
async def test_it_comes_sooner_where_memory_is_short_and_later_where_there_is_plenty(
    supply: str, autojump_clock: MockClock
) -> None:
    work = Work()
    work.supply = supply
    async with running(work, "auto"):
        await use(work, 1300)
    for step, age in AGES.items():
        assert age * FACTORS[supply] < work.times(step)[0] <= age * FACTORS[supply] + 31
    assert {older for _, step, older in work.passes if step == "units"} == {600 * FACTORS[supply]}


async def test_a_hurry_brings_the_next_look_but_not_more_than_one_a_second(autojump_clock: MockClock) -> None:
    work = Work()
    async with running(work, "auto") as (density, _):
        await use(work, 100)
        work.supply = "short"
        before = len(work.times("recompress"))
        for _ in range(40):
            density.hurry()
            work.io += 1
            await trio.sleep(0.1)
        assert 1 <= len(work.times("recompress")) - before <= 4


async def test_a_device_that_nobody_uses_costs_nothing(autojump_clock: MockClock) -> None:
    """Once its pages have been old for a while. Then it does not even ask how much memory there is."""
    work = Scarce()
    async with running(work, "auto") as (density, _):
        await trio.sleep(1000)
        passes, looks = len(work.passes), work.looks_at_memory
        assert density.stats().is_resting
        await trio.sleep(10_000)
        assert (len(work.passes), work.looks_at_memory) == (passes, looks) and passes < 12
        work.io += 1
        assert not density.stats().is_resting
        await trio.sleep(100)
        assert len(work.passes) > passes


async def test_the_last_page_that_was_used_is_found_when_it_is_old(autojump_clock: MockClock) -> None:
    """Whenever it was used: a pass begins after it has reached its age, and after that there is none."""
    for pause in (0, 7, 14.9, 59, 61):
        work = Work()
        async with running(work, "auto") as (density, _):
            await trio.sleep(200 + pause)
            work.io += 1
            used = trio.current_time() - work.began
            await trio.sleep(2000)
            for step, age in AGES.items():
                assert used + age < work.times(step)[-1] <= used + age + SLACK + age / LOOKS + 31
            assert density.stats().is_resting


async def test_passes_that_win_little_are_put_off_and_a_gain_brings_them_back(
    autojump_clock: MockClock
) -> None:
    work = Work(10, saved=10)
    work.slice = 0
    async with running(work, "auto"):
        await use(work, 3000)
        poor = work.times("recompress")
        gaps = [after - before for before, after in zip(poor, poor[1:], strict=False)]
        assert gaps[:3] == sorted(gaps[:3]) and gaps[-1] >= MAX_DEFER * 60 / LOOKS > gaps[0]
        work.saved = 1000
        await use(work, 400)
        assert work.times("recompress")[-1] - work.times("recompress")[-2] <= 30


@pytest.mark.parametrize(("text", "share"), [("auto", 0.05), ("auto:20%", 0.2), ("auto:100%", 1.0)])
@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("supply", ["fair", "short"])
async def test_it_takes_its_share_of_a_core_and_half_of_that_while_the_device_is_busy(
    text: str, share: float, busy: bool, supply: str, autojump_clock: MockClock
) -> None:
    """A slice takes no time of the mocked clock: what passes is the rest. Where memory is short it is not
    halved."""
    work = Work(100)
    work.slice = 0.25
    work.served = min(1.0, BUSY + 0.1) if busy else BUSY - 0.1
    work.supply = supply
    async with running(work, text) as (density, _):
        while density.stats().steps["recompress"].rounds == 0:
            await trio.sleep(1)
        assert density.stats().steps["recompress"] == StepStats(1, 100, 100_000, 25.0)
    rested = work.ended - work.began - work.passes[0][0]
    # The load of a rest that takes no time is not known.
    halved = busy and supply != "short" and share < 1
    assert 25 / (rested + 25) == pytest.approx(share / 2 if halved else share, rel=0.02)


async def test_max_rests_for_nobody(autojump_clock: MockClock) -> None:
    work = Work(1000)
    work.served = 1.0
    async with running(work, "max"):
        await trio.sleep(MAX_AGE + 3)
        assert [step for _, step, _ in work.passes[:4]] == list(ORDERS["max"])
        assert work.passes[0][0] == work.passes[3][0], "the rest took time of the clock"


async def test_a_command_goes_first_and_the_step_is_taken_up_again(autojump_clock: MockClock) -> None:
    work = Work(1000)
    async with running(work, "auto") as (density, policies):
        while not work.passes:
            await trio.sleep(1)
        at = trio.current_time()
        async with policies.aside():
            assert trio.current_time() == at
            pages = density.stats().steps["recompress"].pages
            assert pages > 0
            await trio.sleep(1000)
            assert density.stats().steps["recompress"].pages == pages and len(work.passes) == 1
            assert not density.stats().is_resting
        await trio.sleep(31)
        assert len(work.passes) == 2
        assert density.stats().last_error is None


async def test_a_policy_waits_no_longer_than_a_stretch(autojump_clock: MockClock) -> None:
    work = Work(1_000_000)
    async with running(work, "auto") as (density, policies):
        policies.set("recompress", Recompress(4))
        await use(work, 300)
        gaps = [after - before for before, after in
                zip(work.policy_rounds, work.policy_rounds[1:], strict=False)]
        assert STRETCH < max(gaps) < STRETCH + 5
        assert len(work.times("recompress")) > 2
        assert density.stats().steps["recompress"].rounds > 1


async def test_switching_it_off_or_over_ends_what_is_under_way(autojump_clock: MockClock) -> None:
    work = Work(1000)
    async with running(work, "auto") as (density, policies):
        while not work.passes:
            await trio.sleep(1)
        density.set(OFF)
        pages = density.stats().steps["recompress"].pages
        with trio.fail_after(0.1):
            async with policies.aside():
                pass
        await use(work, 1000)
        assert density.stats().steps["recompress"].pages == pages
        await density.change(AUTO)
        assert work.has_access_times
        await use(work, 91)
        assert len(work.passes) == 2


async def test_a_change_in_the_middle_of_a_round_fails_nothing(autojump_clock: MockClock) -> None:
    """The task may go on for some lines before it notices."""
    work = Work()
    async with running(work, "max") as (density, _):
        pass_of = work.make_denser

        async def switch_off(step: str, *arguments: object) -> None:
            density.set(OFF)
            await pass_of(step, *arguments)

        work.make_denser = switch_off
        await use(work, 100)
        assert [step for _, step, _ in work.passes] == list(ORDERS["max"]) and work.levels == {9}


async def test_forgetting_switches_it_off_and_clears_its_figures(autojump_clock: MockClock) -> None:
    work = Work(3)
    async with running(work, "max") as (density, _):
        await trio.sleep(10)
        assert density.stats().steps["units"].pages > 0
        density.forget()
        assert density.stats() == Density(work, Policies(work)).stats()
        await use(work, 100)
        assert density.stats().steps["units"] == StepStats()


async def test_what_a_device_lacks_is_left_out_and_said(autojump_clock: MockClock) -> None:
    work = Work(1)
    work.lacks = {"recompress": "there is no recomp_algorithm"}
    async with running(work, "max") as (density, _):
        await trio.sleep(60)
        assert {step for _, step, _ in work.passes} == {"dictionaries", "share", "units"}
        assert density.stats().lacks == "there is no recomp_algorithm"
        assert density.stats().is_resting


async def test_an_error_of_a_step_is_said_once_and_keeps_no_other_from_its_turn(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    work = Work(1)
    work.errors = {"recompress": ZramfsError(errno.ENOMEM, "the pool is full"), "share": MemoryError()}
    async with running(work, "max") as (density, _):
        await use(work, 100)
        assert density.stats().last_error == "share: memory is short; recompress: the pool is full"
        assert density.stats().steps["units"].rounds > 1
        work.errors.clear()
        await use(work, 100)
        assert density.stats().last_error is None
        work.errors = {"recompress": ZramfsError(errno.EINTR, "cut short")}
        await use(work, 100)
        assert density.stats().last_error is None
    assert [record.getMessage() for record in caplog.records] == [
        "density max: share: memory is short", "density max: recompress: the pool is full"]


async def test_without_a_store_nothing_is_done(autojump_clock: MockClock) -> None:
    work = Work(1)
    work.ready = False
    async with running(work, "max") as (density, _):
        await trio.sleep(100)
        assert work.passes == [] and not density.stats().is_resting
        work.ready = True
        await trio.sleep(5)
        assert len(work.passes) >= 3


async def test_the_task_may_be_started_again(autojump_clock: MockClock) -> None:
    """After any exception, as when trio has ended with all its tasks."""
    work = Work(1)
    work.errors = {"share": RuntimeError("a defect")}
    policies = Policies(work)
    density = Density(work, policies, parse_density("max"))
    with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="a defect")):
        await density.run()
    work.errors.clear()
    density.resume()
    with trio.move_on_after(60):
        await density.run()
    assert density.stats().steps["units"].pages > 0
    assert density.stats().is_resting


def handed_over(density: Density) -> dict[str, object]:
    return json.loads(json.dumps(density.kept()))


async def test_a_successor_goes_on_where_its_predecessor_was(autojump_clock: MockClock) -> None:
    """One whose process dies every three minutes, between two looks, makes units as late as one that lives,
    and no step looks again before its time."""
    work, kept, looks = Work(3, saved=0), None, dict.fromkeys(DENSITY_STEPS, 0)
    for _ in range(10):
        async with running(work, "auto", kept) as (density, _):
            await use(work, 187)
            kept = handed_over(density)
        assert handed_over(density) == kept
        assert kept["done"].keys() == looks.keys()
    assert 600 < work.times("units")[0] <= 630
    whole = Work(3, saved=0)
    async with running(whole, "auto") as (density, _):
        await use(whole, 1870)
    for step in DENSITY_STEPS:
        # A look that was due when the process died comes up to an interval later.
        assert abs(len(work.times(step)) - len(whole.times(step))) <= 2, step
        assert kept["done"][step]["rounds"] == len(work.times(step))


async def test_a_successor_that_has_not_begun_hands_on_what_it_got(autojump_clock: MockClock) -> None:
    work = Work(3)
    async with running(work, "auto") as (density, _):
        await use(work, 700)
        kept = handed_over(density)
    heir = Density(work, Policies(work), parse_density("auto"))
    heir.inherit(kept)
    assert handed_over(heir) == kept and heir.stats().steps == density.stats().steps
    heir.inherit(None)
    assert handed_over(heir) == kept
    heir.set(OFF)
    assert heir.kept()["began"] is None, "a change begins anew"


async def test_a_loop_that_is_started_again_goes_on_where_it_was(autojump_clock: MockClock) -> None:
    work = Work(3)
    async with running(work, "auto") as (density, _):
        await use(work, 300)
    density.resume()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(density.run)
        await use(work, 330)
        nursery.cancel_scope.cancel()
    assert 600 < work.times("units")[0] <= 645
