# SPDX-License-Identifier: Apache-2.0
# Locks: see zspage.pxd. Functions named _locked hold the lock of the class they are given.
"""zsmalloc: objects packed into zspages, by size class.

A new object goes into the fullest zspage that has room; a zspage without objects is freed. The rules are
those of the kernel's mm/zsmalloc.c and Documentation/mm/zsmalloc.rst.
"""
from libc.errno cimport EINVAL, EIO, ENOMEM, ENOSPC
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from allocator.buddy cimport arena_alloc_frames, arena_free_frames
from allocator.frames cimport frame_ptr
from allocator.headroom cimport headroom_take
from allocator.layout cimport *
from allocator.migrate cimport clear_page_movable, page_lock, page_trylock, page_unlock, set_page_movable
from allocator.lists cimport zspage_stack_pop, zspage_stack_push
from allocator.populate cimport arena_populate_zspages
from allocator.prim cimport *
from allocator.zspage cimport (
    class_for, data_offset, find_fullest_locked, header_ptr, is_huge, loc_idx, loc_zspage, obj_alloc_locked,
    obj_free_locked, object_copy_in, object_view, pool_t, size_class_t, zspage_fix_fullness_locked,
    zspage_insert_locked, zspage_read_lock, zspage_read_unlock, zspage_remove_locked,
)


cdef enum:
    NUMBERS_A_PAGE = 64     # zspage descriptors of 64 bytes


# ---- zspages --------------------------------------------------------------------------------

cdef uint32_t number_take_locked(pool_t* pool) noexcept nogil:
    """Under number_lock. A number whose descriptor has its memory, or NONE32."""
    cdef uint32_t number = zspage_stack_pop(pool.arena.zspages, &pool.free_number)
    if number != NONE32 or pool.arena.sb.next_number == pool.arena.nr_frames:
        return number
    # A reserve brings the descriptors of all numbers with it.
    if pool.arena.sb.next_number >= pool.arena.sb.numbers_described and peek64(&pool.arena.ready_target) == 0:
        return NONE32
    pool.arena.sb.next_number += 1
    return pool.arena.sb.next_number - 1


cdef uint32_t number_take(pool_t* pool) noexcept nogil:
    """NONE32: the arena has no more, or the OS refuses the memory of more descriptors."""
    cdef uint32_t number, first
    while True:
        pthread_mutex_lock(&pool.number_lock)
        number = number_take_locked(pool)
        first = pool.arena.sb.next_number
        pthread_mutex_unlock(&pool.number_lock)
        if number != NONE32 or first == pool.arena.nr_frames:
            return number
        # Without the lock: another thread may do the same meanwhile, which does no harm.
        first -= first % NUMBERS_A_PAGE
        if arena_populate_zspages(pool.arena, first, NUMBERS_A_PAGE) != 0:
            return NONE32
        pthread_mutex_lock(&pool.number_lock)
        if pool.arena.sb.numbers_described < first + NUMBERS_A_PAGE:
            pool.arena.sb.numbers_described = first + NUMBERS_A_PAGE
        pthread_mutex_unlock(&pool.number_lock)


cdef void number_put(pool_t* pool, uint32_t number) noexcept nogil:
    pthread_mutex_lock(&pool.number_lock)
    zspage_stack_push(pool.arena.zspages, &pool.free_number, number)
    pthread_mutex_unlock(&pool.number_lock)


cdef uint64_t pool_claim_pages(pool_t* pool, uint32_t n, uint32_t over) noexcept nogil:
    """Counts n pages more and returns the pool's pages with them; 0, and nothing is counted, if they would be
    more than over above the limit, or above what the host can give. A count that had to be taken back could
    turn away another thread's smaller zspage, which still fits."""
    cdef uint64_t limit = peek64(&pool.arena.sb.limit_pages), pages
    while True:
        pages = peek64(&pool.pages)
        # The pool may not use what the balloon holds.
        if limit != 0 and pages + n + peek64(&pool.arena.reserved) > limit + over:
            return 0
        if pool.headroom != NULL and not headroom_take(pool.headroom, pages, n, over):
            return 0
        if cas64(&pool.pages, pages, pages + n):
            return pages + n


