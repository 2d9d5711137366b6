# SPDX-License-Identifier: Apache-2.0
# Locks: see frames.pxd.
"""Isolated pageblocks, which migration is emptying.

Their free blocks stand in lists of their own, so that no allocation lands in a pageblock that is being
emptied, and the pageblock is not returned to the OS in the middle of it. This file also takes a chosen
frame, or a range of them, out of the free block around it.
"""
from libc.errno cimport EBUSY
from libc.stdint cimport uint8_t, uint32_t

from allocator.buddy cimport arena_free_block, arena_return_pageblock
from allocator.frames cimport (
    arena_t, free_list_push_locked, free_list_remove_locked, injected_locked, lacks_memory_locked,
    mark_used_locked,
)
from allocator.layout cimport *
from allocator.populate cimport arena_populate_frames
from allocator.prim cimport load16, pthread_mutex_lock, pthread_mutex_unlock


cdef void pageblock_relist_locked(arena_t* a, uint32_t pb, bint isolated) noexcept nogil:
    """Moves the free blocks of a pageblock between the two sets of lists."""
    cdef uint32_t frame = pb * PAGEBLOCK_FRAMES, end = frame + PAGEBLOCK_FRAMES
    cdef pageblock_desc_t* desc = &a.pageblocks[pb]
    cdef int order
    while frame < end:
        if not load16(&a.pages[frame].flags) & PG_FREE:
            frame += 1
            continue
        order = a.pages[frame].order
        free_list_remove_locked(a, frame)
        desc.flags ^= PB_ISOLATED
        free_list_push_locked(a, frame, order)
        desc.flags ^= PB_ISOLATED
        frame += 1u << order
    desc.flags = PB_IN_USE | PB_ISOLATED if isolated else PB_IN_USE


cdef bint arena_isolate_pageblock(arena_t* a, uint32_t pb) noexcept nogil:
    cdef bint taken
    pthread_mutex_lock(&a.lock)
    taken = pb < a.nr_pageblocks and a.pageblocks[pb].flags == PB_IN_USE
    if taken:
        pageblock_relist_locked(a, pb, True)
    pthread_mutex_unlock(&a.lock)
    return taken


cdef bint arena_unisolate_pageblock(arena_t* a, uint32_t pb) noexcept nogil:
    cdef bint whole
    pthread_mutex_lock(&a.lock)
    whole = a.pageblocks[pb].nr_free == PAGEBLOCK_FRAMES
    if whole:
        free_list_remove_locked(a, pb * PAGEBLOCK_FRAMES)
        a.pageblocks[pb].flags = PB_HELD
        a.pageblocks_in_use -= 1
    else:
        pageblock_relist_locked(a, pb, False)
    pthread_mutex_unlock(&a.lock)
    if whole:
        arena_return_pageblock(a, pb)
    return whole


cdef inline uint32_t free_head_of(arena_t* a, uint32_t frame) noexcept nogil:
    """The head of the free block that a frame lies in, or NONE32: at most ten candidates."""
    cdef uint32_t head
    cdef int order
    for order in range(NR_ORDERS):
        head = frame & ~((1u << order) - 1)
        if load16(&a.pages[head].flags) & PG_FREE and head + (1u << a.pages[head].order) > frame:
            return head
    return NONE32


cdef void block_carve_locked(arena_t* a, uint32_t frame) noexcept nogil:
    """Splits the free block around a frame until the frame is a block of order 0 in no list."""
    cdef uint32_t head = free_head_of(a, frame)
    cdef int order = a.pages[head].order
    free_list_remove_locked(a, head)
    while order > 0:
        order -= 1
        if frame & (1u << order):
            free_list_push_locked(a, head, order)
            head += 1u << order
        else:
            free_list_push_locked(a, head + (1u << order), order)


cdef int arena_claim_range(arena_t* a, uint32_t first, uint32_t n, uint8_t owner,
                           uint32_t ref) noexcept nogil:
    cdef uint32_t frame = first
    cdef bint free_all = True, bare = False
    cdef int r
    pthread_mutex_lock(&a.lock)
    if injected_locked(a):
        free_all = False
    while free_all and frame < first + n:
        free_all = free_head_of(a, frame) != NONE32
        frame += 1
    if free_all:
        for frame in range(first, first + n):
            block_carve_locked(a, frame)
        mark_used_locked(a, first, n, owner, ref)
        bare = lacks_memory_locked(a, first, n)
    pthread_mutex_unlock(&a.lock)
    r = arena_populate_frames(a, first, n) if bare else 0
    if r != 0:
        for frame in range(first, first + n):
            arena_free_block(a, frame, 0)
    return r if free_all else -EBUSY


cdef uint32_t arena_alloc_inside(arena_t* a, uint32_t pb, uint32_t* cursor) noexcept nogil:
    cdef uint32_t frame = cursor[0], end = (pb + 1) * PAGEBLOCK_FRAMES
    cdef bint bare = False
    pthread_mutex_lock(&a.lock)
    if a.pageblocks[pb].flags != PB_IN_USE or a.pageblocks[pb].nr_free == 0 or injected_locked(a):
        frame = end
    # The first may lie inside a free block: frames that were freed behind the cursor have merged with it.
    if frame < end and free_head_of(a, frame) == NONE32:
        while frame < end and not load16(&a.pages[frame].flags) & PG_FREE:
            frame += 1
    if frame < end:
        block_carve_locked(a, frame)
        mark_used_locked(a, frame, 1, OWNER_NONE, 0)
        bare = lacks_memory_locked(a, frame, 1)
    pthread_mutex_unlock(&a.lock)
    if bare and arena_populate_frames(a, frame, 1) != 0:
        arena_free_block(a, frame, 0)
        frame = end
    cursor[0] = frame + 1 if frame < end else end
    return frame if frame < end else NONE32
