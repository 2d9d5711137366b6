# SPDX-License-Identifier: Apache-2.0
# Lock order: the lock of a cell (bit 0 of its word) stands where that of a unit's word does, between the slot
# lock and the locks of the pool. No thread has both. It is held for the copy of one object. Object
# compaction, which holds a class lock, only tries it.
"""Objects that several slots share: their cells (shared.h draws them).

Who changes what:
  - One thread at a time makes cells and lets slots join them (Store.begin_post). So a cell that has become
    free is not used again beneath that thread.
  - users goes up before a slot gets the value that names the cell, and down after the slot has lost it. So it
    is never less than the slots that name the cell. The thread that brings it to 0 frees the object.
  - The bytes of an object never change. A slot that is locked keeps its object.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from allocator.zspage cimport pool_t

cdef extern from "shared.h" nogil:
    enum:
        CELL_USERS_SHIFT, CELL_LOC_SHIFT
    const uint64_t CELL_LOCK
    const uint64_t CELL_USED
    const uint64_t CELL_MOST_USERS
    const uint64_t SHARED_TAG
    uint64_t shared_check(uint64_t slot, uint64_t cell, uint32_t prio) noexcept

cdef extern from *:
    """
    #define NO_CELL (~0ull)
    """
    const uint64_t NO_CELL


cdef struct shared_t:
    # constant
    pool_t* pool
    uint64_t* cells             # words: atomic, each guarded by its lock bit
    uint64_t nr_cells           # that there is address space for
    # of the one thread that makes cells
    uint64_t high               # cells from here on were never used since the store was made or adopted
    uint64_t cursor             # where the search for a free one goes on
    # statistics: atomic, relaxed
    uint64_t objects
    uint64_t pages              # slots of type SHARED
    uint64_t nbytes             # of the objects


cdef inline uint64_t cell_loc(uint64_t w) noexcept nogil:
    return w >> CELL_LOC_SHIFT

cdef inline uint32_t cell_users(uint64_t w) noexcept nogil:
    return <uint32_t>((w >> CELL_USERS_SHIFT) & CELL_MOST_USERS)

# The object of a cell to dst, which has room for a page: its bytes, or 0. The caller keeps the cell in use,
# by a slot that it has locked or by shared_hold(). For NO_CELL it is 0, and counts as damage.
cdef uint32_t shared_fetch(shared_t* s, uint64_t cell, uint8_t* dst) noexcept nogil
# One user less. The caller has taken the cell from a slot, or held it.
cdef void shared_leave(shared_t* s, uint64_t cell) noexcept nogil
# One user more. False: the cell is free, or has as many as it can have.
cdef bint shared_hold(shared_t* s, uint64_t cell) noexcept nogil

# For the thread that makes cells. A number whose cell is free; NO_CELL: there is none. The caller sees to it
# that the cell has memory before the next step.
cdef uint64_t cell_choose(shared_t* s) noexcept nogil
# A new object in that cell, held once: 0, or -ENOSPC, -ENOMEM.
cdef int shared_make(shared_t* s, uint64_t cell, const uint8_t* data, uint32_t size,
                     uint32_t over) noexcept nogil

# Object compaction's hooks: see slots.pxd. tag: of a shared object.
cdef bint shared_pin(shared_t* s, uint64_t tag, uint64_t loc) noexcept nogil
cdef void shared_moved(shared_t* s, uint64_t tag, uint64_t loc) noexcept nogil
