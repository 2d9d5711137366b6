# SPDX-License-Identifier: Apache-2.0
# Lock order: arena_t.lock is the innermost lock of the whole program; nothing is taken under it.
"""C interface of the arena: page frames in pageblocks of one memory file."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from allocator.layout cimport (
    FRAME_SHIFT, NR_ORDERS, page_desc_t, pageblock_desc_t, superblock_t, zspage_desc_t,
)
from allocator.prim cimport pthread_mutex_t


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
    pthread_mutex_t lock
    # all below: guarded by lock
    uint32_t free_head[NR_ORDERS]   # frame numbers; order 9 is not a list, see returned
    uint64_t free_count[NR_ORDERS]
    uint32_t fresh                  # pageblocks from here on were never used
    uint32_t returned               # list of whole free pageblocks, given back to the OS
    uint64_t nr_returned            # its length
    uint64_t frames_used
    uint64_t pageblocks_in_use
    uint64_t bytes_returned         # since creation
    uint64_t punch_errors           # a pageblock that the OS did not take back
    uint64_t fail_after             # fault injection: allocations until one fails, 0 = never


cdef arena_t* arena_new(uint64_t user_size, uint64_t nr_pageblocks) noexcept nogil
cdef void arena_delete(arena_t* a) noexcept nogil
# Fills out[0..n) with frames for an owner, or hands out none and returns -ENOMEM.
cdef int arena_alloc_frames(arena_t* a, int n, uint8_t owner, uint32_t ref, uint32_t* out) noexcept nogil
cdef void arena_free_frames(arena_t* a, int n, const uint32_t* frames) noexcept nogil
# One block of 2^order neighbouring frames: its first frame, or NONE32.
cdef uint32_t arena_alloc_block(arena_t* a, int order, uint8_t owner, uint32_t ref) noexcept nogil
cdef void arena_free_block(arena_t* a, uint32_t frame, int order) noexcept nogil

cdef inline uint8_t* frame_ptr(arena_t* a, uint32_t frame) noexcept nogil:
    return a.frames + (<uint64_t>frame << FRAME_SHIFT)


cdef class Arena:
    cdef arena_t* a


cdef tuple arena_buddyinfo(arena_t* a)
cdef object arena_stats(arena_t* a)
