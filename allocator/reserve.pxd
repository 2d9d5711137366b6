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


# A thread that takes no signal: 0 or an errno. It begins with become_keeper(), and ends by pthread_join.
cdef int start_keeper(unsigned long* thread, void* (*work)(void*) noexcept nogil, void* arg,
                      const char* name) noexcept nogil
# Makes the calling thread's stack resident, and puts it first among those that want a CPU: a reserve must
# not be the one that waits.
cdef void become_keeper() noexcept nogil
