# SPDX-License-Identifier: Apache-2.0
# Lock order: see frames.pxd.
"""The buddy allocator: page frames are taken from pageblocks and given back.

A pageblock whose frames are all free leaves the lists, its memory goes back to the OS at once (or first
to the reserve, where the arena keeps one: reserve.pyx), and it waits in the list of returned pageblocks.
Small blocks are used first, so that a hole is filled before a pageblock is broken.
"""
from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from allocator.frames cimport arena_t, injected_locked, mark_used_locked, push_free_locked, remove_free_locked
from allocator.layout cimport *
from allocator.prim cimport *

cdef enum:
    # 16 MiB are made ready in 4 to 8 ms, if a CPU is to be had. A guess: then the caller gets an error.
    RESERVE_WAIT_NS = 100000000


cdef uint32_t take_whole_locked(arena_t* a, bint from_ready) noexcept nogil:
    """A whole free pageblock, in no list afterwards: of the reserve, or one that is not resident. Its
    number, or NONE32."""
    cdef uint32_t pb = a.ready if from_ready else a.returned
    if pb == NONE32 and not from_ready and a.fresh < a.nr_pageblocks:
        a.fresh += 1
        return a.fresh - 1
    if pb == NONE32:
        return NONE32
    if from_ready:
        a.ready = a.pageblocks[pb].next
        store64(&a.nr_ready, a.nr_ready - 1)
    else:
        a.returned = a.pageblocks[pb].next
        a.nr_returned -= 1
    # What failed in its last life says nothing about this one.
    a.pageblocks[pb].skip = 0
    a.pageblocks[pb].defer = 0
    return pb


cdef uint32_t take_pageblock_locked(arena_t* a) noexcept nogil:
    """A whole pageblock for use: its number, or NONE32."""
    cdef uint32_t pb = take_whole_locked(a, True)
    if pb == NONE32 and a.ready_target == 0:
        pb = take_whole_locked(a, False)
    if pb == NONE32:
        return NONE32
    a.pageblocks[pb].flags = PB_IN_USE
    a.pageblocks[pb].nr_free = PAGEBLOCK_FRAMES
    a.pageblocks_in_use += 1
    return pb


cdef inline void split_locked(arena_t* a, uint32_t frame, int have, int order) noexcept nogil:
    """Frees all but the first 2^order frames of a block of order have that is in no list."""
    while have > order:
        have -= 1
        push_free_locked(a, frame + (1u << have), have)


cdef uint32_t alloc_locked(arena_t* a, int order, uint8_t owner, uint32_t ref) noexcept nogil:
    cdef int have = order
    cdef uint32_t frame, pb
    if injected_locked(a):
        return NONE32
    while have < PAGEBLOCK_ORDER and a.free_head[0][have] == NONE32:
        have += 1
    if have < PAGEBLOCK_ORDER:
        frame = a.free_head[0][have]
        remove_free_locked(a, frame)
    else:
        pb = take_pageblock_locked(a)
        if pb == NONE32:
            return NONE32
        frame = pb * PAGEBLOCK_FRAMES
    split_locked(a, frame, have, order)
    mark_used_locked(a, frame, 1u << order, owner, ref)
    return frame


cdef uint32_t merge_locked(arena_t* a, uint32_t frame, int order) noexcept nogil:
    """Puts a free block that is in no list into one, merged with its free buddies. A whole pageblock
    that is not isolated goes into none, and its number is returned for give_back(); else NONE32."""
    cdef uint32_t pb = frame // PAGEBLOCK_FRAMES
    cdef uint32_t buddy
    while order < PAGEBLOCK_ORDER:
        buddy = frame ^ (1u << order)
        if not load16(&a.pages[buddy].flags) & PG_FREE or a.pages[buddy].order != order:
            break
        remove_free_locked(a, buddy)
        frame &= ~(1u << order)
        order += 1
    if order < PAGEBLOCK_ORDER or a.pageblocks[pb].flags & PB_ISOLATED:
        push_free_locked(a, frame, order)
        return NONE32
    a.pageblocks[pb].flags = 0
    a.pageblocks_in_use -= 1
    return pb


