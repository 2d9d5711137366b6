# SPDX-License-Identifier: Apache-2.0
# Locks: see zspage.pxd. Functions named _locked hold the lock of the class they are given.
"""Object compaction: the objects of the sparsest zspages of a class move into its fullest ones, and
zspages that are empty then are freed.

For each object the user of the pool is asked for a pin (pool_ops_t.pin), and told where the object lies
afterwards. An object that is in use stays where it is, and its zspage with it, until the next pass.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from allocator.layout cimport FRAME_SIZE, HDR_ALLOCATED, HDR_SIZE_MASK, HDR_TAG_SHIFT, NONE32, zspage_desc_t
from allocator.prim cimport add64, now_ns, pthread_mutex_lock, pthread_mutex_unlock
from allocator.zsmalloc cimport zspage_free
from allocator.zspage cimport (
    data_offset, find_fullest_locked, find_sparsest_locked, header_ptr, is_huge, loc_idx, loc_of,
    obj_alloc_locked, obj_free_locked, object_copy_in, object_view, pool_t, size_class_t,
    zspage_insert_locked, zspage_remove_locked,
)

cdef enum:
    COMPACT_PASSES = 3      # an object that its user holds is tried again on the next pass
    SLICE_ZSPAGES = 8       # emptied between two looks at the clock, at most about 100 us


cdef bint move_object_locked(pool_t* pool, size_class_t* c, uint32_t src, uint32_t idx) noexcept nogil:
    """Moves one allocated object of src, which is off the lists, into the fullest zspage with room.
    False if there is no room or its user holds it."""
    cdef zspage_desc_t* from_ = &pool.arena.zspages[src]
    cdef uint64_t header = header_ptr(pool, from_, c, idx)[0]
    cdef uint64_t tag = header >> HDR_TAG_SHIFT
    cdef uint32_t size = <uint32_t>((header >> 1) & HDR_SIZE_MASK)
    cdef uint32_t dst = find_fullest_locked(c)
    cdef uint64_t loc
    cdef uint8_t scratch[FRAME_SIZE]
    if dst == NONE32 or not pool.ops.pin(pool.ops.ctx, tag, loc_of(src, idx)):
        return False
    loc = obj_alloc_locked(pool, c, dst, size, tag)
    object_copy_in(pool, &pool.arena.zspages[dst], data_offset(c, loc_idx(loc)),
            object_view(pool, from_, data_offset(c, idx), size, scratch), size)
    pool.ops.moved(pool.ops.ctx, tag, loc)
    obj_free_locked(pool, c, loc_of(src, idx))
    return True


cdef bint empty_zspage_locked(pool_t* pool, size_class_t* c, uint32_t src) noexcept nogil:
    """Moves every object of src elsewhere; False if one had to stay."""
    cdef zspage_desc_t* z = &pool.arena.zspages[src]
    cdef uint32_t idx
    for idx in range(c.objs):
        if z.inuse == 0:
            break
        if header_ptr(pool, z, c, idx)[0] & HDR_ALLOCATED:
            if not move_object_locked(pool, c, src, idx):
                return False
    return z.inuse == 0


cdef uint64_t zs_compact_class(pool_t* pool, size_class_t* c, uint32_t max_zspages,
                               bint* more) noexcept nogil:
    """Drops the class lock after each zspage, so that it is held for the copy of one zspage's objects at
    most: 32 KiB, about 10 us."""
    cdef uint64_t freed = 0
    cdef uint32_t src
    cdef bint emptied
    more[0] = False
    if is_huge(c):
        return 0
    while True:
        pthread_mutex_lock(&c.lock)
        src = find_sparsest_locked(c)
        if src == NONE32 or c.zspages * c.objs - c.inuse < c.objs:
            pthread_mutex_unlock(&c.lock)
            break
        if max_zspages == 0:
            more[0] = True
            pthread_mutex_unlock(&c.lock)
            break
        max_zspages -= 1
        zspage_remove_locked(pool, c, src)
        emptied = empty_zspage_locked(pool, c, src)
        if emptied:
            c.zspages -= 1
        else:
            zspage_insert_locked(pool, c, src)
        pthread_mutex_unlock(&c.lock)
        if not emptied:
            break
        zspage_free(pool, c, src)
        freed += c.pages
    add64(&pool.arena.sb.pages_compacted, freed)
    return freed


cdef uint64_t zs_compact(pool_t* pool) noexcept nogil:
    cdef uint64_t freed = 0
    cdef uint32_t i
    cdef int _pass
    cdef bint more
    for _pass in range(COMPACT_PASSES):
        for i in range(pool.nr_classes):
            freed += zs_compact_class(pool, &pool.classes[i], NONE32, &more)
    return freed


cdef uint32_t zs_compact_slice(pool_t* pool, uint32_t first, uint64_t until) noexcept nogil:
    cdef bint more = False
    while first < pool.nr_classes and now_ns() < until:
        zs_compact_class(pool, &pool.classes[first], SLICE_ZSPAGES, &more)
        if not more:
            first += 1
    return first


cdef uint64_t zs_freeable(pool_t* pool) noexcept nogil:
    cdef uint64_t pages = 0
    cdef size_class_t* c
    cdef uint32_t i
    for i in range(pool.nr_classes):
        c = &pool.classes[i]
        pthread_mutex_lock(&c.lock)
        pages += (c.zspages * c.objs - c.inuse) // c.objs * c.pages
        pthread_mutex_unlock(&c.lock)
    return pages
