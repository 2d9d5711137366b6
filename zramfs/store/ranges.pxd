# SPDX-License-Identifier: Apache-2.0
"""C interface of a device's data, for the lane. Every function is thread-safe, takes no GIL and makes
no Python object. Results: 0 or a count, or a negative errno."""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from zramfs.store.slots cimport store_ctx_t, store_t

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

# See Store.set_overdraft().
cdef void store_set_overdraft(store_t* st, uint32_t pages, uint32_t reserve) noexcept nogil
