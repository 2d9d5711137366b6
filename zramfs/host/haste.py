# SPDX-License-Identifier: Apache-2.0
"""A thread that others wait for runs before the programs of the machine."""
from __future__ import annotations

import contextlib
import os

# The lowest of all real-time priorities is above each normal one.
_PRIORITY = 1


def make_haste(on: bool) -> None:
    """For the calling thread, until it is called with False. What it starts runs as others do. Without effect
    where CAP_SYS_NICE is lacking, or the cgroup has no real-time budget."""
    policy, priority = (os.SCHED_RR, _PRIORITY) if on else (os.SCHED_OTHER, 0)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, policy | os.SCHED_RESET_ON_FORK, os.sched_param(priority))
