# SPDX-License-Identifier: Apache-2.0
"""Kernel zram with a compressor that the running kernel does not offer: its memory, worked out page by page.

Each page is compressed by itself, and put into a pool with the kernel's size classes, which are those of our
allocator: objects with a handle of 8 bytes in classes 16 bytes apart, zspages of up to 8 frames, and a whole
frame for what is longer than the last class. With lz4 the result is what the running kernel's zram says of
the same image; tests/benchmarks holds it to that.
"""
from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from allocator.arena import Arena
from allocator.pool import Pool
from benchmarks.load import PAGE
from benchmarks.memory import KERNEL_TABLE_BYTES
from benchmarks.tools import Interrupt
from zramfs.codecs.codec import Codec

BLOCK = 2 << 20
# The kernel writes the magic number and the size of the content into each frame, and we do not: 4 and 1 bytes
# more.
FRAME_BYTES = {"lz4": 0, "zstd": 5}


@dataclass(frozen=True)
class Simulated:
    """pool, tables: bytes, as in memory.py; cpu: seconds of the compressions alone."""

    pool: int
    tables: int
    cpu: float


def kernel_zram(image: Path, size: int, algo: str, interrupt: Interrupt) -> Simulated:
    """The first `size` bytes of the image, written once, at the kernel's default level of the algorithm."""
    codec, more = Codec(algo), FRAME_BYTES[algo]
    stored, cpu = 0, 0.0
    with open(image, "rb") as file, Arena(0, size // BLOCK * 2 + 8) as arena:
        pool = Pool(arena)
        for number in range(size // PAGE):
            if number % 1024 == 0:
                interrupt.check()
            page = file.read(PAGE)
            if same_filled(page):
                # It takes no room in the pool, but counts as stored, and has its entry in the table.
                stored += 1
                continue
            began = time.thread_time()
            packed = codec.compress(page)
            cpu += time.thread_time() - began
            raw = packed is None or len(packed) + more >= pool.huge_size
            pool.malloc(number, page if raw or packed is None else packed + bytes(more))
            stored += 1
        return Simulated(pool.stats().pages * PAGE, stored * KERNEL_TABLE_BYTES, cpu)


def same_filled(page: bytes) -> bool:
    """One word of 8 bytes over and over, which zram keeps in its table."""
    return page == page[:8] * (len(page) // 8)
