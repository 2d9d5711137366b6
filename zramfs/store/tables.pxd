# SPDX-License-Identifier: Apache-2.0
"""The memory of a store: its tables, and a workspace for each thread. It is made and freed here. No read or
write of a page comes through this file."""
from libc.stdint cimport uint64_t

from allocator.frames cimport arena_t
from zramfs.store.slots cimport store_ctx_t, store_t

# On an arena whose user region has a page for each chunk of most_slots; without a codec yet. NULL when
# address space or memory is short.
cdef store_t* store_new(arena_t* arena, uint64_t nr_slots, uint64_t most_slots) noexcept nogil
cdef void store_delete(store_t* st) noexcept nogil
# A StoreStats; needs the GIL.
cdef object store_stats(store_t* st)
# NULL when memory is short. A context belongs to one store and one thread.
cdef store_ctx_t* store_ctx_new(store_t* st) noexcept nogil
cdef void store_ctx_free(store_ctx_t* ctx) noexcept nogil
