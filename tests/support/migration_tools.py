# SPDX-License-Identifier: Apache-2.0
"""What the tests of migration share."""
from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable, Iterator

from allocator import Arena, Balloon, Migration, Pool
from allocator.check import check
from tests.support.memory_file import FRAME, PAGE, MemoryFile, Zspage
from tests.support.models import CHAIN_8, PAGEBLOCK_FRAMES, SizeClass
from tests.support.pool_tools import largest, pattern, scatter

FREE, USED, MOVABLE, ISOLATED, LOCKED = 1, 2, 4, 8, 16  # page_desc_t.flags
IN_USE = 1  # pageblock_desc_t.flags
CLASSES = {c.index: c for c in CHAIN_8}


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


def until(least: int, reached: Callable[[], bool], limit: float = 120) -> Iterator[int]:
    """Counts rounds, at least so many, until something has come to pass in other threads."""
    end = time.monotonic() + limit
    n = 0
    while n < least or not reached():
        assert time.monotonic() < end, f"did not come to pass in {limit} s"
        yield n
        n += 1


def in_threads(*jobs: Callable[[], None], over: threading.Event | None = None, limit: float = 200) -> None:
    """Each in a thread of its own, to the end; the first exception is raised here. over is set when
    one fails, so that those that wait for it end too."""
    failures: list[BaseException] = []

    def work(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            failures.append(error)
            if over is not None:
                over.set()

    threads = [threading.Thread(target=work, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(limit)
        assert not thread.is_alive(), "a thread does not come back"
    if failures:
        raise failures[0]


class PoolScene:
    """A pool, what is in it, and its memory file. scattered: no zspage has neighbouring frames."""

    def __init__(self, nr_pageblocks: int = 4, *, scattered: bool = False) -> None:
        self.arena = Arena(0, nr_pageblocks)
        if scattered:
            scatter(self.arena)
        self.others = self.arena.stats().frames_used
        self.memory = MemoryFile(self.arena.fileno())
        self.pool = Pool(self.arena)
        self.migration = Migration(self.arena)
        self.sizes: dict[int, int] = {}

    def malloc(self, tag: int, size: int) -> None:
        self.pool.malloc(tag, pattern(tag, size))
        self.sizes[tag] = size

    def free(self, *tags: int) -> None:
        for tag in tags:
            self.pool.free(tag)
            del self.sizes[tag]

    def fill(self, c: SizeClass, zspages: int = 1) -> list[int]:
        """So many zspages full of the largest objects that the class takes: their tags, by place."""
        tags = list(range(c.objs * zspages))
        for tag in tags:
            self.malloc(tag, largest(c))
        return tags

    def zspage(self, tag: int) -> Zspage:
        return self.memory.zspage(self.pool.location(tag)[0])

    def frames(self, tag: int) -> list[int]:
        z = self.zspage(tag)
        return list(z.frames[:CLASSES[z.class_idx].pages])

    def chain(self, number: int) -> list[int]:
        """Indices of a zspage's free objects in their order, read from the memory file."""
        z = self.memory.zspage(number)
        found, index = [], z.freeobj
        while index < CLASSES[z.class_idx].objs:
            assert index not in found
            found.append(index)
            off = self.memory.header_off(number << 8 | index, 32 + 16 * z.class_idx)
            index = struct.unpack("<Q", os.pread(self.memory.fd, 8, off))[0] >> 1
        return found

    def move(self, first: int, n: int = 1) -> OSError | MemoryError | None:
        """Empties n frames and frees them; what hindered it."""
        try:
            self.migration.alloc_contig_range(first, n)
        except (OSError, MemoryError) as error:
            return error
        for frame in range(first, first + n):
            self.arena.free(frame)
        return None

    def readable(self) -> None:
        for tag, size in self.sizes.items():
            assert self.pool.read(tag) == pattern(tag, size)

    def settle(self, others: int = 0) -> None:
        self.readable()
        assert_at_rest(self.pool, others=self.others + others)
        assert_balanced(self.migration)