cdef int zspage_new(pool_t* pool, size_class_t* c, uint32_t over, uint32_t* number) noexcept nogil:
    """A complete empty zspage, in no list: 0, -ENOSPC at the limit, or -ENOMEM."""
    cdef uint64_t pages = pool_claim_pages(pool, c.pages, over)
    cdef zspage_desc_t* z
    cdef uint32_t i
    cdef int r
    if pages == 0:
        return -ENOSPC
    number[0] = number_take(pool)
    if number[0] == NONE32:
        sub64(&pool.pages, c.pages)
        return -ENOMEM
    z = &pool.arena.zspages[number[0]]
    r = arena_alloc_frames(pool.arena, <int>c.pages, OWNER_ZSMALLOC, number[0], z.frames)
    if r != 0:
        number_put(pool, number[0])
        sub64(&pool.pages, c.pages)
        return r
    max64(&pool.arena.sb.max_pages, pages)
    z.inuse = 0
    z.freeobj = 0
    z.class_idx = <uint8_t>c.index
    z.fullness = FULLNESS_OFF_LIST
    z.rwlock = 0
    z.isolated = 0
    for i in range(c.objs):
        header_ptr(pool, z, c, i)[0] = (i + 1) << 1
    store16(&z.magic, ZSPAGE_MAGIC)
    for i in range(c.pages):
        set_page_movable(pool.arena, z.frames[i], OWNER_ZSMALLOC, number[0])
    return 0


cdef bint zspage_disown_pages(pool_t* pool, size_class_t* c, zspage_desc_t* z, bint wait) noexcept nogil:
    """Locks all pages of a zspage and ends their ownership. Without wait: False, and nothing is done, if the
    migration core has locked one of them."""
    cdef uint32_t i, locked
    for locked in range(c.pages):
        if wait:
            page_lock(pool.arena, z.frames[locked])
        elif not page_trylock(pool.arena, z.frames[locked]):
            for i in range(locked):
                page_unlock(pool.arena, z.frames[i])
            return False
    for i in range(c.pages):
        clear_page_movable(pool.arena, z.frames[i])
        page_unlock(pool.arena, z.frames[i])
    return True


cdef void zspage_delete(pool_t* pool, size_class_t* c, uint32_t number) noexcept nogil:
    """Frees a zspage whose pages have no owner any more."""
    cdef zspage_desc_t* z = &pool.arena.zspages[number]
    store16(&z.magic, 0)
    order_stores()
    arena_free_frames(pool.arena, <int>c.pages, z.frames)
    number_put(pool, number)
    sub64(&pool.pages, c.pages)


cdef void zspage_defer_free(pool_t* pool, uint32_t number) noexcept nogil:
    pthread_mutex_lock(&pool.number_lock)
    zspage_stack_push(pool.arena.zspages, &pool.deferred, number)
    pthread_mutex_unlock(&pool.number_lock)


cdef void zspage_free(pool_t* pool, size_class_t* c, uint32_t number) noexcept nogil:
    """An empty zspage that stands in no list and is no longer counted in its class. Never waits."""
    if zspage_disown_pages(pool, c, &pool.arena.zspages[number], False):
        zspage_delete(pool, c, number)
    else:
        zspage_defer_free(pool, number)


cdef uint32_t zs_flush_deferred(pool_t* pool) noexcept nogil:
    cdef uint32_t number, n = 0
    cdef size_class_t* c
    while True:
        pthread_mutex_lock(&pool.number_lock)
        number = zspage_stack_pop(pool.arena.zspages, &pool.deferred)
        pthread_mutex_unlock(&pool.number_lock)
        if number == NONE32:
            return n
        c = pool.by_index[pool.arena.zspages[number].class_idx]
        zspage_disown_pages(pool, c, &pool.arena.zspages[number], True)
        zspage_delete(pool, c, number)
        n += 1


cdef inline size_class_t* class_of(pool_t* pool, uint64_t loc) noexcept nogil:
    """The class of the zspage that a location names; NULL if there is none, and counted if that is not meant
    (LOC_NONE)."""
    cdef uint32_t number = loc_zspage(loc)
    cdef zspage_desc_t* z = &pool.arena.zspages[number]
    cdef size_class_t* c
    if number < pool.arena.nr_frames and z.magic == ZSPAGE_MAGIC and z.class_idx < NR_RAW_CLASSES:
        c = pool.by_index[z.class_idx]
        if loc_idx(loc) < c.objs:
            return c
    if number != NONE32:
        add64(&pool.corrupt, 1)
    return NULL


# ---- allocation -----------------------------------------------------------------------------

