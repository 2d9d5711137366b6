# SPDX-License-Identifier: Apache-2.0
"""Tasks beside the lane: whatever they fail of, they are started again, until they are cancelled."""
from __future__ import annotations

import logging

import pytest
import trio
from trio.testing import MockClock

from zramfs.daemon.helper_tasks import LONGEST_PAUSE, HelperTasks
from zramfs.model.stats import TaskStats


@pytest.mark.parametrize("failure", [
    OSError(24, "Too many open files"), MemoryError(), ZeroDivisionError("a bug"),
    ExceptionGroup("two", [ValueError("a"), ExceptionGroup("inner", [KeyError("b")])]),
])
async def test_a_failing_task_is_started_again_after_growing_pauses(
    failure: Exception, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    starts: list[float] = []
    stats: dict[str, TaskStats] = {}

    async def fail() -> None:
        starts.append(trio.current_time())
        raise failure

    with trio.move_on_after(300):
        await HelperTasks("z0", stats).keep_running("compactor", fail)
    pauses = [round(after - before) for before, after in zip(starts, starts[1:], strict=False)]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert stats["compactor"].failures == len(starts)
    assert type(failure).__name__ in stats["compactor"].last_error or isinstance(failure, ExceptionGroup)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert f"again in 1 s, after repeated failures in {LONGEST_PAUSE:g} s" in caplog.text
    # Only a bug has a trace.
    assert bool(caplog.records[0].exc_info) == (not isinstance(failure, (OSError, MemoryError)))


async def test_an_episode_is_over_after_a_minute_without_failure(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    starts: list[float] = []

    async def fail_after_long_work() -> None:
        starts.append(trio.current_time())
        await trio.sleep(100)
        raise OSError(5, "Input/output error")

    with trio.move_on_after(1000):
        await HelperTasks("z0", {}).keep_running("log", fail_after_long_work)
    assert [round(after - before) for before, after in zip(starts, starts[1:], strict=False)] == [101] * 9
    assert len(caplog.records) == 9  # each is an episode of its own


async def test_a_task_that_is_cancelled_while_it_fails_ends(autojump_clock: MockClock) -> None:
    runs = 0

    async def fail_when_cancelled() -> None:
        nonlocal runs
        runs += 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await trio.sleep_forever()
            finally:
                raise OSError(5, "while it ends")

    with trio.move_on_after(10):
        await HelperTasks("z0", {}).keep_running("policies", fail_when_cancelled)
    assert runs <= 2


async def test_a_task_that_ends_is_not_started_again() -> None:
    stats: dict[str, TaskStats] = {}

    async def end() -> None:
        pass

    await HelperTasks("z0", stats).keep_running("tree", end)
    assert stats["tree"] == TaskStats("tree")
