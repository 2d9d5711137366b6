# SPDX-License-Identifier: Apache-2.0
"""Memory for small objects that can be compacted, moved and given back to the OS.

An Arena is one memory file cut into 4 KiB frames; a Pool packs objects of 1 to 4096 bytes into its
frames, by size class (zsmalloc); Migration empties sparse 2 MiB pageblocks, whose memory then
returns to the OS; a Balloon keeps frames from the pool; a Headroom stops the pool's growth where the host
or a memory cgroup would run short. Device, file system and policy are not
known here. The compiled modules have C interfaces in their .pxd files.

    >>> from allocator import Arena, Pool
    >>> from allocator.check import check
    >>> pool = Pool(Arena(user_size=0, nr_pageblocks=64))
    >>> pool.malloc(1, b"an object, named 1")
    >>> pool.read(1)
    b'an object, named 1'
    >>> check(pool, level=2)

allocator.check.check() is not repeated here: `allocator.check` is the module.
"""
from allocator.arena import Arena
from allocator.balloon import Balloon
from allocator.check import CheckError
from allocator.compaction import Migration
from allocator.headroom import Headroom
from allocator.pool import Pool
from allocator.reserve import Reserve
from allocator.stats import (
    ArenaStats,
    BalloonStats,
    ClassStats,
    CompactionStats,
    HeadroomStats,
    PageblockStats,
    PoolStats,
)

__all__ = [
    "Arena",
    "ArenaStats",
    "Balloon",
    "BalloonStats",
    "CheckError",
    "ClassStats",
    "CompactionStats",
    "Headroom",
    "HeadroomStats",
    "Migration",
    "PageblockStats",
    "Pool",
    "PoolStats",
    "Reserve",
]
