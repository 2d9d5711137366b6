# SPDX-License-Identifier: Apache-2.0
# Locks: see frames.pxd.
"""The buddy allocator: page frames are taken from pageblocks and given back.

A pageblock whose frames are all free leaves the lists. Its memory goes back to the OS at once, or first
to the reserve where the arena has one (reserve.pyx), and the pageblock waits in the stack of returned
ones. Small blocks are used first, so that a hole is filled before a pageblock is broken. A frame is
handed out only when it has its memory (populate.pyx).
"""
from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from allocator.frames cimport (
    arena_t, free_list_push_locked, free_list_remove_locked, injected_locked, lacks_memory_locked,
    mark_used_locked,
)
from allocator.layout cimport *
from allocator.lists cimport pageblock_stack_pop, pageblock_stack_push
from allocator.populate cimport arena_populate_descriptors, arena_populate_frames
from allocator.prim cimport *

cdef enum:
    # 16 MiB are made ready in 4 to 12 ms, if a CPU is to be had. A guess: then the caller gets an error.
    RESERVE_WAIT_NS = 100000000
    # Instead of a frame, from block_alloc_locked(): none is free, and arena_wait_for_more() can help.
    # A pageblock less than 2^32 frames there are, so no frame has this number, nor NONE32.
    LATER = 0xfffffffe


cdef uint32_t take_whole_locked(arena_t* a, bint from_ready) noexcept nogil:
    """A whole free pageblock, in no list afterwards: of the reserve, or one without memory. Its number, or
    NONE32."""
    cdef uint32_t pb = pageblock_stack_pop(a.pageblocks, &a.ready if from_ready else &a.returned)
    if pb == NONE32:
        if from_ready or a.sb.fresh == a.sb.described:
            return NONE32
        a.sb.fresh += 1
        pb = a.sb.fresh - 1
    elif from_ready:
        store64(&a.nr_ready, a.nr_ready - 1)
    else:
        a.nr_returned -= 1
    # What failed in its last life says nothing about this one.
    a.pageblocks[pb].skip = 0
    a.pageblocks[pb].defer = 0
    a.pageblocks[pb].flags = PB_HELD
    return pb


cdef uint32_t take_pageblock_locked(arena_t* a) noexcept nogil:
    """A whole pageblock for use: its number, or NONE32."""
    cdef uint32_t pb = take_whole_locked(a, True), units = NONE32
    if pb == NONE32 and peek64(&a.ready_target) == 0:
        pb = take_whole_locked(a, False)
        units = 0
    if pb == NONE32:
        return NONE32
    a.pageblocks[pb].flags = PB_IN_USE
    a.pageblocks[pb].nr_free = PAGEBLOCK_FRAMES
    a.pageblocks[pb].ready = units
    a.pageblocks_in_use += 1
    return pb


cdef inline void block_split_locked(arena_t* a, uint32_t frame, int have, int order) noexcept nogil:
    """Frees all but the first 2^order frames of a block of order have that is in no list."""
    while have > order:
        have -= 1
        free_list_push_locked(a, frame + (1u << have), have)


cdef uint32_t block_alloc_locked(arena_t* a, int order, uint8_t owner, uint32_t ref) noexcept nogil:
    """The first frame; LATER; or NONE32, when the arena has no more."""
    cdef int have = order
    cdef uint32_t frame, pb
    if injected_locked(a):
        return NONE32
    while have < PAGEBLOCK_ORDER and a.free_head[0][have] == NONE32:
        have += 1
    if have < PAGEBLOCK_ORDER:
        frame = a.free_head[0][have]
        free_list_remove_locked(a, frame)
    else:
        pb = take_pageblock_locked(a)
        if pb == NONE32:
            if peek64(&a.ready_target) == 0 and a.sb.fresh == a.nr_pageblocks:
                return NONE32
            # The same allocation, to fault injection, as when it is tried again.
            a.fail_after += a.fail_after != 0
            return LATER
        frame = pb * PAGEBLOCK_FRAMES
    block_split_locked(a, frame, have, order)
    mark_used_locked(a, frame, 1u << order, owner, ref)
    return frame


cdef uint32_t block_merge_locked(arena_t* a, uint32_t frame, int order) noexcept nogil:
    """Puts a free block that is in no list into one, merged with its free buddies. A whole pageblock that is
    not isolated goes into none, and its number is returned for arena_return_pageblock(); else NONE32."""
    cdef uint32_t pb = frame // PAGEBLOCK_FRAMES
    cdef uint32_t buddy
    while order < PAGEBLOCK_ORDER:
        buddy = frame ^ (1u << order)
        if not load16(&a.pages[buddy].flags) & PG_FREE or a.pages[buddy].order != order:
            break
        free_list_remove_locked(a, buddy)
        frame &= ~(1u << order)
        order += 1
    if order < PAGEBLOCK_ORDER or a.pageblocks[pb].flags & PB_ISOLATED:
        free_list_push_locked(a, frame, order)
        return NONE32
    a.pageblocks[pb].flags = PB_HELD
    a.pageblocks_in_use -= 1
    return pb


