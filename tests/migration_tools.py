# SPDX-License-Identifier: Apache-2.0
"""What the tests of migration share."""
from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable

from memory_file import FRAME, PAGE, MemoryFile
from models import PAGEBLOCK_FRAMES

from allocator import Arena, Balloon, Migration, Pool
from allocator.check import check

FREE, USED, MOVABLE, ISOLATED, LOCKED = 1, 2, 4, 8, 16  # page_desc_t.flags
IN_USE = 1  # pageblock_desc_t.flags


def flags_of_frames(arena: Arena) -> list[int]:
    """page_desc_t.flags of every frame."""
    memory = MemoryFile(arena.fileno())
    n = memory.superblock.nr_pageblocks * PAGEBLOCK_FRAMES
    data = os.pread(memory.fd, n * PAGE.size, memory.superblock.page_off)
    return [fields[0] for fields in struct.iter_unpack("<HBBIII", data)]


def assert_at_rest(what: Arena | Pool, *, balloon: Balloon | None = None, others: int = 0) -> None:
    """Nothing is locked or isolated, nothing waits to be freed, and every frame in use is the pool's,
    the balloon's, or one of so many others."""
    arena = what if isinstance(what, Arena) else what.arena
    check(what, 2)
    memory = MemoryFile(arena.fileno())
    flags = flags_of_frames(arena)
    assert set(flags) <= {0, FREE, USED, USED | MOVABLE}
    assert {memory.pageblock(n).flags for n in range(len(flags) // PAGEBLOCK_FRAMES)} <= {0, IN_USE}
    owned = 0
    if isinstance(what, Pool):
        for c in what.classes():
            in_lists = sum(c.zspages_by_group) * c.pages_per_zspage
            assert in_lists == c.pages_used, f"class {c.size} has zspages that stand in no list"
            owned += in_lists
        assert what.stats().pages == owned
    if balloon is not None:
        stats = balloon.stats()
        assert stats.isolated == 0
        owned += stats.pages
    assert arena.stats().frames_used == flags.count(USED) + flags.count(USED | MOVABLE) == owned + others


def assert_balanced(migration: Migration) -> None:
    """Every page that was isolated has come to one end."""
    s = migration.stats()
    assert s.isolated == s.migrated + s.owner_gone + s.put_back


def fill(arena: Arena) -> list[int]:
    """Every frame there is, by alloc()."""
    frames = []
    while True:
        try:
            frames.append(arena.alloc())
        except MemoryError:
            return frames


def touch(arena: Arena, frames: list[int]) -> None:
    """Makes frames resident."""
    for frame in frames:
        arena.frame(frame)[:] = bytes([frame & 0xFF]) * FRAME


def in_threads(*jobs: Callable[[], None], limit: float = 60) -> None:
    """Each in a thread of its own, to the end; the first exception is raised here."""
    failures: list[BaseException] = []

    def work(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(limit)
        assert not thread.is_alive(), "a thread does not come back"
    if failures:
        raise failures[0]
