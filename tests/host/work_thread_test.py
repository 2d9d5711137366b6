# SPDX-License-Identifier: Apache-2.0
"""Work in a thread beside the trio loop is done once, and its result is heard, whatever becomes of either."""
from __future__ import annotations

import threading
import time

import pytest
import trio
import trio.testing

from zramfs.host.work_thread import run_in_thread


def in_thread() -> bool:
    return threading.current_thread() is not threading.main_thread()


def test_the_main_task_ends_in_order_where_the_loop_hears_of_no_thread_any_more() -> None:
    """What trio hears of threads by has found no memory, which cancels the main task: its end is shielded."""
    results = []

    async def main() -> None:
        token = trio.lowlevel.current_trio_token()

        def no_memory() -> None:
            raise MemoryError

        def work() -> bool:
            token.run_sync_soon(no_memory)
            time.sleep(0.2)
            return in_thread()

        with trio.CancelScope(shield=True):
            results.append(await run_in_thread(work))
            results.append(await run_in_thread(in_thread))

    with pytest.raises(trio.TrioInternalError) as caught:
        trio.run(main)
    assert isinstance(caught.value.__cause__, BaseException)
    assert results == [True, False]


@pytest.mark.parametrize("begins", [False, True], ids=["no thread", "a thread that is not heard of"])
def test_work_is_done_once_where_trio_finds_no_thread_or_no_memory(
    monkeypatch: pytest.MonkeyPatch, begins: bool
) -> None:
    done = []

    async def run_sync(work, **_words: object) -> None:
        if begins:
            work()
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)

    async def main() -> str:
        return await run_in_thread(lambda: done.append(1) or "result")

    assert trio.run(main) == "result"
    assert done == [1]


def test_an_error_is_that_of_the_work_and_a_cancelled_task_waits_for_it() -> None:
    over = []
    begun = trio.CancelScope()

    def work() -> None:
        trio.from_thread.run_sync(begun.cancel)
        time.sleep(0.2)
        over.append(in_thread())
        raise KeyError("of the work")

    async def main() -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            with pytest.raises(trio.Cancelled):
                await run_in_thread(work)
            assert over == [], "it has not begun"
        with begun, pytest.raises(KeyError, match="of the work"):
            await run_in_thread(work)
        assert over == [True]

    trio.run(main)


def test_a_task_that_waits_for_its_turn_can_be_cancelled() -> None:
    async def main() -> None:
        limiter, over = trio.CapacityLimiter(1), threading.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_in_thread, over.wait, limiter)
            await trio.testing.wait_all_tasks_blocked()
            with trio.move_on_after(0.05) as scope:
                await run_in_thread(lambda: pytest.fail("it was cancelled"), limiter)
            over.set()
            assert scope.cancelled_caught

    trio.run(main)
