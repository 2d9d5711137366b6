# SPDX-License-Identifier: Apache-2.0
"""Discards of random pages, on a file or a block device."""
from __future__ import annotations

import ctypes
import fcntl
import os
import random
import stat
import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.load import PAGE, Zone
from benchmarks.tools import Interrupt

BLKDISCARD = 0x1277  # <linux/fs.h>
PUNCH_HOLE_KEEP_SIZE = 3  # <linux/falloc.h>
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Disk:
    """The path of a peer, opened for discards."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._is_device = stat.S_ISBLK(os.fstat(self._fd).st_mode)

    def discard(self, offset: int, length: int) -> None:
        """Both multiples of 4096. Raises OSError."""
        if self._is_device:
            fcntl.ioctl(self._fd, BLKDISCARD, struct.pack("QQ", offset, length))
        elif _libc.fallocate(self._fd, PUNCH_HOLE_KEEP_SIZE, offset, length):
            error = ctypes.get_errno()
            raise OSError(error, f"{os.strerror(error)}: discard of {length} bytes at {offset}")

    def close(self) -> None:
        os.close(self._fd)


def runs(pages: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(first, number) of the runs of neighbours in sorted page numbers: a request each, as of a trim."""
    first = last = None
    for page in pages:
        if last is not None and page == last + 1:
            last = page
            continue
        if first is not None and last is not None:
            yield first, last - first + 1
        first = last = page
    if first is not None and last is not None:
        yield first, last - first + 1


def random_pages(zone: Zone, share: float, seed: int) -> list[int]:
    """Sorted numbers of a random share of the zone's pages, counted from the beginning of the device."""
    first, count = zone.offset // PAGE, zone.size // PAGE
    return sorted(random.Random(seed).sample(range(first, first + count), int(count * share)))


def discard_random(path: Path, zone: Zone, share: float, seed: int, interrupt: Interrupt) -> float:
    """Discards a random share of the zone's pages: the seconds that it took."""
    disk = Disk(path)
    try:
        began = time.monotonic()
        for number, (first, count) in enumerate(runs(random_pages(zone, share, seed))):
            if number % 256 == 0:
                interrupt.check()
            disk.discard(first * PAGE, count * PAGE)
        return time.monotonic() - began
    finally:
        disk.close()
