# SPDX-License-Identifier: Apache-2.0
"""A call that may block, in a thread beside the trio loop; on the loop itself where no thread can be started."""
from __future__ import annotations

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
