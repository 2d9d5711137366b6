# SPDX-License-Identifier: Apache-2.0
# No locks: nothing else is at work on the arena and the pool yet.
"""C interface of recovery: an arena that was adopted, and a new pool on it, become whole."""
from libc.stdint cimport uint32_t, uint64_t

from allocator.zspage cimport pool_t


# What the pool's user says of an allocated object with this tag and size at this location: True if it names
# it. Called once for each such object, and for no other.
ctypedef bint (*object_named_t)(void* ctx, uint64_t tag, uint64_t loc, uint32_t size) noexcept nogil


cdef struct pool_recovery_t:
    uint64_t objects            # that the user names
    uint64_t objects_freed      # that were allocated, and that it does not name
    uint64_t zspages
    uint64_t zspages_freed      # without an object
    uint64_t zspages_damaged    # whose class or frames can't be right: all their objects are lost
    uint64_t frames_freed       # used ones that no zspage lists: of an interrupted allocation or migration
    uint64_t pageblocks         # in use
    uint64_t pageblocks_freed   # whole free ones that held memory


# Rebuilds everything volatile of the pool (new, made on an arena that arena_adopt() gave) and of its arena.
# keep: so many whole free pageblocks keep their memory, for a reserve that is made next; where it is not 0
# the free frames of the pageblocks in use get their memory too. Not to be undone and not to be run twice on a
# pool; killed half way, the file can be adopted and recovered again.
cdef void pool_recover(pool_t* pool, object_named_t named, void* ctx, uint64_t keep,
                       pool_recovery_t* found) noexcept nogil
