# SPDX-License-Identifier: Apache-2.0
"""Shares pages, and reads cells in a memory file by the drawings in zramfs/store/shared.h and record.h
alone."""
from __future__ import annotations

import os
import struct
from typing import NamedTuple

from tests.support.memory_file import RECORD, MemoryFile
from zramfs.model.stats import SharingStats
from zramfs.store.sharing import Sharing
from zramfs.store.store import Store

PAGE = 4096
CELL_TAG = 1 << 46
SHARED = 7


def share(store: Store, **how: bool) -> SharingStats:
    sharing = Sharing(store, **how)
    try:
        while sharing.step(1_000_000):
            pass
    finally:
        done = sharing.finish()
    return done


class Cell(NamedTuple):
    location: int
    users: int
    used: bool
    locked: bool


def _cell_off(file: MemoryFile, cell: int) -> int:
    """Behind 8 bytes for each slot, 4, and 8 for each 16."""
    (most,) = struct.unpack("<Q", os.pread(file.fd, 8, RECORD + 24))
    chunks = -(-most // 512)
    words = -(-chunks * 512 * 12 // PAGE) * PAGE
    cells = -(-(words + chunks * 256) // PAGE) * PAGE
    return file.superblock.user_off + cells + 8 * cell


def cell_of(file: MemoryFile, cell: int) -> Cell:
    (word,) = struct.unpack("<Q", os.pread(file.fd, 8, _cell_off(file, cell)))
    return Cell(word >> 24, word >> 8 & 0xFFFF, bool(word & 2), bool(word & 1))


def set_cell(file: MemoryFile, cell: int, word: int) -> None:
    assert os.pwrite(file.fd, struct.pack("<Q", word), _cell_off(file, cell)) == 8


def slot_word(slot: int, cell: int, prio: int = 0) -> int:
    """Of a slot that shares."""
    check = (slot + 1) * 0x9E3779B97F4A7C15 % (1 << 64) ^ (cell << 2 | prio)
    check ^= check >> 29
    check = check * 0xBF58476D1CE4E5B9 % (1 << 64) >> 50
    return cell << 24 | check << 10 | prio << 4 | SHARED << 1


def shared_cell(file: MemoryFile, slot: int) -> int | None:
    """The cell that a slot names; None: it shares nothing."""
    found = file.slot(slot)
    if found.type != "shared":
        return None
    return found.location
