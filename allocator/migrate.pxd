# SPDX-License-Identifier: Apache-2.0
# Lock order: arena_t.migrate_lock (one migration at a time; outermost, taken with nothing held), the
# page lock (PG_LOCKED; waited for only by a thread that holds no other lock but migrate_lock), then
# whatever an owner's calls take, then arena_t.lock.
"""C interface of the movable-page core: it knows nothing of what is in a page."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from allocator.frames cimport arena_t, page_owner_t


cdef struct migrate_stats_t:
    uint64_t runs               # compaction runs begun
    uint64_t scanned            # frames looked at
    uint64_t isolated
    uint64_t migrated
    uint64_t owner_gone         # freed by their owner after isolation
    uint64_t unmovable          # ranges with a frame that no owner can move
    uint64_t busy               # page lock or owner said not now
    uint64_t again              # -EAGAIN until the last pass
    uint64_t refused            # any other error of the owner
    uint64_t no_target          # no free frame to move to
    uint64_t put_back
    uint64_t blocks_freed       # pageblocks emptied by compaction
    uint64_t deferred           # pageblocks passed by because they failed lately
    uint64_t ns                 # time in compaction runs


# One compaction run: the pageblocks in use, sparsest first. The migrate scanner goes up from the
# sparse end, the free scanner down from the full end, until they meet.
cdef struct compact_run_t:
    uint32_t* blocks
    uint32_t nr_blocks
    uint32_t migrate_pos
    uint32_t free_pos
    uint32_t cursor             # of the free scanner inside its pageblock
    uint32_t freed              # pageblocks emptied so far


# An owner is registered before its first page becomes movable, and unregistered after its last one
# has ceased to be, or before it takes them all back; the latter waits for a migration under way.
# False: the number is taken.
cdef bint owner_register(arena_t* a, uint8_t owner, const page_owner_t* ops) noexcept nogil
cdef void owner_unregister(arena_t* a, uint8_t owner) noexcept nogil

cdef bint page_trylock(arena_t* a, uint32_t frame) noexcept nogil
cdef void page_lock(arena_t* a, uint32_t frame) noexcept nogil
cdef void page_unlock(arena_t* a, uint32_t frame) noexcept nogil
# The page is complete and not reachable by anyone else yet, or locked.
cdef void set_page_movable(arena_t* a, uint32_t frame, uint8_t owner, uint32_t ref) noexcept nogil
# The page is locked; ends its ownership. An isolated page keeps the mark, and is then freed by the
# core: True says that the caller has to free it.
cdef bint clear_page_movable(arena_t* a, uint32_t frame) noexcept nogil

# Moves everything out of frames [first, first + n) of one isolated pageblock. 0 when all are free;
# -EBUSY or -ENOMEM when some had to stay, and were put back.
cdef int migrate_range(arena_t* a, migrate_stats_t* stats, uint32_t first, uint32_t n,
                       compact_run_t* run) noexcept nogil

# Isolates the pageblock around a range of frames that could be emptied: 0 or -EBUSY.
cdef int isolate_range(arena_t* a, migrate_stats_t* stats, uint32_t first, uint32_t n) noexcept nogil

cdef int alloc_contig_range(arena_t* a, migrate_stats_t* stats, uint32_t first, uint32_t n,
                            uint8_t owner, uint32_t ref) noexcept nogil
cdef uint32_t alloc_contig(arena_t* a, migrate_stats_t* stats, int order, uint8_t owner,
                           uint32_t ref) noexcept nogil
