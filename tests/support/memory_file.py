# SPDX-License-Identifier: Apache-2.0
"""Reads, and damages, a pool's memory file, by the drawings in allocator/layout.h and
zramfs/store/slots.pxd alone: a second statement of the layout."""
from __future__ import annotations

import os
import struct
from typing import NamedTuple

FRAME = 4096
SLOT_TYPES = ("empty", "same", "same_obj", "obj", "huge", "written_back", "unit", "shared")
SLOT_LOCK = 1
FLAGS = {"locked": 0, "idle": 6, "incompressible": 7, "post": 8, "halves": 9}


class Superblock(NamedTuple):
    magic: int
    version: int
    chain_max: int
    user_off: int
    user_size: int
    pageblock_off: int
    page_off: int
    zspage_off: int
    frames_off: int
    nr_pageblocks: int
    file_size: int


class Pageblock(NamedTuple):
    nr_free: int
    flags: int
    skip: int
    defer: int
    next: int
    ready: int


class Page(NamedTuple):
    flags: int
    order: int
    owner: int
    ref: int
    next: int
    prev: int


class Zspage(NamedTuple):
    frames: tuple[int, ...]
    next: int
    prev: int
    inuse: int
    freeobj: int
    magic: int
    class_idx: int
    fullness: int
    rwlock: int
    isolated: int
    huge_header: int


class Header(NamedTuple):
    tag: int
    size: int
    allocated: bool


class Slot(NamedTuple):
    location: int  # or the word of a same-filled page
    type: str
    halves: bool
    locked: bool
    prio: int
    idle: bool
    incompressible: bool
    post: bool


SUPERBLOCK = struct.Struct("<QII8Q")
PAGEBLOCK = struct.Struct("<HHHHII")
PAGE = struct.Struct("<HBBIII")
ZSPAGE = struct.Struct("<8I II HHHBB iI Q")
WORD = struct.Struct("<Q")
RECORD = 1008  # offset of the store's record in the superblock


class MemoryFile:
    """fd: the memory file's descriptor, which stays its owner's."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.superblock = Superblock(*self._get(SUPERBLOCK, 0))

    def _get(self, form: struct.Struct, off: int) -> tuple:
        return form.unpack(os.pread(self.fd, form.size, off))

    def put(self, form: struct.Struct, off: int, fields: tuple) -> None:
        assert os.pwrite(self.fd, form.pack(*fields), off) == form.size

    def set_size(self, nr_slots: int) -> None:
        """Of the device: what a resize stores in the record (zramfs/store/record.h)."""
        _, _, wipe, _, most, has_backing = struct.unpack("<QIIQQI", os.pread(self.fd, 36, RECORD))
        (key,) = self._get(WORD, RECORD + 96)
        check = 0
        for word in (nr_slots, most, has_backing << 32 | wipe, key):
            check = (check ^ word) * 0x9E3779B97F4A7C15 % (1 << 64)
            check ^= check >> 32
        self.put(WORD, RECORD + 16, (nr_slots | check >> 37 << 37,))

    def resident(self) -> int:
        """Bytes of memory that the file holds now."""
        return os.fstat(self.fd).st_blocks * 512

    def pageblock_off(self, n: int) -> int:
        return self.superblock.pageblock_off + n * PAGEBLOCK.size

    def page_off(self, n: int) -> int:
        return self.superblock.page_off + n * PAGE.size

    def zspage_off(self, n: int) -> int:
        return self.superblock.zspage_off + n * ZSPAGE.size

    def frame_off(self, n: int) -> int:
        return self.superblock.frames_off + n * FRAME

    def slot_off(self, n: int) -> int:
        return self.superblock.user_off + n * WORD.size

    def pageblock(self, n: int) -> Pageblock:
        return Pageblock(*self._get(PAGEBLOCK, self.pageblock_off(n)))

    def page(self, n: int) -> Page:
        return Page(*self._get(PAGE, self.page_off(n)))

    def zspage(self, n: int) -> Zspage:
        fields = self._get(ZSPAGE, self.zspage_off(n))
        return Zspage(fields[:8], *fields[8:])

    def set_pageblock(self, n: int, value: Pageblock) -> None:
        self.put(PAGEBLOCK, self.pageblock_off(n), value)

    def set_page(self, n: int, value: Page) -> None:
        self.put(PAGE, self.page_off(n), value)

    def set_zspage(self, n: int, value: Zspage) -> None:
        self.put(ZSPAGE, self.zspage_off(n), (*value.frames, *value[1:]))

    def object_bytes(self, zspage: Zspage, off: int, n: int) -> bytes:
        """n bytes at off of the zspage's frames, taken as one piece."""
        out = b""
        while n:
            frame, start = divmod(off, FRAME)
            piece = min(n, FRAME - start)
            out += os.pread(self.fd, piece, self.frame_off(zspage.frames[frame]) + start)
            off += piece
            n -= piece
        return out

    def header_off(self, location: int, class_size: int) -> int:
        """Where the header word of an object lies in the file."""
        number, index = location >> 8, location & 0xFF
        if class_size == FRAME:
            return self.zspage_off(number) + ZSPAGE.size - WORD.size
        frame, start = divmod(index * class_size, FRAME)
        return self.frame_off(self.zspage(number).frames[frame]) + start

    def object(self, location: int) -> tuple[Header, bytes]:
        zspage = self.zspage(location >> 8)
        size = 32 + 16 * zspage.class_idx
        (word,) = self._get(WORD, self.header_off(location, size))
        header = Header(word >> 16, word >> 1 & 0x3FFF, bool(word & 1))
        start = 0 if size == FRAME else (location & 0xFF) * size + WORD.size
        return header, self.object_bytes(zspage, start, header.size)

    def slot_word(self, n: int) -> int:
        return self._get(WORD, self.slot_off(n))[0]

    def set_slot_word(self, n: int, word: int) -> None:
        self.put(WORD, self.slot_off(n), (word,))

    def slot(self, n: int) -> Slot:
        word = self.slot_word(n)
        flag = {name: bool(word & 1 << bit) for name, bit in FLAGS.items()}
        return Slot(location=word >> 24, type=SLOT_TYPES[word >> 1 & 7], prio=word >> 4 & 3, **flag)


def resident_set() -> int:
    """Bytes of memory that this process has mapped and present."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
