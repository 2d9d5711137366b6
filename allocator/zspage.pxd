# SPDX-License-Identifier: Apache-2.0
# Locks of a pool, outermost first:
#   the user's pin (a slot's lock bit)
#   the page lock
#   zspage_desc_t.rwlock
#   size_class_t.lock
#   pool_t.number_lock
#   the locks of the arena (frames.pxd), or headroom_t.lock; neither inside the other
# Rules:
#   - The migration core holds the page lock around the owner's calls. Freeing a zspage only tries the
#     page lock; if it is taken, the zspage goes to the deferred list.
#   - Readers of a zspage may wait for its writer. A writer only tries.
#   - Under size_class_t.lock the user's pin is only tried (pool_ops_t.pin).
#   - Nobody allocates frames under size_class_t.lock or number_lock: that may wait for memory.
#   - Functions named _locked hold the lock of the class that they are given.
"""Zspages: 1 to 8 frames that hold the objects of one size class, and the structs of a pool of them.

An object carries an 8-byte header with its size and its user's tag. An object that is too large to share a
page is called huge: it has a page of its own, and its header stands in the zspage descriptor. An object is
found by its location (zspage, index), never by an address. All code here is inline, because allocating,
reading and freeing an object call it several times each.
"""
from libc.errno cimport EIO
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from allocator.frames cimport arena_t, frame_ptr
from allocator.headroom cimport headroom_t
from allocator.layout cimport (
    FRAME_SHIFT, FRAME_SIZE, FULLNESS_99, FULLNESS_EMPTY, FULLNESS_FULL, FULLNESS_OFF_LIST, HDR_ALLOCATED,
    HDR_SIZE_MASK, HDR_TAG_SHIFT, LOC_IDX_BITS, NONE32, NR_FULLNESS, NR_RAW_CLASSES, OBJ_HEADER,
    ZS_CLASS_DELTA, ZS_MAX_ALLOC, ZS_MIN_ALLOC, zspage_desc_t,
)
from allocator.lists cimport zspage_list_push, zspage_list_remove
from allocator.prim cimport add64, cas_i32, load_i32, pthread_mutex_t, relax, store_i32, sub_i32


# What object compaction asks of the pool's user, by the tag that the user gave an object.
cdef struct pool_ops_t:
    void* ctx
    # Tries to pin the object that is named tag and, as far as the pool knows, lies at loc. True: the
    # user will not touch the object, and agrees that it lies at loc. Never waits.
    bint (*pin)(void* ctx, uint64_t tag, uint64_t loc) noexcept nogil
    # The pinned object lies at loc now: record that, and unpin.
    void (*moved)(void* ctx, uint64_t tag, uint64_t loc) noexcept nogil


cdef struct size_class_t:
    # constant
    uint32_t size                   # bytes of an object with its header
    uint32_t objs                   # per zspage
    uint32_t pages                  # per zspage
    uint32_t index                  # raw class number
    pthread_mutex_t lock
    # all below: guarded by lock
    uint32_t head[NR_FULLNESS]      # lists of zspage numbers
    uint64_t nr[NR_FULLNESS]        # their lengths
    uint64_t zspages                # all, also those off the lists
    uint64_t isolated               # zspages off the lists because the migration core has pages of them
    uint64_t inuse                  # objects
    uint64_t pad[3]


cdef struct pool_t:
    # constant
    arena_t* arena
    pool_ops_t ops
    headroom_t* headroom            # asked before pages are taken; NULL = nobody is
    size_class_t* by_index[NR_RAW_CLASSES]
    size_class_t classes[NR_RAW_CLASSES]
    uint32_t nr_classes
    uint32_t huge_size              # objects of this many bytes and more take a page of their own
    bint wipe                       # bytes of objects that were freed or moved away are zeroed at once
    pthread_mutex_t number_lock
    uint32_t free_number            # guarded by number_lock: list of free zspage numbers
    uint32_t deferred               # guarded by number_lock: list of empty zspages to be freed
    # atomic
    uint64_t pages
    uint64_t corrupt
    uint64_t frees                  # objects freed since creation
    uint64_t wake_at                # the free with this number writes to wake_fd; 0 = none does
    int wake_fd                     # an eventfd of the user's, or -1; constant while wake_at is set


# ---- locations and classes ------------------------------------------------------------------

cdef inline uint64_t loc_of(uint32_t zspage, uint32_t idx) noexcept nogil:
    return (<uint64_t>zspage << LOC_IDX_BITS) | idx


