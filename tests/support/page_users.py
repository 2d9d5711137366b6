# SPDX-License-Identifier: Apache-2.0
"""Those who use pages of their own of a store, in threads beside its post-processing."""
from __future__ import annotations

import random
import time
from collections.abc import Callable

from tests.support.page_kinds import block, hard, noise, prose
from zramfs.store.resize import resize
from zramfs.store.store import Store

PAGE = 4096
CHUNK = 512  # pages
USERS = 3
KINDS = (prose, prose, prose, hard, noise, lambda seed: block("zeros", seed, PAGE))


class PageUser:
    """Has every USERS-th page. contents: how many there are of each kind, the same for all users. writes:
    share of the actions that replace a whole page."""

    def __init__(self, store: Store, first: int, pages: int, contents: int, writes: float) -> None:
        self.store, self.rng, self.contents, self.writes = store, random.Random(first), contents, writes
        self.pages = {number: bytes(PAGE) for number in range(first, pages, USERS)}

    def job(self) -> None:
        rng = self.rng
        number = rng.choice(list(self.pages))
        action = rng.random() - self.writes
        if action < 0:
            self.pages[number] = rng.choice(KINDS)(rng.randrange(self.contents))
            self.store.write(number * PAGE, self.pages[number])
        elif action < 0.05:
            self.pages[number] = self.pages[number][:500] + b"changed" + self.pages[number][507:]
            self.store.write(number * PAGE + 500, b"changed")
        elif action < 0.15:
            self.store.zero(number * PAGE, PAGE)
            self.pages[number] = bytes(PAGE)
        else:
            assert self.store.read(number * PAGE, PAGE) == self.pages[number]

    def verify(self) -> None:
        for number, content in self.pages.items():
            assert self.store.read(number * PAGE, PAGE) == content


def size_changes(store: Store) -> tuple[Callable[[], None], Callable[[], None]]:
    """Two jobs: one writes to the second chunk of a store of two, the other takes it away and gives it
    again."""

    def fill() -> None:
        number = random.randrange(CHUNK, 2 * CHUNK)
        try:
            store.write(number * PAGE, prose(number % 9))
        except OSError:
            time.sleep(0.0005)

    def change() -> None:
        resize(store, CHUNK * PAGE, discard=True)
        time.sleep(0.001)
        resize(store, 2 * CHUNK * PAGE)
        time.sleep(0.01)

    return fill, change
