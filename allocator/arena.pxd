# SPDX-License-Identifier: Apache-2.0
# Locks: see frames.pxd.
"""C interface of the arena: its making, its end and its statistics."""
from libc.stdint cimport uint64_t

from allocator.frames cimport arena_t


cdef arena_t* arena_new(uint64_t user_size, uint64_t nr_pageblocks) noexcept nogil
cdef void arena_delete(arena_t* a) noexcept nogil
cdef tuple arena_buddyinfo(arena_t* a)
cdef object arena_stats(arena_t* a)


cdef class Arena:
    cdef arena_t* a     # NULL once closed

    cdef arena_t* open(self) except NULL
