# SPDX-License-Identifier: Apache-2.0
"""Waiting for a descriptor in trio, where a failure on the way must not last."""
from __future__ import annotations

import select

import trio

LOOK_INTERVAL = 0.5  # seconds


async def wait_until_readable(fd: int) -> None:
    """As trio.lowlevel.wait_readable. Where that has no memory, trio (0.32 at least) takes the descriptor for
    waited for from then on, and refuses everybody else; then this looks twice a second."""
    try:
        await trio.lowlevel.wait_readable(fd)
    except (OSError, MemoryError, trio.BusyResourceError):
        while not select.select([fd], [], [], 0)[0]:
            await trio.sleep(LOOK_INTERVAL)
