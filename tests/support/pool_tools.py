# SPDX-License-Identifier: Apache-2.0
"""What the tests of the pool share."""
import random

from allocator import Arena, ClassStats, Pool
from tests.support import models
from tests.support.models import SizeClass

FRAME = 4096


def pattern(tag: int, size: int) -> bytes:
    """Bytes that belong to this object alone, at every offset."""
    return random.Random(tag << 16 | size).randbytes(size)


def used_classes(pool: Pool) -> dict[int, ClassStats]:
    return {c.size: c for c in pool.classes() if c.obj_allocated}


def largest(c: SizeClass) -> int:
    """Bytes of the largest object that goes into the class."""
    return FRAME if c.size == FRAME else c.size - models.OBJ_HEADER


def scatter(arena: Arena) -> None:
    """Leaves only every second frame of the first pageblocks free, so that no zspage has neighbours."""
    frames = sorted(arena.alloc() for _ in range(2 * models.PAGEBLOCK_FRAMES))
    for frame in frames[::2]:
        arena.free(frame)
