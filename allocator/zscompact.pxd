# SPDX-License-Identifier: Apache-2.0
# Locks: see zspage.pxd.
"""C interface of object compaction."""
from libc.stdint cimport uint32_t, uint64_t

from allocator.zspage cimport pool_t

# Through all classes: pool pages that were freed.
cdef uint64_t zs_compact(pool_t* pool) noexcept nogil
# From the first class on, until the clock says so: the class where the next slice goes on, nr_classes at the
# end.
cdef uint32_t zs_compact_slice(pool_t* pool, uint32_t first, uint64_t until) noexcept nogil
# Pool pages that object compaction could free.
cdef uint64_t zs_freeable(pool_t* pool) noexcept nogil
