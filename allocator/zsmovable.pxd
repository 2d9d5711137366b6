# SPDX-License-Identifier: Apache-2.0
# Locks: see zspage.pxd.
"""What zsmalloc answers as an owner of movable pages; contracts in migrate.pyx. ctx is the pool."""
from libc.stdint cimport uint32_t

cdef bint zs_isolate(void* ctx, uint32_t frame) noexcept nogil
cdef int zs_migrate(void* ctx, uint32_t new, uint32_t old) noexcept nogil
cdef void zs_putback(void* ctx, uint32_t frame) noexcept nogil
