# SPDX-License-Identifier: Apache-2.0
# Locks: see zspage.pxd.
"""C interface of object compaction."""
from libc.stdint cimport uint32_t, uint64_t

from allocator.zspage cimport pool_t, size_class_t

# Object compaction: pool pages freed. One class, at most max_zspages emptied (*more says whether
# it stopped there), or all of them to the end.
cdef uint64_t zs_compact_class(pool_t* pool, size_class_t* c, uint32_t max_zspages, bint* more) noexcept nogil
cdef uint64_t zs_compact(pool_t* pool) noexcept nogil
# Pool pages that object compaction could free.
cdef uint64_t zs_freeable(pool_t* pool) noexcept nogil
