# SPDX-License-Identifier: Apache-2.0
# No locks: nothing else is at work on the arena and the pool yet.
"""Recovery: what a killed process has left in a memory file becomes a whole pool again.

layout.h says what is persistent, and why a kill at any instruction leaves each page old or new ([R1] to
[R4]). Three passes follow from that, each over flat arrays:
  1. Page descriptors: all marks go, but for "used", and for the balloon's frames.
  2. Zspages: they claim their frames. Then each allocated object is shown to the pool's user, and is freed if
     that does not name it. Free chains, fullness lists and counts follow. A zspage without an object is
     freed.
  3. Pageblocks: what is not claimed is free. Free lists and counts follow, and a whole free pageblock is
     punched out of the memory file.
Every step leaves a file that can be recovered again. Nothing is allocated.

Memory may have changed by itself, too. So no frame is written before all zspages have claimed theirs: a
zspage whose list of frames is wrong must not cost the pages of another one. How far the arrays reach is taken
from where the file has memory, and not from counters in the superblock.
"""
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from allocator.buddy cimport arena_punch, block_merge_locked
from allocator.frames cimport arena_t, frame_ptr, units_of
from allocator.layout cimport *
from allocator.lists cimport page_list_push, pageblock_stack_push, zspage_stack_push
from allocator.populate cimport arena_populate_frames, arena_punch_hole
from allocator.prim cimport SEEK_DATA, SEEK_HOLE, fetch_line, lseek, max64, order_stores
from allocator.zspage cimport (
    data_offset, header_ptr, is_huge, loc_of, object_zero, pool_t, size_class_t, zspage_insert_locked,
)


cdef enum:
    HEADERS_AHEAD = 2       # zspages, about 20 objects


# ---- how far the arrays reach --------------------------------------------------------------------

cdef uint64_t reach_of(arena_t* a, uint64_t off, uint64_t size) noexcept nogil:
    """Bytes of the array at off up to the end of the last memory that the file has in it."""
    cdef int64_t at = <int64_t>off, end = <int64_t>(off + size), reach = at
    while True:
        at = lseek(a.fd, at, SEEK_DATA)
        if at < 0 or at >= end:
            return <uint64_t>reach - off
        at = lseek(a.fd, at, SEEK_HOLE)
        if at <= reach:
            return <uint64_t>reach - off
        reach = min(at, end)


