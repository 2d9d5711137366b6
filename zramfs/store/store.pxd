# SPDX-License-Identifier: Apache-2.0
"""The store of a device, for Python; the lane uses ranges.pxd and tables.pxd."""
from libc.stdint cimport uint32_t

from allocator.arena cimport Arena
from allocator.balloon cimport Balloon
from allocator.compaction cimport Migration
from allocator.headroom cimport Headroom
from allocator.reserve cimport Reserve
from zramfs.store.backing cimport Backing
from zramfs.store.slots cimport store_ctx_t, store_t


cdef class Store:
    cdef store_t* st                # NULL once closed
    cdef Arena arena
    cdef readonly Migration migration
    cdef readonly Balloon balloon
    cdef readonly Backing backing   # or None
    cdef Reserve reserve            # None without one
    cdef Headroom headroom          # or None; keeps what the pool points to
    cdef store_ctx_t* idle_ctx[8]   # contexts for calls from Python; guarded by the GIL
    cdef int nr_idle_ctx
    cdef uint32_t compact_class     # where the next slice of object compaction goes on
    cdef bint post_processing       # one is under way; guarded by the GIL
    cdef bint resizing              # the same, of resize.pyx
    cdef bint saving_run            # the same, of saving.pyx
    cdef object __weakref__
    cdef readonly str algo
    cdef readonly object level
    cdef readonly object recovered  # RecoveryStats; None unless it was adopted
    cdef readonly tuple codecs      # by priority, NR_PRIO of them; keeps their dictionaries alive
    cdef readonly tuple generations     # by priority: 0, or the number of what was taken in use (secondary)

    cdef store_ctx_t* take_ctx(self) except NULL
    cdef int end(self, bint left) except -1
    cdef int put_ctx(self, store_ctx_t* ctx) except -1
    cdef int check_range(self, off, n) except -1
    # Around a post-processing (see slots.pxd). begin raises OSError(EBUSY) beside another one.
    cdef int begin_post(self) except -1
    cdef int end_post(self) except -1
