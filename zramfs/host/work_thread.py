# SPDX-License-Identifier: Apache-2.0
"""A call that may block, in a thread beside the trio loop; on the loop itself where no thread can be
started."""
from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import trio

T = TypeVar("T")


async def run_in_thread(work: Callable[[], T], limiter: trio.CapacityLimiter | None = None) -> T:
    """What work returns or raises. It must not wait for the tree, which the loop serves.

    A thread needs 8 MiB of address space and a place in the pids cgroup. Without them the loop stands still
    while work runs: the tree answers late, where a failure would lose data, and the lane goes on.
    """
    begun = False

    def run() -> T:
        nonlocal begun
        begun = True
        return work()

    try:
        return await trio.to_thread.run_sync(run, limiter=limiter)
    except (RuntimeError, MemoryError):  # "can't start new thread", or no memory for what trio keeps of it
        if begun:
            raise
    return work()


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
