# SPDX-License-Identifier: Apache-2.0
"""Makes units, and reads them in a memory file by the drawings in zramfs/store/unit.h and record.h alone."""
from __future__ import annotations

import os
import struct
from typing import NamedTuple

import zstandard

from tests.support.memory_file import MemoryFile
from zramfs.model.stats import UnitMakingStats
from zramfs.store.store import Store
from zramfs.store.unit_making import UnitMaking

PAGE = 4096
HEAD = struct.Struct("<HHHBbQ")
MOST_SLOTS_OFF = 1008 + 24  # in the superblock: that of the record, and of the field in it


def make_units(store: Store, **how: object) -> UnitMakingStats:
    making = UnitMaking(store, **how)
    try:
        while making.step(1_000_000):
            pass
    finally:
        done = making.finish()
    return done


class Word(NamedTuple):
    location: int
    live: int
    making: bool
    locked: bool


class Unit(NamedTuple):
    magic: int
    members: int
    size: int
    prio: int
    level: int
    serial: int
    parts: tuple[int, ...]  # locations
    stream: bytes
    tags: tuple[int, ...]  # of the head and the parts


def _word_off(file: MemoryFile, group: int) -> int:
    """Behind 8 bytes for each slot, and 4."""
    (most,) = struct.unpack("<Q", os.pread(file.fd, 8, MOST_SLOTS_OFF))
    before = -(-most // 512) * 512 * 12
    return file.superblock.user_off + -(-before // PAGE) * PAGE + 8 * group


def word_of(file: MemoryFile, group: int) -> Word:
    (word,) = struct.unpack("<Q", os.pread(file.fd, 8, _word_off(file, group)))
    return Word(word >> 24, word >> 8 & 0xFFFF, bool(word & 2), bool(word & 1))


def set_word(file: MemoryFile, group: int, word: int) -> None:
    assert os.pwrite(file.fd, struct.pack("<Q", word), _word_off(file, group)) == 8


def unit_of(file: MemoryFile, group: int) -> Unit:
    head, data = file.object(word_of(file, group).location)
    magic, members, size, prio, level, serial = HEAD.unpack_from(data)
    count = size // PAGE + (HEAD.size + 8 * (size // PAGE) + size % PAGE > PAGE)
    parts = struct.unpack_from(f"<{count}Q", data, HEAD.size)
    objects = [file.object(part) for part in parts]
    stream = b"".join(content for _, content in objects) + data[HEAD.size + 8 * count:]
    tags = (head.tag, *(each.tag for each, _ in objects))
    return Unit(magic, members, size, prio, level, serial, parts, stream, tags)


def unpacked(stream: bytes, dictionary: bytes | None = None) -> bytes:
    """By another build of zstd."""
    known = zstandard.ZstdCompressionDict(dictionary) if dictionary else None
    plain = zstandard.ZstdDecompressor(known, format=zstandard.FORMAT_ZSTD1_MAGICLESS)
    return plain.decompress(stream, max_output_size=1 << 16)
