# SPDX-License-Identifier: Apache-2.0
"""A call that may block, in a thread beside the trio loop; on the loop itself where no thread can be
started."""
from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import trio

T = TypeVar("T")


class _Calls:
    """Those of a trio loop that wait for a thread. is_over: the loop hears of no thread any more, because it
    ends, or because it has found no memory for itself. What its main task does after that is done without."""

    def __init__(self) -> None:
        self.is_over = False
        self.scopes: set[trio.CancelScope] = set()

    @classmethod
    def of_loop(cls) -> _Calls:
        try:
            return _calls.get()
        except LookupError:
            calls = cls()
            _calls.set(calls)
            trio.lowlevel.spawn_system_task(calls.notice_end)
            return calls

    async def notice_end(self) -> None:
        """trio cancels such a task when one of its own has failed, such as that which hears of threads."""
        try:
            await trio.sleep_forever()
        finally:
            self.is_over = True
            for scope in self.scopes:
                scope.cancel()


_calls: trio.lowlevel.RunVar[_Calls] = trio.lowlevel.RunVar("calls in threads")


class _Work(Generic[T]):
    """Work that is done once, by whoever is first. claim: taken by that one. done: set when there is a
    result."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._claim = threading.Lock()
        self._done = threading.Event()
        self._values: list[T] = []
        self._error: BaseException | None = None

    def do(self) -> None:
        if self._claim.acquire(blocking=False):
            try:
                self._values.append(self._work())
            except BaseException as error:
                self._error = error
            finally:
                self._done.set()

    def result(self) -> T:
        """Does it if nobody has begun, waits for its end, and returns or raises what it does."""
        self.do()
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._values[0]


async def run_in_thread(work: Callable[[], T], limiter: trio.CapacityLimiter | None = None) -> T:
    """What work returns or raises. It must not wait for the tree, which the loop serves.

    A thread needs 8 MiB of address space and a place in the pids cgroup. Without them, and where the loop
    hears of no thread, it stands still while work runs: the tree answers late, where a failure would lose
    data, and the lane goes on.
    """
    once = _Work(work)
    calls = _Calls.of_loop()
    await trio.lowlevel.checkpoint_if_cancelled()
    async with limiter or contextlib.nullcontext():
        if not calls.is_over:
            with trio.CancelScope(shield=True) as scope:
                calls.scopes.add(scope)
                try:
                    await trio.to_thread.run_sync(once.do, abandon_on_cancel=True)
                except (RuntimeError, MemoryError):
                    pass  # "can't start new thread", or no memory for what trio keeps of it
                finally:
                    calls.scopes.discard(scope)
        return once.result()


class WorkThread:
    """One call at a time, of all that are given to it. prepare: called in the thread before each."""

    def __init__(self, prepare: Callable[[], object]) -> None:
        self._prepare = prepare
        self._limiter = trio.CapacityLimiter(1)
        self._lock = threading.Lock()  # for a call that still runs when its trio loop is gone

    def resume(self) -> None:
        """A new trio loop runs; the tasks of the old one are gone, in whatever they were doing."""
        self._limiter = trio.CapacityLimiter(1)

    async def run(self, work: Callable[[], T]) -> T:
        def prepared() -> T:
            self._prepare()
            with self._lock:
                return work()

        return await run_in_thread(prepared, self._limiter)
