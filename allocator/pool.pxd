# SPDX-License-Identifier: Apache-2.0
# Locks: see zspage.pxd.
"""C interface of a pool: its making, its end and its statistics."""
from libc.stdint cimport uint32_t, uint64_t

from allocator.arena cimport Arena
from allocator.frames cimport arena_t
from allocator.headroom cimport Headroom
from allocator.zspage cimport pool_ops_t, pool_t


cdef pool_t* pool_new(arena_t* a, uint32_t chain_max, const pool_ops_t* ops) noexcept nogil
# Ends the pool; waits for a migration that is under way. arena_stays: every zspage is freed, also those on
# the deferred list. Otherwise their frames go with the arena.
cdef void pool_delete(pool_t* pool, bint arena_stays) noexcept nogil
cdef list pool_classes(pool_t* pool)
cdef object pool_stats(pool_t* pool)


cdef class Pool:
    cdef pool_t* pool
    cdef readonly Arena arena
    cdef Headroom headroom      # or None; keeps what the pool points to
    cdef dict places            # stand-alone use: tag -> location

    cdef pool_t* open(self) except NULL
    cdef uint64_t find(self, tag) except? 0xffffffffffffffff
