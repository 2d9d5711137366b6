# SPDX-License-Identifier: Apache-2.0
"""C interface of the reserve of an arena."""
from allocator.arena cimport Arena
from allocator.frames cimport arena_t


cdef struct filler_t:           # constant while the thread runs
    arena_t* arena
    unsigned long thread
    bint running


cdef class Reserve:
    cdef readonly Arena arena
    cdef filler_t filler

    cdef void _give_up(self) noexcept
