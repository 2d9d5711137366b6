# SPDX-License-Identifier: Apache-2.0
# Locks: see zspage.pxd. Functions named _locked hold the lock of the class they are given.
"""zsmalloc as an owner of movable pages: how frames of zspages are isolated, migrated and put back. The
contracts of these calls are in migrate.pyx.
"""
from libc.errno cimport EAGAIN, EBUSY, EIO
from libc.stdint cimport uint32_t
from libc.string cimport memcpy, memset

from allocator.frames cimport frame_ptr
from allocator.layout cimport *
from allocator.migrate cimport clear_page_movable, set_page_movable
from allocator.prim cimport add64, order_stores, pthread_mutex_lock, pthread_mutex_unlock, store32
from allocator.zsmalloc cimport zspage_defer_free
from allocator.zspage cimport (
    pool_t, size_class_t, zspage_insert_locked, zspage_remove_locked, zspage_write_trylock,
    zspage_write_unlock,
)


cdef size_class_t* class_of_page(pool_t* pool, uint32_t frame, uint32_t* number) noexcept nogil:
    """Of a locked page; NULL, and counted, if it names no zspage that lists it."""
    cdef uint32_t i
    cdef zspage_desc_t* z
    cdef size_class_t* c
    number[0] = pool.arena.pages[frame].ref
    if number[0] < pool.arena.nr_frames:
        z = &pool.arena.zspages[number[0]]
        if z.magic == ZSPAGE_MAGIC and z.class_idx < NR_RAW_CLASSES:
            c = pool.by_index[z.class_idx]
            for i in range(c.pages):
                if z.frames[i] == frame:
                    return c
    add64(&pool.corrupt, 1)
    return NULL


cdef bint zs_isolate(void* ctx, uint32_t frame) noexcept nogil:
    cdef pool_t* pool = <pool_t*>ctx
    cdef uint32_t number = 0
    cdef size_class_t* c = class_of_page(pool, frame, &number)
    cdef zspage_desc_t* z
    cdef bint taken
    if c == NULL:
        return False
    z = &pool.arena.zspages[number]
    pthread_mutex_lock(&c.lock)
    # An empty zspage is being freed. One that is off the lists and not isolated is being made or freed.
    taken = z.inuse != 0 and (z.fullness != FULLNESS_OFF_LIST or z.isolated != 0)
    if taken:
        # Off the list with the first page, so that no allocation can hit it.
        if z.isolated == 0:
            zspage_remove_locked(pool, c, number)
            c.isolated += 1
        z.isolated += 1
    pthread_mutex_unlock(&c.lock)
    return taken


cdef bint end_isolation_locked(pool_t* pool, size_class_t* c, uint32_t number) noexcept nogil:
    """Ends the isolation of one page. True if that leaves an empty zspage, which is no longer counted and has
    to be freed."""
    cdef zspage_desc_t* z = &pool.arena.zspages[number]
    z.isolated -= 1
    if z.isolated != 0:
        return False
    c.isolated -= 1
    if z.inuse != 0:
        zspage_insert_locked(pool, c, number)
        return False
    c.zspages -= 1
    return True


cdef int zs_migrate(void* ctx, uint32_t new, uint32_t old) noexcept nogil:
    """The move changes one word of the zspage. Locations, and so slots, stay as they are. A thread that reads
    or writes the zspage's bytes has it locked for reading, and the zspage is busy then."""
    cdef pool_t* pool = <pool_t*>ctx
    cdef uint32_t number = 0, i = 0
    cdef size_class_t* c = class_of_page(pool, old, &number)
    cdef zspage_desc_t* z
    if c == NULL:
        return -EIO
    z = &pool.arena.zspages[number]
    if not zspage_write_trylock(z):
        return -EAGAIN
    pthread_mutex_lock(&c.lock)
    if z.inuse == 0:
        pthread_mutex_unlock(&c.lock)
        zspage_write_unlock(z)
        return -EBUSY
    while z.frames[i] != old:
        i += 1
    memcpy(frame_ptr(pool.arena, new), frame_ptr(pool.arena, old), FRAME_SIZE)
    set_page_movable(pool.arena, new, OWNER_ZSMALLOC, number)
    store32(&z.frames[i], new)
    order_stores()
    if pool.wipe:
        memset(frame_ptr(pool.arena, old), 0, FRAME_SIZE)
    clear_page_movable(pool.arena, old)
    end_isolation_locked(pool, c, number)
    pthread_mutex_unlock(&c.lock)
    zspage_write_unlock(z)
    return 0


cdef void zs_putback(void* ctx, uint32_t frame) noexcept nogil:
    cdef pool_t* pool = <pool_t*>ctx
    cdef uint32_t number = 0
    cdef size_class_t* c = class_of_page(pool, frame, &number)
    cdef bint empty
    if c == NULL:
        return
    pthread_mutex_lock(&c.lock)
    empty = end_isolation_locked(pool, c, number)
    pthread_mutex_unlock(&c.lock)
    if empty:
        # The caller holds the lock of its page.
        zspage_defer_free(pool, number)
