# SPDX-License-Identifier: Apache-2.0
"""The memory of a store: its tables, and a workspace for each thread. It is made and freed here. No read or
write of a page comes through this file."""
from libc.stdint cimport uint32_t, uint64_t

from allocator.frames cimport arena_t
from zramfs.store.slots cimport store_ctx_t, store_t

# On an arena whose user region is user_bytes() long; without a codec yet, and to be recovered if the arena
# was adopted. NULL when address space or memory is short.
cdef store_t* store_new(arena_t* arena, uint64_t nr_slots, uint64_t most_slots) noexcept nogil
# Of a store with a reserve: makes slot table and chunk words resident, which they stay: 0 or -ENOMEM.
cdef int store_stay_ready(store_t* st) noexcept nogil
# The same of chunks [first, end), whose words are open.
cdef int slots_make_resident(store_t* st, uint64_t first, uint64_t end) noexcept nogil
# Of a store that is whole: writes what the record does not have yet, and last its magic.
cdef void record_finish(store_t* st) noexcept nogil
# Before a store is made in it. ValueError for one that holds a store.
cdef int clear_memory_file(int fd) except -1
cdef void store_delete(store_t* st) noexcept nogil
# (pageblocks that compaction could give back, of how many in use) and a StoreStats; both need the GIL.
cdef tuple store_winnable(store_t* st)
cdef object store_stats(store_t* st)
# NULL when memory is short. A context belongs to one store and one thread.
cdef store_ctx_t* store_ctx_new(store_t* st) noexcept nogil
cdef void store_ctx_free(store_ctx_t* ctx) noexcept nogil
# A workspace of a context for store_t.codec[prio]: 0 or -ENOMEM. The caller holds contexts_lock.
cdef int ctx_codec_new(store_t* st, store_ctx_t* ctx, uint32_t prio) noexcept nogil
