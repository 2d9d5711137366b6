# SPDX-License-Identifier: Apache-2.0
# Lock order: arena_t.migrate_lock is the outermost lock of the allocator (migrate.pyx), arena_t.lock
# the innermost lock of the whole program; nothing is taken under it.
"""C interface of the arena: page frames in pageblocks of one memory file."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from allocator.layout cimport (
    FRAME_SHIFT, NR_ORDERS, NR_OWNERS, page_desc_t, pageblock_desc_t, superblock_t, zspage_desc_t,
)
from allocator.prim cimport pthread_mutex_t, sem_t


# What an owner of movable pages answers; contracts in migrate.pyx. The page is locked.
cdef struct page_owner_t:
    void* ctx
    bint (*isolate)(void* ctx, uint32_t frame) noexcept nogil
    int (*migrate)(void* ctx, uint32_t new, uint32_t old) noexcept nogil
    void (*putback)(void* ctx, uint32_t frame) noexcept nogil


cdef struct arena_t:
    # constant from creation to the end
    int fd                          # the memory file
    uint8_t* base                   # its mapping
    uint64_t file_size              # bytes
    superblock_t* sb
    uint8_t* user                   # the user region (slot table)
    pageblock_desc_t* pageblocks
    page_desc_t* pages
    zspage_desc_t* zspages
    uint8_t* frames
    uint32_t nr_pageblocks
    uint32_t nr_frames
    pthread_mutex_t migrate_lock    # one migration at a time; guards owners
    page_owner_t owners[NR_OWNERS]  # ctx NULL = nobody
    pthread_mutex_t lock
    # all below: guarded by lock
    # Frame numbers. [0] serves allocations; [1] holds the free blocks of isolated pageblocks.
    # Order 9 is listed in [1] only: elsewhere a whole pageblock is given back, see returned.
    uint32_t free_head[2][NR_ORDERS]
    uint64_t free_count[2][NR_ORDERS]
    uint32_t fresh                  # pageblocks from here on were never used
    uint32_t returned               # list of whole free pageblocks, given back to the OS
    uint64_t nr_returned            # its length
    uint64_t frames_used
    uint64_t pageblocks_in_use
    uint64_t bytes_returned         # since creation
    uint64_t punch_errors           # a pageblock that the OS did not take back
    uint64_t reserved               # atomic: frames that the balloon keeps from the pool
    # The reserve (reserve.pyx): whole free pageblocks that are resident
    uint32_t ready                  # their list; with a reserve there is no other to allocate from
    uint64_t nr_ready               # its length; read without the lock for a first look
    uint64_t ready_target           # pageblocks to keep there; 0 = no reserve. Atomic
    uint64_t reserve_misses         # atomic: allocations that found it empty
    uint64_t keeper_called          # atomic: 1 from a call of the keeper until it looks
    sem_t keeper_wake
    uint64_t fail_after             # fault injection: allocations until one fails, 0 = never


cdef arena_t* arena_new(uint64_t user_size, uint64_t nr_pageblocks) noexcept nogil
cdef void arena_delete(arena_t* a) noexcept nogil
# Fills out[0..n) with frames for an owner, or hands out none and returns -ENOMEM. With a reserve that
# is empty both wait for its keeper, up to 0.1 s.
cdef int arena_alloc_frames(arena_t* a, int n, uint8_t owner, uint32_t ref, uint32_t* out) noexcept nogil
cdef void arena_free_frames(arena_t* a, int n, const uint32_t* frames) noexcept nogil
# One block of 2^order neighbouring frames: its first frame, or NONE32.
cdef uint32_t arena_alloc_block(arena_t* a, int order, uint8_t owner, uint32_t ref) noexcept nogil
cdef void arena_free_block(arena_t* a, uint32_t frame, int order) noexcept nogil

# An isolated pageblock serves no allocation, and is not given back when it becomes whole. False if
# it is not in use or isolated already. Ending it gives a whole pageblock back, and says so.
cdef bint arena_isolate_pageblock(arena_t* a, uint32_t pb) noexcept nogil
cdef bint arena_unisolate_pageblock(arena_t* a, uint32_t pb) noexcept nogil
# Frames [first, first + n) of one isolated pageblock, if all are free: handed out to an owner.
cdef bint arena_claim_range(arena_t* a, uint32_t first, uint32_t n, uint8_t owner, uint32_t ref) noexcept nogil
# One frame of that pageblock at or after *cursor, which moves on; NONE32 if it has none there.
cdef uint32_t arena_alloc_inside(arena_t* a, uint32_t pb, uint32_t* cursor) noexcept nogil

# For the keeper of the reserve. take: a whole free pageblock that is in no list afterwards, or
# NONE32; from_ready = 1 takes one of the reserve. add_ready puts a resident one into the reserve.
cdef uint32_t arena_take_whole(arena_t* a, bint from_ready) noexcept nogil
cdef void arena_add_ready(arena_t* a, uint32_t pb) noexcept nogil
# Returns a whole free pageblock, which stands in no list, to the OS.
cdef void arena_punch(arena_t* a, uint32_t pb) noexcept nogil

cdef inline uint8_t* frame_ptr(arena_t* a, uint32_t frame) noexcept nogil:
    return a.frames + (<uint64_t>frame << FRAME_SHIFT)


cdef class Arena:
    cdef arena_t* a     # NULL once closed

    cdef arena_t* open(self) except NULL


cdef tuple arena_buddyinfo(arena_t* a)
cdef object arena_stats(arena_t* a)