cdef int zs_malloc(pool_t* pool, uint32_t size, uint64_t tag, uint64_t* loc) noexcept nogil:
    return zs_malloc_over(pool, size, tag, 0, loc)


cdef int zs_malloc_over(pool_t* pool, uint32_t size, uint64_t tag, uint32_t over,
                        uint64_t* loc) noexcept nogil:
    cdef size_class_t* c
    cdef uint32_t number
    cdef int r
    if size == 0 or size > ZS_MAX_ALLOC or tag >> TAG_BITS != 0:
        return -EINVAL
    c = class_for(pool, size)
    pthread_mutex_lock(&c.lock)
    number = find_fullest_locked(c)
    if number == NONE32:
        # Frames are fetched without the lock: another thread may use and free objects meanwhile.
        pthread_mutex_unlock(&c.lock)
        r = zspage_new(pool, c, over, &number)
        if r != 0:
            return r
        pthread_mutex_lock(&c.lock)
        c.zspages += 1
        zspage_insert_locked(pool, c, number)
    loc[0] = obj_alloc_locked(pool, c, number, size, tag)
    pthread_mutex_unlock(&c.lock)
    return 0


cdef void zs_wake_after(pool_t* pool, uint64_t n) noexcept nogil:
    store64(&pool.wake_at, peek64(&pool.frees) + n)


cdef inline void pool_count_free(pool_t* pool) noexcept nogil:
    cdef uint64_t frees = add64(&pool.frees, 1), at = peek64(&pool.wake_at), one = 1
    if at != 0 and frees >= at and cas64(&pool.wake_at, at, 0):
        # An eventfd takes any number of these; nothing is lost if it is full.
        write(pool.wake_fd, &one, sizeof(one))


cdef int zs_free(pool_t* pool, uint64_t loc) noexcept nogil:
    cdef size_class_t* c = class_of(pool, loc)
    cdef uint32_t number = loc_zspage(loc)
    cdef int size
    cdef bint empty
    if c == NULL:
        return -EIO
    pthread_mutex_lock(&c.lock)
    size = obj_free_locked(pool, c, loc)
    # An isolated zspage is off the lists: putback or the end of its migration frees it.
    empty = (size >= 0 and pool.arena.zspages[number].inuse == 0
             and pool.arena.zspages[number].isolated == 0)
    if empty:
        zspage_remove_locked(pool, c, number)
        c.zspages -= 1
    elif size >= 0:
        zspage_fix_fullness_locked(pool, c, number)
    pthread_mutex_unlock(&c.lock)
    if empty:
        zspage_free(pool, c, number)
    pool_count_free(pool)
    return size


cdef int zs_write(pool_t* pool, uint64_t loc, const uint8_t* src, uint32_t n) noexcept nogil:
    cdef size_class_t* c = class_of(pool, loc)
    cdef zspage_desc_t* z = &pool.arena.zspages[loc_zspage(loc)]
    if c == NULL:
        return -EIO
    zspage_read_lock(z)
    object_copy_in(pool, z, data_offset(c, loc_idx(loc)), src, n)
    zspage_read_unlock(z)
    return 0


cdef const uint8_t* zs_map(pool_t* pool, uint64_t loc, uint8_t* scratch, uint32_t* size) noexcept nogil:
    cdef size_class_t* c = class_of(pool, loc)
    cdef zspage_desc_t* z = &pool.arena.zspages[loc_zspage(loc)]
    cdef uint64_t header
    cdef uint32_t n, off
    if c == NULL:
        return NULL
    zspage_read_lock(z)
    off = data_offset(c, loc_idx(loc))
    fetch_object(frame_ptr(pool.arena, z.frames[off >> FRAME_SHIFT]) + (off & (FRAME_SIZE - 1)))
    header = header_ptr(pool, z, c, loc_idx(loc))[0]
    n = <uint32_t>((header >> 1) & HDR_SIZE_MASK)
    if not header & HDR_ALLOCATED or n > ZS_MAX_ALLOC or (n > c.size - OBJ_HEADER and not is_huge(c)):
        zspage_read_unlock(z)
        add64(&pool.corrupt, 1)
        return NULL
    size[0] = n
    return object_view(pool, z, off, n, scratch)


cdef void zs_unmap(pool_t* pool, uint64_t loc) noexcept nogil:
    zspage_read_unlock(&pool.arena.zspages[loc_zspage(loc)])
