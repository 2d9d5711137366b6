# SPDX-License-Identifier: Apache-2.0
# Locks: see zspage.pxd.
"""C interface of object compaction."""
from libc.stdint cimport uint32_t, uint64_t

from allocator.zspage cimport pool_t, size_class_t

# Both return the number of pool pages that they have freed. The first works on one class, and empties at
# most max_zspages; *more says whether it stopped at that number. The second works on all classes.
cdef uint64_t zs_compact_class(pool_t* pool, size_class_t* c, uint32_t max_zspages, bint* more) noexcept nogil
cdef uint64_t zs_compact(pool_t* pool) noexcept nogil
# Pool pages that object compaction could free.
cdef uint64_t zs_freeable(pool_t* pool) noexcept nogil