cdef uint32_t block_free_locked(arena_t* a, uint32_t frame, int order) noexcept nogil:
    """As block_merge_locked(), for a block in use."""
    cdef uint32_t i
    for i in range(frame, frame + (1u << order)):
        a.pages[i].owner = OWNER_NONE
        store16(&a.pages[i].flags, 0)
    a.pageblocks[frame // PAGEBLOCK_FRAMES].nr_free += <uint16_t>(1u << order)
    a.frames_used -= 1u << order
    return block_merge_locked(a, frame, order)


cdef void arena_punch(arena_t* a, uint32_t pb, uint64_t held) noexcept nogil:
    cdef int64_t off = <int64_t>(a.sb.frames_off + pb * PAGEBLOCK_SIZE)
    cdef int r = fallocate(a.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, off, <int64_t>PAGEBLOCK_SIZE)
    pthread_mutex_lock(&a.lock)
    if r == 0:
        a.pageblocks[pb].flags = 0
        a.sb.bytes_returned += held
    else:
        a.sb.punch_errors += 1
    pageblock_stack_push(a.pageblocks, &a.returned, pb)
    a.nr_returned += 1
    pthread_mutex_unlock(&a.lock)


cdef uint32_t arena_take_whole(arena_t* a, bint from_ready) noexcept nogil:
    cdef uint32_t pb
    while True:
        pthread_mutex_lock(&a.lock)
        pb = take_whole_locked(a, from_ready)
        if pb != NONE32 or from_ready or a.sb.fresh == a.nr_pageblocks:
            pthread_mutex_unlock(&a.lock)
            return pb
        pthread_mutex_unlock(&a.lock)
        if arena_populate_descriptors(a) != 0:
            return NONE32


cdef void arena_add_ready(arena_t* a, uint32_t pb) noexcept nogil:
    pthread_mutex_lock(&a.lock)
    pageblock_stack_push(a.pageblocks, &a.ready, pb)
    store64(&a.nr_ready, a.nr_ready + 1)
    pthread_mutex_unlock(&a.lock)


cdef inline void arena_call_filler(arena_t* a) noexcept nogil:
    """Wakes the reserve's thread if it has to fill the reserve, or to give some of it back."""
    cdef uint64_t target = peek64(&a.ready_target), ready = peek64(&a.nr_ready)
    if target != 0 and (ready < target or ready > target + target // 2) and cas64(&a.filler_called, 0, 1):
        sem_post(&a.filler_wake)


cdef void arena_return_pageblock(arena_t* a, uint32_t pb) noexcept nogil:
    """With a reserve its thread gives back what is too much, so that no thread that serves requests waits
    for the system call."""
    if load64(&a.ready_target) == 0:
        arena_punch(a, pb, PAGEBLOCK_SIZE)
        return
    arena_add_ready(a, pb)
    arena_call_filler(a)


# ---- the interface --------------------------------------------------------------------------

cdef bint arena_wait_for_more(arena_t* a, uint64_t* until) noexcept nogil:
    """After LATER: True if the allocation may succeed now. Without a reserve the next pageblock lacked its
    descriptors. An empty reserve is waited for, as its thread may just not have had a CPU, until *until,
    which the first call sets: a thread that finds no memory may wait for the very page that the caller has
    come to store."""
    if load64(&a.ready_target) == 0:
        return arena_populate_descriptors(a) == 0
    if until[0] == 0:
        until[0] = now_ns() + RESERVE_WAIT_NS
        add64(&a.sb.reserve_misses, 1)
    while load64(&a.nr_ready) == 0:
        if now_ns() > until[0]:
            return False
        arena_call_filler(a)
        relax(256)
    return True


cdef int populate_each(arena_t* a, int n, const uint32_t* frames) noexcept nogil:
    cdef int i, r = 0
    for i in range(n):
        if r == 0:
            r = arena_populate_frames(a, frames[i], 1)
    return r


cdef int arena_alloc_frames(arena_t* a, int n, uint8_t owner, uint32_t ref, uint32_t* out) noexcept nogil:
    cdef uint32_t frame = 0
    cdef uint64_t until = 0
    cdef bint bare = False
    cdef int got = 0
    while True:
        pthread_mutex_lock(&a.lock)
        while got < n:
            frame = block_alloc_locked(a, 0, owner, ref)
            if frame >= LATER:
                break
            bare |= lacks_memory_locked(a, frame, 1)
            out[got] = frame
            got += 1
        pthread_mutex_unlock(&a.lock)
        arena_call_filler(a)
        if got == n and (not bare or populate_each(a, n, out) == 0):
            return 0
        if frame != LATER or not arena_wait_for_more(a, &until):
            arena_free_frames(a, got, out)
            return -ENOMEM


cdef void arena_free_frames(arena_t* a, int n, const uint32_t* frames) noexcept nogil:
    cdef uint32_t empty[CHAIN_MAX]
    cdef uint32_t pb
    cdef int nr_empty = 0, i
    pthread_mutex_lock(&a.lock)
    for i in range(n):
        pb = block_free_locked(a, frames[i], 0)
        if pb != NONE32:
            empty[nr_empty] = pb
            nr_empty += 1
    pthread_mutex_unlock(&a.lock)
    for i in range(nr_empty):
        arena_return_pageblock(a, empty[i])


cdef uint32_t arena_alloc_block(arena_t* a, int order, uint8_t owner, uint32_t ref) noexcept nogil:
    cdef uint32_t frame
    cdef uint64_t until = 0
    cdef bint bare
    while True:
        pthread_mutex_lock(&a.lock)
        frame = block_alloc_locked(a, order, owner, ref)
        bare = frame < LATER and lacks_memory_locked(a, frame, 1u << order)
        pthread_mutex_unlock(&a.lock)
        arena_call_filler(a)
        if bare and arena_populate_frames(a, frame, 1u << order) != 0:
            arena_free_block(a, frame, order)
            return NONE32
        if frame != LATER:
            return frame
        if not arena_wait_for_more(a, &until):
            return NONE32


cdef void arena_free_block(arena_t* a, uint32_t frame, int order) noexcept nogil:
    cdef uint32_t pb
    pthread_mutex_lock(&a.lock)
    pb = block_free_locked(a, frame, order)
    pthread_mutex_unlock(&a.lock)
    if pb != NONE32:
        arena_return_pageblock(a, pb)
