# SPDX-License-Identifier: Apache-2.0
"""The reserve of an arena, and the thread that keeps it."""
from allocator.arena cimport Arena
from allocator.frames cimport arena_t

cdef struct keeper_t:           # constant while the thread runs
    arena_t* arena
    unsigned long thread
    bint running


cdef class Reserve:
    cdef Arena arena
    cdef keeper_t keeper