cdef uint32_t free_locked(arena_t* a, uint32_t frame, int order) noexcept nogil:
    """As merge_locked(), for a block in use."""
    cdef uint32_t i
    for i in range(frame, frame + (1u << order)):
        a.pages[i].owner = OWNER_NONE
        store16(&a.pages[i].flags, 0)
    a.pageblocks[frame // PAGEBLOCK_FRAMES].nr_free += <uint16_t>(1u << order)
    a.frames_used -= 1u << order
    return merge_locked(a, frame, order)


cdef void arena_punch(arena_t* a, uint32_t pb) noexcept nogil:
    cdef int64_t off = <int64_t>(a.sb.frames_off + <uint64_t>pb * PAGEBLOCK_SIZE)
    cdef int r = fallocate(a.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, off, <int64_t>PAGEBLOCK_SIZE)
    pthread_mutex_lock(&a.lock)
    if r == 0:
        a.bytes_returned += PAGEBLOCK_SIZE
    else:
        a.punch_errors += 1
    a.pageblocks[pb].next = a.returned
    a.returned = pb
    a.nr_returned += 1
    pthread_mutex_unlock(&a.lock)


cdef uint32_t arena_take_whole(arena_t* a, bint from_ready) noexcept nogil:
    cdef uint32_t pb
    pthread_mutex_lock(&a.lock)
    pb = take_whole_locked(a, from_ready)
    pthread_mutex_unlock(&a.lock)
    return pb


cdef void arena_add_ready(arena_t* a, uint32_t pb) noexcept nogil:
    pthread_mutex_lock(&a.lock)
    a.pageblocks[pb].next = a.ready
    a.ready = pb
    store64(&a.nr_ready, a.nr_ready + 1)
    pthread_mutex_unlock(&a.lock)


cdef inline void call_keeper(arena_t* a) noexcept nogil:
    """Wakes the keeper of the reserve if it has to fill it, or to give some of it back."""
    cdef uint64_t target = peek64(&a.ready_target), ready = peek64(&a.nr_ready)
    if target != 0 and (ready < target or ready > target + target // 2) and cas64(&a.keeper_called, 0, 1):
        sem_post(&a.keeper_wake)


cdef void give_back(arena_t* a, uint32_t pb) noexcept nogil:
    """Returns a whole free pageblock, which stands in no list, to the OS; with a reserve to that, and its
    keeper returns what is too much: no thread that serves requests waits for the system call."""
    if load64(&a.ready_target) == 0:
        arena_punch(a, pb)
        return
    arena_add_ready(a, pb)
    call_keeper(a)


# ---- the interface --------------------------------------------------------------------------

cdef bint wait_for_keeper(arena_t* a, uint64_t* until) noexcept nogil:
    """After an allocation that has found the reserve empty: True if it has become less so. The keeper may
    just not have had a CPU. False at *until, which the first call sets: a keeper that finds no memory may
    wait for the very page that the caller has come to store."""
    if load64(&a.ready_target) == 0:
        return False
    if until[0] == 0:
        until[0] = now_ns() + RESERVE_WAIT_NS
        add64(&a.reserve_misses, 1)
    while load64(&a.nr_ready) == 0:
        if now_ns() > until[0]:
            return False
        call_keeper(a)
        relax(256)
    return True


cdef int arena_alloc_frames(arena_t* a, int n, uint8_t owner, uint32_t ref, uint32_t* out) noexcept nogil:
    cdef int i
    cdef bint starved
    cdef uint64_t until = 0
    while True:
        pthread_mutex_lock(&a.lock)
        for i in range(n):
            out[i] = alloc_locked(a, 0, owner, ref)
            if out[i] == NONE32:
                break
        else:
            i = n
        starved = i < n and a.ready == NONE32
        pthread_mutex_unlock(&a.lock)
        call_keeper(a)
        if i == n:
            return 0
        arena_free_frames(a, i, out)
        if not starved or not wait_for_keeper(a, &until):
            return -ENOMEM


cdef void arena_free_frames(arena_t* a, int n, const uint32_t* frames) noexcept nogil:
    cdef uint32_t empty[CHAIN_MAX]
    cdef uint32_t pb
    cdef int nr_empty = 0, i
    pthread_mutex_lock(&a.lock)
    for i in range(n):
        pb = free_locked(a, frames[i], 0)
        if pb != NONE32:
            empty[nr_empty] = pb
            nr_empty += 1
    pthread_mutex_unlock(&a.lock)
    for i in range(nr_empty):
        give_back(a, empty[i])


cdef uint32_t arena_alloc_block(arena_t* a, int order, uint8_t owner, uint32_t ref) noexcept nogil:
    cdef uint32_t frame
    cdef bint starved
    cdef uint64_t until = 0
    while True:
        pthread_mutex_lock(&a.lock)
        frame = alloc_locked(a, order, owner, ref)
        starved = frame == NONE32 and a.ready == NONE32
        pthread_mutex_unlock(&a.lock)
        call_keeper(a)
        if not starved or not wait_for_keeper(a, &until):
            return frame


cdef void arena_free_block(arena_t* a, uint32_t frame, int order) noexcept nogil:
    cdef uint32_t pb
    pthread_mutex_lock(&a.lock)
    pb = free_locked(a, frame, order)
    pthread_mutex_unlock(&a.lock)
    if pb != NONE32:
        give_back(a, pb)
