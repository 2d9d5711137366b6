# SPDX-License-Identifier: Apache-2.0
# Locks: see zspage.pxd.
"""C interface of zsmalloc, the allocator of objects of 1 to 4096 bytes in size classes."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from allocator.layout cimport zspage_desc_t
from allocator.zspage cimport pool_t, size_class_t


# A place for size bytes, named tag: 0 and *loc; -ENOSPC at the limit, -ENOMEM, -EINVAL.
cdef int zs_malloc(pool_t* pool, uint32_t size, uint64_t tag, uint64_t* loc) noexcept nogil
# The same, where the pool may take up to over pages more than its limit: for a smaller object that
# takes the place of a larger one.
cdef int zs_malloc_over(pool_t* pool, uint32_t size, uint64_t tag, uint32_t over,
                        uint64_t* loc) noexcept nogil
# Frees it: its size in bytes, or -EIO if loc names no object.
cdef int zs_free(pool_t* pool, uint64_t loc) noexcept nogil
# Fills an object that was just allocated, and that no other thread knows yet.
cdef int zs_write(pool_t* pool, uint64_t loc, const uint8_t* src, uint32_t n) noexcept nogil
# The bytes of an object until zs_unmap(); NULL if loc names none. scratch (4096 bytes) is used
# when the object straddles two frames that are no neighbours.
cdef const uint8_t* zs_map(pool_t* pool, uint64_t loc, uint8_t* scratch, uint32_t* size) noexcept nogil
cdef void zs_unmap(pool_t* pool, uint64_t loc) noexcept nogil
# One write to wake_fd when n more objects have been freed.
cdef void zs_wake_after(pool_t* pool, uint64_t n) noexcept nogil
# Frees the zspages on the deferred list, and waits for the locks of their pages. Returns their number.
cdef uint32_t zs_flush_deferred(pool_t* pool) noexcept nogil

# For code that empties zspages. zspage_free: frees an empty one that stands in no list and is no longer
# counted in its class. It never waits: where a page of it is locked, the zspage goes to the deferred list.
cdef void zspage_free(pool_t* pool, size_class_t* c, uint32_t number) noexcept nogil
cdef void zspage_defer_free(pool_t* pool, uint32_t number) noexcept nogil
# The two halves of zspage_free(), for the pool's end.
cdef bint zspage_disown_pages(pool_t* pool, size_class_t* c, zspage_desc_t* z, bint wait) noexcept nogil
cdef void zspage_delete(pool_t* pool, size_class_t* c, uint32_t number) noexcept nogil
