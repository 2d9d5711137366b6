# SPDX-License-Identifier: Apache-2.0
"""Writers whose pages tell after which of their steps they were looked at."""
from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

from tests.support.page_kinds import block, noise

PAGE = 4096


class Disk(Protocol):
    """A store, or a file that has these."""

    def write(self, off: int, data: bytes) -> int: ...
    def zero(self, off: int, n: int) -> None: ...


def page(step: int) -> bytes:
    """What step number `step` writes; b"" where it discards."""
    if step % 7 == 0:
        return b""
    head = step.to_bytes(8, "little")
    if step % 3 == 0:
        return head * 512
    return head + (noise(step % 50) if step % 3 == 1 else block("text", step % 50, PAGE))[8:]


def step_of(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


class Writer:
    """Writes its pages again and again in the order of their numbers, one step a page. Several with one clock
    and one lock take their steps in one order."""

    def __init__(self, disk: Disk, first: int, pages: int) -> None:
        self.disk, self.first, self.pages = disk, first, pages
        self.step = 0

    def advance(self) -> None:
        self.step += 1
        at = (self.first + self.step % self.pages) * PAGE
        if data := page(self.step):
            self.disk.write(at, data)
        else:
            self.disk.zero(at, PAGE)

    def expected(self, steps: int) -> list[bytes]:
        """The pages after so many steps."""
        last = {step % self.pages: step for step in range(max(1, steps - self.pages + 1), steps + 1)}
        return [page(last[n]) or bytes(PAGE) if n in last else bytes(PAGE) for n in range(self.pages)]

    def steps_in(self, image: bytes) -> int:
        """After how many steps the image was made. Fails if that is no number."""
        begin = self.first * PAGE
        found = [image[begin + n * PAGE:begin + n * PAGE + PAGE] for n in range(self.pages)]
        newest = max(step_of(data) for data in found)
        # The step behind it may have been a discard.
        for steps in (newest, newest + 1):
            if found == self.expected(steps):
                return steps
        raise AssertionError(f"what is saved of {self.first} is no state that ever was, near step {newest}")


@contextlib.contextmanager
def at_work(*jobs: Callable[[], object]) -> Iterator[list[BaseException]]:
    """Each again and again in a thread of its own, until the end or until one fails. The failures so far, of
    which the first is raised at the end."""
    failures: list[BaseException] = []
    over = threading.Event()

    def work(job: Callable[[], object]) -> None:
        try:
            while not over.is_set() and not failures:
                job()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    try:
        yield failures
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a thread does not come back"
    if failures:
        raise failures[0]


def in_turn(writers: list[Writer]) -> Callable[[], None]:
    """One step of one of them: all steps of all have one order, whichever thread takes them."""
    lock = threading.Lock()
    turns = itertools.cycle(writers)

    def step() -> None:
        with lock:
            next(turns).advance()

    return step
