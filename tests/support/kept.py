# SPDX-License-Identifier: Apache-2.0
"""A keeper with daemons that serve nothing (fake_daemon.py), and what these have noted."""
from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.child import Child
from tests.support.paths import python_environment
from tests.support.whole import wait_until

HAND_AT, HAND_BYTES = 64, 64


class Kept(Child):
    """A keeper with its first daemon, and what these and their successors have noted."""

    def __init__(self, place: Path, **plan: object) -> None:
        self.place = place
        (place / "plan.json").write_text(json.dumps(plan))
        super().__init__([sys.executable, "-m", "tests.support.fake_daemon", place], place / "log",
                         env=python_environment())

    def events(self, name: str) -> list[tuple[int, int]]:
        """(pid, number) of each event of this name."""
        with contextlib.suppress(FileNotFoundError):
            lines = [line.split() for line in (self.place / "events").read_text().splitlines()]
            return [(int(pid), int(number)) for what, pid, number in lines if what == name]
        return []

    def wait_for(self, name: str, count: int = 1) -> int:
        """The pid of the event of this name, the count-th one."""
        wait_until(lambda: len(self.events(name)) >= count, f"{count} of the event {name}")
        return self.events(name)[count - 1][0]

    def wait_for_standby(self, but: int = 0) -> int:
        """The pid of the one that waits last, once the keeper has it."""
        def there() -> bool:
            seen = self.events("standby")
            return bool(seen) and seen[-1][1] not in (0, but)
        wait_until(there, "a standby")
        return self.events("standby")[-1][1]

    @contextlib.contextmanager
    def page(self, server: int) -> Iterator[mmap.mmap]:
        number = next(number for pid, number in self.events("serving") if pid == server)
        with open(f"/proc/{server}/fd/{number}", "r+b") as file, mmap.mmap(file.fileno(), 0) as page:
            yield page


@contextlib.contextmanager
def kept(place: Path, **plan: object) -> Iterator[Kept]:
    keeper = Kept(place, **plan)
    try:
        yield keeper
    finally:
        if keeper.process.poll() is None:
            keeper.process.kill()
            keeper.process.wait(60)
        for name in ("serving", "waiting", "new-keeper"):
            for pid, number in keeper.events(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number if name == "new-keeper" else pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def put_hand(page: mmap.mmap, number: int, *, unique: int, waits: bool = False, steps: int = 0) -> None:
    struct.pack_into("=QQQ", page, HAND_AT + number * HAND_BYTES, unique, waits, steps)


def own_ends(page: mmap.mmap) -> int:
    return struct.unpack_from("=Q", page, 16)[0]
