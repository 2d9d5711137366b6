# SPDX-License-Identifier: Apache-2.0
"""C interface of the store, for the lane. Every function is thread-safe, takes no GIL and makes
no Python object. Results: 0 or a count, or a negative errno."""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from allocator.arena cimport Arena
from allocator.balloon cimport Balloon
from allocator.migrate cimport Migration
from allocator.reserve cimport Reserve
from zramfs.backing cimport Backing
from zramfs.slots cimport store_ctx_t, store_t

# NULL when memory is short. A context belongs to one store and one thread.
cdef store_ctx_t* store_ctx_new(store_t* st) noexcept nogil
cdef void store_ctx_free(store_ctx_t* ctx) noexcept nogil

# Any byte range; the caller has cut it to the device's size (-EINVAL otherwise).
# Read: all of it or -EIO. Write: pages are committed in order; on an error *done says how many
# bytes are on the device (they stay), the rest holds its old data. -ENOSPC when the pool is full.
# -EAGAIN: a page is on the backing store, for which the context may not wait. The same call with
# one that may goes on where this one stopped, if it gets its *done (0 at first).
cdef int store_read(store_t* st, store_ctx_t* ctx, uint64_t off, uint8_t* buf, uint64_t n) noexcept nogil
cdef int store_write(store_t* st, store_ctx_t* ctx, uint64_t off, const uint8_t* buf, uint64_t n,
                     uint64_t* done) noexcept nogil
# Discard and zero are the same for a file: whole pages freed, partial head and tail zeroed.
cdef int store_zero(store_t* st, store_ctx_t* ctx, uint64_t off, uint64_t n, uint64_t* done) noexcept nogil
# Offset of the next data (hole=False) or hole (hole=True) at or after off; -ENXIO past the end.
cdef int64_t store_seek(store_t* st, uint64_t off, bint hole) noexcept nogil
cdef uint64_t store_disksize(store_t* st) noexcept nogil
# For STATFS: bytes of the device that hold data.
cdef uint64_t store_data_bytes(store_t* st) noexcept nogil


cdef class Store:
    cdef store_t* st                # NULL once closed
    cdef Arena arena
    cdef readonly Migration migration
    cdef readonly Balloon balloon
    cdef readonly Backing backing   # or None
    cdef Reserve reserve            # None without one
    cdef store_ctx_t* idle_ctx[8]   # contexts for calls from Python; guarded by the GIL
    cdef int nr_idle_ctx
    cdef uint32_t compact_class     # where the next slice of object compaction goes on
    cdef bint post_processing       # one is under way; guarded by the GIL
    cdef object __weakref__
    cdef readonly str algo
    cdef readonly object level
    cdef readonly tuple codecs      # by priority, NR_PRIO of them; keeps their dictionaries alive

    cdef store_ctx_t* take_ctx(self) except NULL
    cdef int put_ctx(self, store_ctx_t* ctx) except -1
    cdef int check_range(self, off, n) except -1
    # Around a post-processing (see slots.pxd). begin raises OSError(EBUSY) beside another one.
    cdef int begin_post(self) except -1
    cdef int end_post(self) except -1
