# SPDX-License-Identifier: Apache-2.0
# Locks of migration, outermost first:
#   arena_t.migrate_lock    one migration at a time; taken while nothing is held
#   the page lock           PG_LOCKED in page_desc_t.flags
#   what an owner's calls take
#   the other locks of the arena (frames.pxd)
# Rule:
#   - A thread may wait for a page lock only if it holds no other lock than migrate_lock.
"""C interface of the movable-page core, which knows nothing of what is in a page."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from allocator.frames cimport arena_t, page_owner_t
from allocator.layout cimport migrate_stats_t


# One compaction run: the pageblocks in use, the sparsest first. The migrate scanner goes up from the
# sparse end and the free scanner goes down from the full end, until they meet.
cdef struct compact_run_t:
    uint32_t* blocks
    uint32_t nr_blocks
    uint32_t migrate_pos
    uint32_t free_pos
    uint32_t cursor             # of the free scanner inside its pageblock
    uint32_t freed              # pageblocks emptied so far


# An owner is registered before its first page becomes movable. False: another has this number. It is
# unregistered when it has no movable page any more, or before it takes them all back. Unregistering
# waits for a migration that is under way.
cdef bint owner_register(arena_t* a, uint8_t owner, const page_owner_t* ops) noexcept nogil
cdef void owner_unregister(arena_t* a, uint8_t owner) noexcept nogil

cdef bint page_trylock(arena_t* a, uint32_t frame) noexcept nogil
cdef void page_lock(arena_t* a, uint32_t frame) noexcept nogil
cdef void page_unlock(arena_t* a, uint32_t frame) noexcept nogil
# The page is complete. Either it is locked, or no other thread can reach it yet.
cdef void set_page_movable(arena_t* a, uint32_t frame, uint8_t owner, uint32_t ref) noexcept nogil
# Ends the ownership of a locked page. True: the caller has to free the page. False: the page is isolated
# and keeps its mark, and the core frees it.
cdef bint clear_page_movable(arena_t* a, uint32_t frame) noexcept nogil

# Moves everything out of frames [first, first + n) of one isolated pageblock. 0: all are free. -EBUSY or
# -ENOMEM: some had to stay, and were put back.
cdef int migrate_range(arena_t* a, migrate_stats_t* stats, uint32_t first, uint32_t n,
                       compact_run_t* run) noexcept nogil

# Isolates the pageblock around a range of frames that could be emptied: 0 or -EBUSY.
cdef int isolate_range(arena_t* a, migrate_stats_t* stats, uint32_t first, uint32_t n) noexcept nogil

cdef int alloc_contig_range(arena_t* a, migrate_stats_t* stats, uint32_t first, uint32_t n,
                            uint8_t owner, uint32_t ref) noexcept nogil
cdef uint32_t alloc_contig(arena_t* a, migrate_stats_t* stats, int order, uint8_t owner,
                           uint32_t ref) noexcept nogil
