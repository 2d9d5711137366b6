# SPDX-License-Identifier: Apache-2.0
# Locks, outermost first: the page lock, balloon_t.lock, the locks of the arena (frames.pxd).
"""C interface of the balloon: frames kept from the pool so that the host has their memory."""
from libc.stdint cimport uint32_t, uint64_t

from allocator.arena cimport Arena
from allocator.frames cimport arena_t
from allocator.prim cimport pthread_mutex_t


cdef struct balloon_t:
    arena_t* arena
    pthread_mutex_t lock
    # guarded by lock
    uint32_t head               # list of frames, by page_desc_t.next and prev
    uint64_t pages              # all, also isolated ones
    uint64_t isolated           # those that the migration core has taken for a move
    uint64_t migrated           # since creation


cdef class Balloon:
    cdef readonly Arena arena
    cdef balloon_t b
    cdef bint registered