cdef void reach_recover(arena_t* a) noexcept nogil:
    """A descriptor has its memory before its first use, and keeps it. What lies behind the last one that was
    used is zeros, as it is in a pageblock and a zspage that are free."""
    cdef uint64_t nr_frames = a.nr_frames
    cdef uint32_t pb
    pb = <uint32_t>(reach_of(a, a.sb.page_off, nr_frames * sizeof(page_desc_t))
                    // (PAGEBLOCK_FRAMES * sizeof(page_desc_t)))
    a.sb.described = pb
    a.sb.fresh = min(a.sb.fresh, pb)
    while pb > a.sb.fresh and a.pageblocks[pb - 1].flags == 0:
        pb -= 1
    a.sb.fresh = pb
    a.sb.next_number = <uint32_t>(reach_of(a, a.sb.zspage_off, nr_frames * sizeof(zspage_desc_t))
                                  // sizeof(zspage_desc_t))
    a.sb.numbers_described = a.sb.next_number


# ---- page descriptors ---------------------------------------------------------------------------

cdef void pages_forget(arena_t* a) noexcept nogil:
    """Afterwards a frame is PG_USED or nothing, and its owner is the balloon or nobody. `next` keeps the
    number of the zspage that the frame said it is of."""
    cdef uint32_t frame
    cdef page_desc_t* page
    for frame in range(a.sb.fresh * PAGEBLOCK_FRAMES):
        page = &a.pages[frame]
        if page.flags & PG_USED:
            if page.owner != OWNER_BALLOON:
                page.owner = OWNER_NONE
            page.flags = PG_USED
        else:
            page.owner = OWNER_NONE
            page.flags = 0
        page.next = page.ref
        page.ref = 0


# ---- zspages ------------------------------------------------------------------------------------

cdef void zspage_drop(pool_t* pool, uint32_t number, pool_recovery_t* found) noexcept nogil:
    """Of a damaged one: it gives back what it has claimed."""
    cdef arena_t* a = pool.arena
    cdef zspage_desc_t* z = &a.zspages[number]
    cdef uint32_t i
    cdef page_desc_t* page
    z.magic = 0
    found.zspages_damaged += 1
    for i in range(<uint32_t>CHAIN_MAX):
        if z.frames[i] < a.sb.fresh * PAGEBLOCK_FRAMES:
            page = &a.pages[z.frames[i]]
            if page.owner == OWNER_ZSMALLOC and page.ref == number:
                page.owner = OWNER_NONE


cdef bint frames_claim(pool_t* pool, size_class_t* c, uint32_t number, pool_recovery_t* found) noexcept nogil:
    """False for a zspage that lists a frame which does not exist, or which is another's. Of two zspages that
    list one frame, it is that of the zspage which the frame itself names."""
    cdef arena_t* a = pool.arena
    cdef zspage_desc_t* z = &a.zspages[number]
    cdef page_desc_t* page
    cdef uint32_t i
    for i in range(c.pages):
        if z.frames[i] >= a.sb.fresh * PAGEBLOCK_FRAMES:
            return False
        page = &a.pages[z.frames[i]]
        if page.owner == OWNER_ZSMALLOC:
            if page.next != number or page.ref == number:
                return False
            zspage_drop(pool, page.ref, found)
        page.owner = OWNER_ZSMALLOC
        page.ref = number
        page.flags = PG_USED | PG_MOVABLE
    return True


cdef void zspages_claim(pool_t* pool, pool_recovery_t* found) noexcept nogil:
    """Afterwards a zspage with a magic has a class and frames of its own."""
    cdef size_class_t* c
    cdef uint32_t number
    for number in range(pool.arena.sb.next_number):
        if pool.arena.zspages[number].magic == ZSPAGE_MAGIC:
            c = zspage_class(pool, &pool.arena.zspages[number])
            if c == NULL or not frames_claim(pool, c, number, found):
                zspage_drop(pool, number, found)


cdef void objects_recover(pool_t* pool, size_class_t* c, uint32_t number, object_named_t named, void* ctx,
                          pool_recovery_t* found) noexcept nogil:
    """Frees what is not named, and chains what is free, the lowest index first."""
    cdef zspage_desc_t* z = &pool.arena.zspages[number]
    cdef uint32_t idx = c.objs, chain = c.objs, size, room = FRAME_SIZE if is_huge(c) else c.size - OBJ_HEADER
    cdef uint64_t header
    cdef uint64_t* at
    z.inuse = 0
    while idx > 0:
        idx -= 1
        at = header_ptr(pool, z, c, idx)
        header = at[0]
        if header & HDR_ALLOCATED:
            size = <uint32_t>((header >> 1) & HDR_SIZE_MASK)
            if size <= room and named(ctx, header >> HDR_TAG_SHIFT, loc_of(number, idx), size):
                z.inuse += 1
                continue
            found.objects_freed += 1
            if pool.wipe:
                object_zero(pool, z, data_offset(c, idx), min(size, room))
                order_stores()
        at[0] = <uint64_t>chain << 1
        chain = idx
    z.freeobj = <uint16_t>chain


cdef size_class_t* zspage_class(pool_t* pool, zspage_desc_t* z) noexcept nogil:
    """NULL if it has none."""
    cdef size_class_t* c
    if z.class_idx >= NR_RAW_CLASSES:
        return NULL
    c = pool.by_index[z.class_idx]
    return c if c.index == z.class_idx else NULL


cdef inline void headers_fetch(pool_t* pool, uint32_t number) noexcept nogil:
    """Asks for the headers of a zspage's objects, each in a line of its own, before they are read. A page
    stored takes 34 ns of CPU with it, all of the adoption counted, and 42 ns without."""
    cdef zspage_desc_t* z = &pool.arena.zspages[number]
    cdef size_class_t* c
    cdef uint32_t off = 0, frame
    if z.magic != ZSPAGE_MAGIC or z.class_idx >= NR_RAW_CLASSES:
        return
    c = pool.by_index[z.class_idx]
    # The header of a huge one lies in the descriptor.
    while not is_huge(c) and off < c.objs * c.size:
        frame = z.frames[off >> FRAME_SHIFT]
        if frame < pool.arena.nr_frames:
            fetch_line(frame_ptr(pool.arena, frame) + (off & (FRAME_SIZE - 1)))
        off += c.size


cdef void number_free(pool_t* pool, uint32_t number) noexcept nogil:
    pool.arena.zspages[number].magic = 0
    zspage_stack_push(pool.arena.zspages, &pool.free_number, number)


cdef void zspages_recover(pool_t* pool, object_named_t named, void* ctx,
                          pool_recovery_t* found) noexcept nogil:
    cdef arena_t* a = pool.arena
    cdef zspage_desc_t* z
    cdef size_class_t* c
    # From the highest down, so that low numbers are used first afterwards.
    cdef uint32_t number = a.sb.next_number, i
    while number > 0:
        number -= 1
        if number >= HEADERS_AHEAD:
            headers_fetch(pool, number - HEADERS_AHEAD)
        z = &a.zspages[number]
        if z.magic != ZSPAGE_MAGIC:
            number_free(pool, number)
            continue
        c = pool.by_index[z.class_idx]
        z.rwlock = 0
        z.isolated = 0
        objects_recover(pool, c, number, named, ctx, found)
        if z.inuse == 0:
            found.zspages_freed += 1
            number_free(pool, number)
            for i in range(c.pages):
                a.pages[z.frames[i]].owner = OWNER_NONE
                a.pages[z.frames[i]].flags = PG_USED
            continue
        zspage_insert_locked(pool, c, number)
        c.zspages += 1
        c.inuse += z.inuse
        pool.pages += c.pages
        found.zspages += 1
        found.objects += z.inuse


# ---- pageblocks ---------------------------------------------------------------------------------

cdef uint32_t frames_settle(pool_t* pool, uint32_t pb, pool_recovery_t* found) noexcept nogil:
    """Frees what is not claimed, without putting it into a list. The frames in use."""
    cdef arena_t* a = pool.arena
    cdef uint32_t frame, used = 0
    cdef page_desc_t* page
    for frame in range(pb * PAGEBLOCK_FRAMES, (pb + 1) * PAGEBLOCK_FRAMES):
        page = &a.pages[frame]
        if not page.flags & PG_USED:
            continue
        if page.owner == OWNER_NONE:
            found.frames_freed += 1
            if pool.wipe:
                # Not zeroed: a hole of the balloon's has no memory.
                arena_punch_hole(a, frame)
            page.flags = 0
            continue
        used += 1
        if page.owner == OWNER_BALLOON:
            page.flags = PG_USED | PG_MOVABLE
            page_list_push(a.pages, &a.left_frames, frame)
            a.nr_left += 1
    return used


cdef void pageblock_recover(arena_t* a, uint32_t pb, uint32_t used) noexcept nogil:
    """Of one that is in use."""
    cdef uint32_t first = pb * PAGEBLOCK_FRAMES, frame
    cdef pageblock_desc_t* desc = &a.pageblocks[pb]
    desc.flags = PB_IN_USE
    desc.skip = 0
    desc.defer = 0
    desc.nr_free = <uint16_t>(PAGEBLOCK_FRAMES - used)
    # What is free may have no memory: a hole of the balloon's, or a unit that was not populated yet.
    desc.ready = NONE32
    for frame in range(first, first + PAGEBLOCK_FRAMES):
        if not a.pages[frame].flags & PG_USED:
            desc.ready &= ~units_of(frame, 1)
            block_merge_locked(a, frame, 0)
    a.pageblocks_in_use += 1
    a.frames_used += used


cdef void pageblocks_recover(pool_t* pool, uint64_t keep, pool_recovery_t* found) noexcept nogil:
    """Whole free pageblocks that keep their memory come last onto the stack, and so are taken from it
    first."""
    cdef arena_t* a = pool.arena
    cdef uint32_t pb, used, kept = NONE32
    for pb in range(a.sb.fresh):
        used = frames_settle(pool, pb, found)
        if used != 0:
            pageblock_recover(a, pb, used)
            found.pageblocks += 1
        elif a.pageblocks[pb].flags == 0:
            pageblock_stack_push(a.pageblocks, &a.returned, pb)
            a.nr_returned += 1
        elif keep != 0:
            a.pageblocks[pb].flags = PB_HELD
            keep -= 1
            pageblock_stack_push(a.pageblocks, &kept, pb)
        else:
            a.pageblocks[pb].flags = PB_HELD
            found.pageblocks_freed += 1
            arena_punch(a, pb, PAGEBLOCK_SIZE)
    while kept != NONE32:
        pb = kept
        kept = a.pageblocks[pb].next
        pageblock_stack_push(a.pageblocks, &a.returned, pb)
        a.nr_returned += 1


cdef void units_populate(arena_t* a) noexcept nogil:
    """With a reserve an allocation finds memory in every pageblock in use. If the OS refuses it here, the
    first allocation there asks again."""
    cdef uint32_t pb
    for pb in range(a.sb.fresh):
        if a.pageblocks[pb].flags == PB_IN_USE and a.pageblocks[pb].ready != NONE32:
            arena_populate_frames(a, pb * PAGEBLOCK_FRAMES, PAGEBLOCK_FRAMES)


cdef void pool_recover(pool_t* pool, object_named_t named, void* ctx, uint64_t keep,
                       pool_recovery_t* found) noexcept nogil:
    memset(found, 0, sizeof(found[0]))
    reach_recover(pool.arena)
    pages_forget(pool.arena)
    zspages_claim(pool, found)
    zspages_recover(pool, named, ctx, found)
    pageblocks_recover(pool, keep, found)
    pool.arena.reserved = pool.arena.nr_left
    if keep != 0:
        units_populate(pool.arena)
    max64(&pool.arena.sb.max_pages, pool.pages)
    if pool.arena.sb.balloon_target > pool.arena.nr_frames:
        pool.arena.sb.balloon_target = pool.arena.nr_left
