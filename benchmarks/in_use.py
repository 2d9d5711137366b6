# SPDX-License-Identifier: Apache-2.0
"""A part of a device that stays in use: random reads and writes of single pages, all along."""
from __future__ import annotations

import contextlib
import mmap
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.load import PAGE, Zone
from benchmarks.tools import BenchmarkError, wait_until

# Of requests. Every page of 20 % of 128 MiB is then used about every 3 s, by a twentieth of a core.
RATE = 2000
PAUSE = 0.01
SEED = 12
# Rounds take 3 s; the rest is for a busy machine.
ROUND_SECONDS = 300.0


class Use:
    """A thread that uses the pages of `hot` in rounds, each page once a round, in a random order. Every other
    use is a write, with what another of these pages has in the image: the data stays of its kind, and sizes
    change."""

    def __init__(self, disk: Path, zone: Zone, hot: list[int]) -> None:
        self.rounds = 0  # complete ones; written by the thread
        self._failure: Exception | None = None
        self._ending = threading.Event()
        self._disk, self._zone, self._hot = disk, zone, hot
        self._thread = threading.Thread(target=self._run, name="use", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._ending.set()
        self._thread.join()

    def wait_rounds(self, count: int) -> None:
        """Until every page has been used `count` times from here on. Raises BenchmarkError if a request
        fails."""
        # The round that is under way may have used some pages before.
        wanted = self.rounds + count + 1
        wait_until(lambda: self._failure is not None or self.rounds >= wanted,
                   f"{count} rounds of requests to {self._disk}", ROUND_SECONDS)
        self.check()

    def check(self) -> None:
        """Raise BenchmarkError if a request has failed."""
        if self._failure is not None:
            raise BenchmarkError(f"{self._disk}: a request of the pages in use failed: {self._failure}")

    def _run(self) -> None:
        try:
            fd = os.open(self._disk, os.O_RDWR | os.O_DIRECT)
            try:
                with open(self._zone.image, "rb") as image, mmap.mmap(-1, PAGE) as page:
                    while not self._ending.is_set():
                        self._round(fd, image.fileno(), page)
            finally:
                os.close(fd)
        except Exception as failure:  # told by check(), in the thread that measures
            self._failure = failure

    def _round(self, fd: int, image: int, page: mmap.mmap) -> None:
        rng = random.Random(SEED + self.rounds)
        order = rng.sample(self._hot, len(self._hot))
        began = time.monotonic()
        for done, number in enumerate(order, 1):
            if done % 2:
                os.preadv(fd, [page], number * PAGE)
            else:
                page[:] = os.pread(image, PAGE, rng.choice(self._hot) * PAGE)
                os.pwritev(fd, [page], number * PAGE)
            ahead = began + done / RATE - time.monotonic()
            if ahead > PAUSE and self._ending.wait(ahead):
                return
        self.rounds += 1


@contextlib.contextmanager
def in_use(disk: Path, zone: Zone, share: float) -> Iterator[Use]:
    """A random `share` of the zone's pages is in use within. The zone begins at 0."""
    pages = zone.size // PAGE
    use = Use(disk, zone, random.Random(SEED).sample(range(pages), int(pages * share)))
    use.start()
    try:
        yield use
        use.check()
    finally:
        use.end()
