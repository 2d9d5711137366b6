# SPDX-License-Identifier: Apache-2.0
# Locks of the arena, outermost first:
#   arena_t.migrate_lock    the outermost lock of the allocator (migrate.pyx)
#   arena_t.populate_lock   one thread at a time asks the OS for memory (populate.pyx)
#   arena_t.lock            the innermost lock of the whole program
# Rules:
#   - Nothing is taken under arena_t.lock, and no system call is made under it. A pageblock is taken
#     from the OS, and given back to it, between two holds.
#   - Functions named _locked hold arena_t.lock.
"""Page frames in pageblocks: the struct of an arena, and the free lists of the buddy allocator.

The free blocks of order 0 to 8 inside the pageblocks in use stand in lists by order. Those of isolated
pageblocks stand in a second set of lists, which serves no allocation. All code here is inline, because
each allocation calls it several times.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from allocator.layout cimport (
    FRAME_SHIFT, NONE32, NR_ORDERS, NR_OWNERS, OWNER_NONE, PAGEBLOCK_FRAMES, PB_ISOLATED, PG_FREE, PG_USED,
    UNIT_FRAMES, page_desc_t, pageblock_desc_t, superblock_t, zspage_desc_t,
)
from allocator.lists cimport page_list_push, page_list_remove
from allocator.prim cimport pthread_mutex_t, sem_t, store16


# What an owner of movable pages answers; contracts in migrate.pyx. The page is locked.
cdef struct page_owner_t:
    void* ctx
    bint (*isolate)(void* ctx, uint32_t frame) noexcept nogil
    int (*migrate)(void* ctx, uint32_t new, uint32_t old) noexcept nogil
    void (*putback)(void* ctx, uint32_t frame) noexcept nogil


cdef struct arena_t:
    # constant from creation to the end
    int fd                          # the memory file
    bint lent                       # it was given to the arena: somebody else may hold it open too
    uint8_t* base                   # its mapping
    uint64_t file_size              # bytes
    superblock_t* sb                # has the counters, and the marks that survive the process
    uint8_t* user                   # the user region (slot table)
    pageblock_desc_t* pageblocks
    page_desc_t* pages
    zspage_desc_t* zspages
    uint8_t* frames
    uint32_t nr_pageblocks
    uint32_t nr_frames
    pthread_mutex_t migrate_lock    # one migration at a time; guards owners
    page_owner_t owners[NR_OWNERS]  # ctx NULL = nobody
    pthread_mutex_t populate_lock   # guards nothing by itself: who changes sb.described or a
                                    # pageblock's ready has it, and lock
    pthread_mutex_t lock
    # all below: guarded by lock
    # Frame numbers. [0] serves allocations; [1] holds the free blocks of isolated pageblocks.
    # Order 9 is listed in [1] only: elsewhere a whole pageblock is given back, see returned.
    uint32_t free_head[2][NR_ORDERS]
    uint64_t free_count[2][NR_ORDERS]
    uint32_t returned               # stack of whole free pageblocks, given back to the OS
    uint64_t nr_returned            # its length
    uint64_t frames_used
    uint64_t pageblocks_in_use
    uint64_t reserved               # atomic: frames that the balloon keeps from the pool
    uint32_t left_frames            # list of frames that the balloon of the process before has left
    uint64_t nr_left                # its length
    # The reserve (reserve.pyx): whole free pageblocks that are resident
    uint32_t ready                  # their stack; with a reserve there is no other to allocate from
    uint64_t nr_ready               # its length; read without the lock for a first look
    uint64_t ready_target           # pageblocks to keep there; 0 = no reserve. Atomic
    uint64_t filler_called          # atomic: 1 from a call of the reserve's thread until it looks
    sem_t filler_wake
    uint64_t fail_after             # fault injection: allocations until one fails, 0 = never


cdef inline uint8_t* frame_ptr(arena_t* a, uint32_t frame) noexcept nogil:
    return a.frames + (<uint64_t>frame << FRAME_SHIFT)


# ---- units: parts of a pageblock that get their memory together -----------------------------

cdef inline uint32_t units_of(uint32_t first, uint32_t n) noexcept nogil:
    """The units of frames [first, first + n) of one pageblock, as bits of pageblock_desc_t.ready."""
    cdef uint32_t low = first % PAGEBLOCK_FRAMES // UNIT_FRAMES
    cdef uint32_t high = (first + n - 1) % PAGEBLOCK_FRAMES // UNIT_FRAMES
    return (NONE32 >> (31 - (high - low))) << low


cdef inline bint lacks_memory_locked(arena_t* a, uint32_t first, uint32_t n) noexcept nogil:
    return (units_of(first, n) & ~a.pageblocks[first // PAGEBLOCK_FRAMES].ready) != 0


# ---- free lists ---------------------------------------------------------------------------

cdef inline int free_list_of_locked(arena_t* a, uint32_t frame) noexcept nogil:
    return 1 if a.pageblocks[frame // PAGEBLOCK_FRAMES].flags & PB_ISOLATED else 0


cdef inline void free_list_push_locked(arena_t* a, uint32_t frame, int order) noexcept nogil:
    cdef page_desc_t* page = &a.pages[frame]
    cdef int which = free_list_of_locked(a, frame)
    store16(&page.flags, PG_FREE)
    page.order = <uint8_t>order
    page.owner = OWNER_NONE
    page_list_push(a.pages, &a.free_head[which][order], frame)
    a.free_count[which][order] += 1


cdef inline void free_list_remove_locked(arena_t* a, uint32_t frame) noexcept nogil:
    cdef page_desc_t* page = &a.pages[frame]
    cdef int which = free_list_of_locked(a, frame)
    page_list_remove(a.pages, &a.free_head[which][page.order], frame)
    store16(&page.flags, 0)
    a.free_count[which][page.order] -= 1


cdef inline void mark_used_locked(arena_t* a, uint32_t first, uint32_t n, uint8_t owner,
                                  uint32_t ref) noexcept nogil:
    cdef uint32_t frame
    for frame in range(first, first + n):
        a.pages[frame].owner = owner
        a.pages[frame].ref = ref
        store16(&a.pages[frame].flags, PG_USED)
    a.pageblocks[first // PAGEBLOCK_FRAMES].nr_free -= <uint16_t>n
    a.frames_used += n


cdef inline bint injected_locked(arena_t* a) noexcept nogil:
    """True for the allocation that fault injection has chosen."""
    if a.fail_after == 0:
        return False
    a.fail_after -= 1
    return a.fail_after == 0
