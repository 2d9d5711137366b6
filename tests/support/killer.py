# SPDX-License-Identifier: Apache-2.0
"""Kills the daemon of a device again and again, while a test looks at what whoever does I/O notices."""
from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.whole import wait_until
from zramfs.host import locks
from zramfs.lifecycle import rundir
from zramfs.lifecycle.rundir import Rundir, State


def found(directory: Path) -> Rundir:
    rundir_ = rundir.find(str(directory))
    assert rundir_ is not None
    return rundir_


def state(directory: Path) -> State:
    read = found(directory).read()
    assert read is not None
    return read


def serving_pids(place: Rundir) -> list[int]:
    """Of the daemon; empty between two of them."""
    read = place.read()
    return [pid for pid in locks.holders(place.path) if read and pid != read.keeper_pid]


def has_standby(directory: Path) -> bool:
    """Beside a daemon that serves: one that is ready."""
    now = state(directory)
    return now.pid != now.keeper_pid and now.standby_pid not in (0, now.pid)


def kill_daemon(directory: Path, number: int = signal.SIGKILL) -> int:
    """The pid of the one that was killed; returns when another one is named in the state."""
    old = state(directory).pid
    os.kill(old, number)
    wait_until(lambda: state(directory).pid not in (old, state(directory).keeper_pid), "another daemon", 30)
    return old


class Killer:
    """kills: so far."""

    def __init__(self, directory: Path, pauses: tuple[float, float], seed: int = 0) -> None:
        self._place = found(directory)
        self._pauses = pauses
        self._random = random.Random(seed)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.kills = 0
        self._killed: set[int] = set()  # some have not gone yet
        self._began = time.monotonic()
        self._log = open(self._place.log)  # noqa: SIM115 (the file may be gone at the end)

    def _run(self) -> None:
        while not self._over.wait(self._random.uniform(*self._pauses)):
            for pid in serving_pids(self._place):
                if pid in self._killed:
                    continue
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    self.kills += 1
                    self._killed.add(pid)

    def is_done(self, count: int) -> bool:
        """So many kills, or a second for each of them and half of the kills: starts take long on a machine
        that is busy with other things."""
        is_late = time.monotonic() - self._began > count
        return self.kills >= count or is_late and self.kills >= count // 2

    def log(self) -> str:
        return self._place.log.read_text()

    def end(self) -> None:
        """After it, a daemon serves."""
        self._over.set()
        self._thread.join()
        with self._log:
            # A device that has died leaves no daemon, and perhaps no log by its name.
            wait_until(lambda: bool(set(serving_pids(self._place)) - self._killed),
                       f"a daemon after the last kill; the log ends with {self._log.read()[-3000:]}", 30)

    @classmethod
    @contextlib.contextmanager
    def at_work(cls, directory: Path, pauses: tuple[float, float]) -> Iterator[Killer]:
        killer = cls(directory, pauses)
        killer._thread.start()
        try:
            yield killer
        finally:
            killer.end()