cdef inline uint32_t loc_zspage(uint64_t loc) noexcept nogil:
    return <uint32_t>(loc >> LOC_IDX_BITS)


cdef inline uint32_t loc_idx(uint64_t loc) noexcept nogil:
    return <uint32_t>(loc & ((1u << LOC_IDX_BITS) - 1))


# The class for objects of size bytes. Of two sizes, the one in the smaller class takes less memory.
cdef inline size_class_t* class_for(pool_t* pool, uint32_t size) noexcept nogil:
    cdef uint32_t total = size + OBJ_HEADER
    if total <= ZS_MIN_ALLOC:
        return pool.by_index[0]
    if total > ZS_MAX_ALLOC:
        total = ZS_MAX_ALLOC
    return pool.by_index[(total - ZS_MIN_ALLOC + ZS_CLASS_DELTA - 1) // ZS_CLASS_DELTA]


cdef inline bint is_huge(const size_class_t* c) noexcept nogil:
    return c.objs == 1


# ---- objects in frames ----------------------------------------------------------------------

# The header word of object idx; the caller holds the class lock, or the zspage for reading.
cdef inline uint64_t* header_ptr(pool_t* pool, zspage_desc_t* z, size_class_t* c,
                                 uint32_t idx) noexcept nogil:
    # Objects start at multiples of 16, so a header never straddles two frames.
    cdef uint32_t off = idx * c.size
    if is_huge(c):
        return &z.huge_header
    return <uint64_t*>(frame_ptr(pool.arena, z.frames[off >> FRAME_SHIFT]) + (off & (FRAME_SIZE - 1)))


cdef inline uint32_t data_offset(size_class_t* c, uint32_t idx) noexcept nogil:
    return idx * c.size + (0 if is_huge(c) else OBJ_HEADER)


cdef inline void object_copy_in(pool_t* pool, zspage_desc_t* z, uint32_t off, const uint8_t* src,
                         uint32_t n) noexcept nogil:
    cdef uint32_t room = FRAME_SIZE - (off & (FRAME_SIZE - 1))
    cdef uint32_t i = off >> FRAME_SHIFT
    cdef uint32_t first = n if n < room else room
    memcpy(frame_ptr(pool.arena, z.frames[i]) + (off & (FRAME_SIZE - 1)), src, first)
    if n > first:
        memcpy(frame_ptr(pool.arena, z.frames[i + 1]), src + first, n - first)


cdef inline void object_zero(pool_t* pool, zspage_desc_t* z, uint32_t off, uint32_t n) noexcept nogil:
    cdef uint32_t room = FRAME_SIZE - (off & (FRAME_SIZE - 1))
    cdef uint32_t i = off >> FRAME_SHIFT
    cdef uint32_t first = n if n < room else room
    memset(frame_ptr(pool.arena, z.frames[i]) + (off & (FRAME_SIZE - 1)), 0, first)
    if n > first:
        memset(frame_ptr(pool.arena, z.frames[i + 1]), 0, n - first)


cdef inline const uint8_t* object_view(pool_t* pool, zspage_desc_t* z, uint32_t off, uint32_t n,
                                uint8_t* scratch) noexcept nogil:
    """n bytes at off, in place where they lie in one piece, else copied to scratch."""
    cdef uint32_t room = FRAME_SIZE - (off & (FRAME_SIZE - 1))
    cdef uint32_t i = off >> FRAME_SHIFT
    cdef const uint8_t* p = frame_ptr(pool.arena, z.frames[i]) + (off & (FRAME_SIZE - 1))
    if n <= room or z.frames[i + 1] == z.frames[i] + 1:
        return p
    memcpy(scratch, p, room)
    memcpy(scratch + room, frame_ptr(pool.arena, z.frames[i + 1]), n - room)
    return scratch


cdef inline void zspage_read_lock(zspage_desc_t* z) noexcept nogil:
    """Waits for a writer, who holds it for the copy of one frame."""
    cdef unsigned int round = 0
    cdef int readers
    while True:
        readers = load_i32(&z.rwlock)
        if readers >= 0 and cas_i32(&z.rwlock, readers, readers + 1):
            return
        relax(round)
        round += 1


cdef inline bint zspage_write_trylock(zspage_desc_t* z) noexcept nogil:
    return cas_i32(&z.rwlock, 0, -1)


cdef inline void zspage_write_unlock(zspage_desc_t* z) noexcept nogil:
    store_i32(&z.rwlock, 0)


cdef inline void zspage_read_unlock(zspage_desc_t* z) noexcept nogil:
    sub_i32(&z.rwlock, 1)


# ---- fullness lists -------------------------------------------------------------------------

cdef inline int fullness_group(uint32_t inuse, uint32_t objs) noexcept nogil:
    """0 empty, 1 to 10 by tenths in use (10: the kernel's "99 %"), 11 full."""
    if inuse == 0:
        return FULLNESS_EMPTY
    if inuse == objs:
        return FULLNESS_FULL
    return <int>(100 * inuse // objs // 10 + 1)


cdef inline void zspage_insert_locked(pool_t* pool, size_class_t* c, uint32_t number) noexcept nogil:
    cdef zspage_desc_t* zspages = pool.arena.zspages
    cdef int group = fullness_group(zspages[number].inuse, c.objs)
    zspages[number].fullness = <uint8_t>group
    zspage_list_push(zspages, &c.head[group], number)
    c.nr[group] += 1


cdef inline void zspage_remove_locked(pool_t* pool, size_class_t* c, uint32_t number) noexcept nogil:
    cdef zspage_desc_t* zspages = pool.arena.zspages
    cdef uint8_t group = zspages[number].fullness
    zspage_list_remove(zspages, &c.head[group], number)
    c.nr[group] -= 1
    zspages[number].fullness = FULLNESS_OFF_LIST


cdef inline void zspage_fix_fullness_locked(pool_t* pool, size_class_t* c, uint32_t number) noexcept nogil:
    cdef zspage_desc_t* z = &pool.arena.zspages[number]
    if z.fullness == FULLNESS_OFF_LIST or z.fullness == fullness_group(z.inuse, c.objs):
        return
    zspage_remove_locked(pool, c, number)
    zspage_insert_locked(pool, c, number)


cdef inline uint32_t find_fullest_locked(size_class_t* c) noexcept nogil:
    """A zspage with room, from the fullest group that has one; NONE32 if all are full."""
    cdef int group
    for group in range(FULLNESS_99, FULLNESS_EMPTY, -1):
        if c.head[group] != NONE32:
            return c.head[group]
    return NONE32


cdef inline uint32_t find_sparsest_locked(size_class_t* c) noexcept nogil:
    cdef int group
    for group in range(FULLNESS_EMPTY + 1, FULLNESS_FULL):
        if c.head[group] != NONE32:
            return c.head[group]
    return NONE32


# ---- objects of a zspage --------------------------------------------------------------------

cdef inline uint64_t obj_alloc_locked(pool_t* pool, size_class_t* c, uint32_t number, uint32_t size,
                                      uint64_t tag) noexcept nogil:
    cdef zspage_desc_t* z = &pool.arena.zspages[number]
    cdef uint32_t idx = z.freeobj
    cdef uint64_t* header = header_ptr(pool, z, c, idx)
    z.freeobj = <uint16_t>(header[0] >> 1)
    header[0] = HDR_ALLOCATED | (<uint64_t>size << 1) | (tag << HDR_TAG_SHIFT)
    z.inuse += 1
    c.inuse += 1
    zspage_fix_fullness_locked(pool, c, number)
    return loc_of(number, idx)


cdef inline int obj_free_locked(pool_t* pool, size_class_t* c, uint64_t loc) noexcept nogil:
    """The object's size; its zspage stays in its list, empty or not. -EIO if it is free already."""
    cdef zspage_desc_t* z = &pool.arena.zspages[loc_zspage(loc)]
    cdef uint64_t* header = header_ptr(pool, z, c, loc_idx(loc))
    cdef uint64_t was = header[0]
    cdef uint32_t room
    if not was & HDR_ALLOCATED:
        add64(&pool.corrupt, 1)
        return -EIO
    if pool.wipe:
        # Nobody names the object any more, and no migration copies its frames under the class lock. A size
        # that was damaged must not reach the next object.
        room = FRAME_SIZE if is_huge(c) else c.size - OBJ_HEADER
        object_zero(pool, z, data_offset(c, loc_idx(loc)), min(<uint32_t>((was >> 1) & HDR_SIZE_MASK), room))
    header[0] = <uint64_t>z.freeobj << 1
    z.freeobj = <uint16_t>loc_idx(loc)
    z.inuse -= 1
    c.inuse -= 1
    return <int>((was >> 1) & HDR_SIZE_MASK)
