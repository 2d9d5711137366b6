# SPDX-License-Identifier: Apache-2.0
# Locks: see zspage.pxd. One class lock or the arena lock is held at a time, so that a pool may be in use
# while it is checked. Sums over several classes are exact only when the pool is at rest.
"""The sums that layout.h states, as code. A sum is named by its label there ([A1], [Z3])."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from allocator.arena cimport Arena
from allocator.frames cimport arena_t
from allocator.layout cimport *
from allocator.pool cimport Pool
from allocator.prim cimport *
from allocator.zspage cimport fullness_group, header_ptr, pool_t, size_class_t


class CheckError(AssertionError):
    """An invariant is broken: the message begins with its label in layout.h."""


cdef int check_fail(str label, str text) except -1:
    raise CheckError(f"[{label}] {text}")


# ---- arena ------------------------------------------------------------------------------------

cdef int check_pageblock_locked(arena_t* a, uint32_t pb, uint64_t* listed) except -1:
    """[A1] [A2] [A4] by a walk over the 512 frames; counts free blocks per order in listed."""
    cdef uint32_t frame = pb * PAGEBLOCK_FRAMES, end = frame + PAGEBLOCK_FRAMES, buddy
    cdef uint32_t nr_free = 0
    cdef uint16_t flags
    cdef page_desc_t* page
    while frame < end:
        page = &a.pages[frame]
        flags = load16(&page.flags)
        if flags & PG_USED:
            if flags & PG_FREE:
                check_fail("A1", f"frame {frame} is both used and free")
            frame += 1
            continue
        if not flags & PG_FREE or page.order > PAGEBLOCK_ORDER:
            check_fail("A1", f"frame {frame} is neither used nor in a free block (flags {flags:#x})")
        if frame & ((1u << page.order) - 1):
            check_fail("A4", f"free block of order {page.order} at frame {frame} is not aligned")
        buddy = frame ^ (1u << page.order)
        if (page.order < PAGEBLOCK_ORDER and load16(&a.pages[buddy].flags) & PG_FREE
                and a.pages[buddy].order == page.order):
            check_fail("A4", f"free buddies {frame} and {buddy} of order {page.order} did not merge")
        listed[page.order] += 1
        nr_free += 1u << page.order
        frame += 1u << page.order
    if nr_free != a.pageblocks[pb].nr_free:
        check_fail("A2", f"pageblock {pb} has {nr_free} free frames and says {a.pageblocks[pb].nr_free}")
    if nr_free == PAGEBLOCK_FRAMES and not a.pageblocks[pb].flags & PB_ISOLATED:
        check_fail("A3", f"pageblock {pb} is free and still counts as in use")
    return 0


cdef uint64_t check_free_list_locked(arena_t* a, int which, int order) except? 0xffffffffffffffff:
    """Length of the list of an order; which = 1: of isolated pageblocks."""
    cdef uint64_t in_list = 0
    cdef uint32_t frame = a.free_head[which][order], prev = NONE32
    while frame != NONE32:
        if not load16(&a.pages[frame].flags) & PG_FREE or a.pages[frame].order != order:
            check_fail("A2", f"frame {frame} in the list of order {order} is no free block of it")
        if a.pages[frame].prev != prev:
            check_fail("A2", f"frame {frame} in the list of order {order} has a wrong back link")
        if ((a.pageblocks[frame // PAGEBLOCK_FRAMES].flags & PB_ISOLATED) != 0) != (which == 1):
            check_fail("A2", f"frame {frame} of order {order} is listed with the wrong kind of pageblock")
        prev = frame
        frame = a.pages[frame].next
        in_list += 1
        if in_list > a.nr_frames:
            check_fail("A2", f"the list of order {order} has no end")
    if in_list != a.free_count[which][order]:
        check_fail("A2", f"{in_list} blocks of order {order} are listed, "
                         f"{a.free_count[which][order]} are counted")
    return in_list


cdef int check_ready_locked(arena_t* a) except -1:
    """[A5]"""
    cdef uint64_t in_list = 0
    cdef uint32_t pb = a.ready
    while pb != NONE32 and in_list <= a.nr_ready:
        if pb >= a.sb.fresh or a.pageblocks[pb].flags != PB_HELD:
            check_fail("A5", f"pageblock {pb} is in reserve and in use, or was never used")
        pb = a.pageblocks[pb].next
        in_list += 1
    if in_list != a.nr_ready or pb != NONE32:
        check_fail("A5", f"{in_list} or more pageblocks are in reserve, {a.nr_ready} are counted")
    return 0


cdef int check_arena_locked(arena_t* a, int level) except -1:
    cdef uint64_t listed[NR_ORDERS]
    cdef uint64_t in_lists, used = 0, in_use = 0
    cdef uint32_t pb
    cdef int order, which
    for order in range(NR_ORDERS):
        listed[order] = 0
    for pb in range(a.sb.fresh):
        if a.pageblocks[pb].flags & PB_IN_USE:
            in_use += 1
            used += PAGEBLOCK_FRAMES - a.pageblocks[pb].nr_free
            if level >= 2:
                check_pageblock_locked(a, pb, listed)
    if in_use != a.pageblocks_in_use:
        check_fail("A1", f"{in_use} pageblocks are in use, {a.pageblocks_in_use} are counted")
    if used != a.frames_used:
        check_fail("A1", f"{used} frames are used, {a.frames_used} are counted")
    # A pageblock between the lists, on its way to the OS or into the reserve, is in none of these counts.
    if in_use + a.nr_returned + a.nr_ready > a.sb.fresh:
        check_fail("A3", f"{in_use} pageblocks in use, {a.nr_returned} returned and {a.nr_ready} in reserve, "
                   f"of {a.sb.fresh} ever used")
    check_ready_locked(a)
    for order in range(NR_ORDERS):
        in_lists = 0
        for which in range(2):
            in_lists += check_free_list_locked(a, which, order)
        if level >= 2 and listed[order] != in_lists:
            check_fail("A2", f"{listed[order]} free blocks of order {order} exist, {in_lists} are listed")
    return 0


cdef int check_arena(arena_t* a, int level) except -1:
    pthread_mutex_lock(&a.lock)
    try:
        return check_arena_locked(a, level)
    finally:
        pthread_mutex_unlock(&a.lock)


# ---- pool -------------------------------------------------------------------------------------

cdef int check_zspage_locked(pool_t* pool, size_class_t* c, uint32_t number, uint8_t* is_free) except -1:
    """[Z1] and the objects' headers; is_free is scratch for the class's objects."""
    cdef zspage_desc_t* z = &pool.arena.zspages[number]
    cdef uint32_t i, idx = z.freeobj, nr_free = 0
    cdef uint64_t header
    for i in range(c.pages):
        if z.frames[i] >= pool.arena.nr_frames:
            check_fail("Z4", f"zspage {number} lists frame {z.frames[i]}, which does not exist")
        if (pool.arena.pages[z.frames[i]].owner != OWNER_ZSMALLOC
                or pool.arena.pages[z.frames[i]].ref != number):
            check_fail("Z4", f"frame {z.frames[i]} of zspage {number} names another owner")
    for i in range(c.objs):
        is_free[i] = 0
    while idx < c.objs:
        if is_free[idx]:
            check_fail("Z1", f"the free chain of zspage {number} has a loop at object {idx}")
        is_free[idx] = 1
        nr_free += 1
        header = header_ptr(pool, z, c, idx)[0]
        if header & HDR_ALLOCATED:
            check_fail("Z1", f"object {idx} of zspage {number} is in the free chain and allocated")
        idx = <uint32_t>(header >> 1)
    if z.inuse + nr_free != c.objs:
        check_fail("Z1", f"zspage {number}: {z.inuse} in use + {nr_free} free, {c.objs} expected")
    for i in range(c.objs):
        header = header_ptr(pool, z, c, i)[0]
        if not is_free[i] and not header & HDR_ALLOCATED:
            check_fail("Z1", f"object {i} of zspage {number} is neither allocated nor in the free chain")
        if header & HDR_ALLOCATED and c.objs != 1 and ((header >> 1) & HDR_SIZE_MASK) + OBJ_HEADER > c.size:
            check_fail("Z1", f"object {i} of zspage {number} is larger than its class of {c.size}")
    return 0


cdef int check_class_locked(pool_t* pool, size_class_t* c, int level, uint8_t* is_free,
                            uint64_t* pages) except -1:
    cdef uint64_t inuse = 0, zspages = 0, in_list
    cdef uint32_t number, prev
    cdef zspage_desc_t* z
    cdef int group
    for group in range(NR_FULLNESS):
        in_list = 0
        prev = NONE32
        number = c.head[group]
        while number != NONE32:
            z = &pool.arena.zspages[number]
            if z.magic != ZSPAGE_MAGIC or z.class_idx != c.index:
                check_fail("Z2", f"zspage {number} in a list of class {c.size} is not of that class")
            if z.prev != prev or z.fullness != group:
                check_fail("Z2", f"zspage {number} has a wrong link or group in list {group} of class "
                                 f"{c.size}")
            if fullness_group(z.inuse, c.objs) != group:
                check_fail("Z5", f"zspage {number}, {z.inuse} of {c.objs} in use, stands in group {group}")
            if level >= 2:
                check_zspage_locked(pool, c, number, is_free)
            inuse += z.inuse
            prev = number
            number = z.next
            in_list += 1
            if in_list > c.zspages:
                check_fail("Z2", f"list {group} of class {c.size} has no end")
        if in_list != c.nr[group]:
            check_fail("Z2", f"{in_list} zspages in group {group} of class {c.size}, {c.nr[group]} counted")
        zspages += in_list
    if c.nr[FULLNESS_EMPTY]:
        check_fail("Z5", f"class {c.size} keeps {c.nr[FULLNESS_EMPTY]} empty zspages")
    if zspages + c.isolated != c.zspages:
        check_fail("Z2", f"class {c.size}: {zspages} zspages in the lists and {c.isolated} isolated, "
                   f"{c.zspages} counted")
    if inuse != c.inuse and c.isolated == 0:
        check_fail("Z3", f"class {c.size}: {inuse} objects in the lists, {c.inuse} counted")
    pages[0] += c.zspages * c.pages
    return 0


cdef uint64_t deferred_pages(pool_t* pool) except? 0xffffffffffffffff:
    """Pool pages of the empty zspages that wait to be freed."""
    cdef uint64_t pages = 0
    cdef uint32_t number
    pthread_mutex_lock(&pool.number_lock)
    number = pool.deferred
    while number != NONE32:
        pages += pool.by_index[pool.arena.zspages[number].class_idx].pages
        number = pool.arena.zspages[number].next
    pthread_mutex_unlock(&pool.number_lock)
    return pages


cdef uint64_t owned_frames(arena_t* a) noexcept nogil:
    cdef uint64_t owned = 0
    cdef uint32_t frame
    pthread_mutex_lock(&a.lock)
    for frame in range(a.sb.fresh * PAGEBLOCK_FRAMES):
        if load16(&a.pages[frame].flags) & PG_USED and load8(&a.pages[frame].owner) == OWNER_ZSMALLOC:
            owned += 1
    pthread_mutex_unlock(&a.lock)
    return owned


cdef int check_pool(pool_t* pool, int level) except -1:
    cdef uint8_t* is_free = <uint8_t*>calloc(1, 1 << LOC_IDX_BITS)
    cdef uint64_t pages = 0, corrupt = peek64(&pool.corrupt), owned
    cdef size_class_t* c
    cdef uint32_t i
    if is_free == NULL:
        raise MemoryError
    try:
        for i in range(pool.nr_classes):
            c = &pool.classes[i]
            pthread_mutex_lock(&c.lock)
            try:
                check_class_locked(pool, c, level, is_free, &pages)
            finally:
                pthread_mutex_unlock(&c.lock)
        pages += deferred_pages(pool)
        if pages != peek64(&pool.pages):
            check_fail("Z4", f"the classes have {pages} pages, the pool counts {peek64(&pool.pages)}")
        if level >= 2:
            owned = owned_frames(pool.arena)
            if owned != pages:
                check_fail("Z4", f"the classes have {pages} pages, {owned} frames say that they are "
                                 "zsmalloc's")
        if corrupt:
            check_fail("Z4", f"{corrupt} locations named no object")
    finally:
        free(is_free)
    return 0


def check(what, level=1):
    """Check an Arena or a Pool (with its arena), at rest. Level 1: counters and lists; level 2: every
    frame and object too. Raises CheckError, whose message begins with the label of the broken sum."""
    if isinstance(what, Arena):
        check_arena((<Arena>what).open(), level)
    elif isinstance(what, Pool):
        check_arena((<Pool>what).open().arena, level)
        check_pool((<Pool>what).pool, level)
    else:
        raise TypeError(f"Arena or Pool expected, got {type(what).__name__}")
