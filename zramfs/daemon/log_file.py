# SPDX-License-Identifier: Apache-2.0
"""The log file of a device, which does not grow without end."""
from __future__ import annotations

import contextlib
import os
from pathlib import Path

import trio

# The log lies in a tmpfs, and each command that is refused is a line of about 150 bytes: a script that tries
# one a second would fill 13 MB a day.
LOG_MOST, LOG_KEPT = 4 << 20, 1 << 20  # bytes
LOG_INTERVAL = 10.0


async def watch_log(path: Path, fd: int = 2) -> None:
    """path: of the log; nothing is done to it unless it is what fd writes to."""
    while True:
        await trio.sleep(LOG_INTERVAL)
        # Without its log a device has still work to do.
        with contextlib.suppress(OSError):
            shorten(path, fd)


def shorten(path: Path, fd: int) -> None:
    """Keeps the last lines of a log that has more than LOG_MOST bytes. fd writes at its end, wherever that
    is (O_APPEND). OSError."""
    with open(path, "r+b") as file:
        seen = os.fstat(file.fileno())
        if seen.st_size <= LOG_MOST or not os.path.samestat(seen, os.fstat(fd)):
            return
        file.seek(-LOG_KEPT, os.SEEK_END)
        file.readline()
        kept = file.read()
        file.seek(0)
        file.truncate()
        file.write(b"(older lines are left out)\n" + kept)
