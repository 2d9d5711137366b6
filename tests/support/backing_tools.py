# SPDX-License-Identifier: Apache-2.0
"""Backing stores for tests: a store with one, pages written back, and file systems without room."""
from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.memory_file import MemoryFile
from zramfs.store.backing import Backing
from zramfs.store.store import Store
from zramfs.store.writeback import WritebackRun

PAGE = 4096
MIB = 1 << 20
LONG = 1 << 40  # ns: a slice that no busy machine cuts short


def backing_file(path: Path, size: int = 16 * MIB) -> Path:
    with open(path, "wb") as file:
        file.truncate(size)
    return path


@contextmanager
def backed(path: Path, size: int = 4 * MIB, *, room: int = 16 * MIB, **how: object) -> Iterator[Store]:
    """A store of `size` bytes with a backing file of `room` bytes; checked at its end."""
    store = Store(size, backing=Backing(str(backing_file(path, room))), **how)
    try:
        yield store
        store.check(2)
    finally:
        store.close()


def write_back(
    store: Store, *ranges: tuple[int, int], mode: str | None = None, batch: int = 32,
    budget: int | None = None,
) -> WritebackRun:
    """One run over the ranges of pages, the whole device without any; answers what it has done. It is
    cut short when the budget (blocks) is used up."""
    run = WritebackRun(store, batch)
    try:
        for low, high in ranges or ((0, store.disksize // PAGE),):
            while low < high:
                low = run.select(low, high, mode)
        while run.left and budget != 0:
            written = run.write(budget)
            budget = None if budget is None else budget - written
    finally:
        run.finish()
    return run


@contextmanager
def tmpfs(point: Path, size: int) -> Iterator[Path]:
    """A file system with room for `size` bytes."""
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", point], check=True, timeout=20)
    try:
        yield point
    finally:
        subprocess.run(["umount", "--lazy", point], check=True, timeout=20)


def extents(store: Store) -> dict[int, tuple[int, int]]:
    """Page -> (byte offset, bytes) of its object or unit, from the slot table by the drawings in
    backing.pxd."""
    file = MemoryFile(store.migration.arena.fileno())
    found = {}
    for slot in range(store.disksize // PAGE):
        word = file.slot_word(slot)
        if word >> 1 & 7 != 5:
            continue
        if word >> 23 & 1:
            found[slot] = (word >> 32) * PAGE, PAGE
        elif word >> 22 & 1:
            found[slot] = (word >> 24) * 16, (word >> 10 & 0xFFF) * 16
        else:
            size = word >> 10 & 0x1FFF
            found[slot] = (word >> 24) * 16, -(-(size + 8) // 16) * 16
    return found
