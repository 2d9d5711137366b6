# SPDX-License-Identifier: Apache-2.0
# Lock order: see zsmalloc.pxd. Functions named _locked hold the lock of the class they are given.
"""zsmalloc: objects packed into zspages of 1 to 8 frames, by size class.

255 raw classes of 32 to 4096 bytes, step 16; each takes the chain length that wastes least, and
classes with the same chain and number of objects are merged into the largest of them. An object
carries an 8-byte header with its size and its user's tag; one too large to share a page is huge: a
page of its own, its header in the zspage descriptor. New objects go into the fullest zspage that
has room. The rules are those of the kernel's mm/zsmalloc.c, restated in its words in
Documentation/mm/zsmalloc.rst.
"""
cimport cython
from libc.errno cimport EAGAIN, EBUSY, EINVAL, EIO, ENOMEM, ENOSPC
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from allocator.arena cimport (
    Arena, arena_alloc_frames, arena_free_frames, arena_t, frame_ptr, page_owner_t,
)
from allocator.layout cimport *
from allocator.migrate cimport (
    clear_page_movable, owner_register, owner_unregister, page_lock, page_trylock, page_unlock,
    set_page_movable,
)
from allocator.prim cimport *

from allocator.stats import ClassStats, PoolStats

cdef enum:
    COMPACT_PASSES = 3      # an object that its user holds is tried again on the next pass


# ---- size classes -------------------------------------------------------------------------

cdef uint32_t chain_length(uint32_t size, uint32_t chain_max) noexcept nogil:
    """Frames per zspage that waste least at the end; the shortest of equals."""
    cdef uint32_t best = 1, least = FRAME_SIZE, pages, waste
    if size & (size - 1) == 0:
        return 1
    for pages in range(1, chain_max + 1):
        waste = (pages * FRAME_SIZE) % size
        if waste < least:
            least = waste
            best = pages
    return best


cdef int fullness_group(uint32_t inuse, uint32_t objs) noexcept nogil:
    """0 empty, 1 to 10 by tenths in use (10: the kernel's "99 %"), 11 full."""
    if inuse == 0:
        return FULLNESS_EMPTY
    if inuse == objs:
        return FULLNESS_FULL
    return <int>(100 * inuse // objs // 10 + 1)


cdef pool_t* pool_new(arena_t* a, uint32_t chain_max, const pool_ops_t* ops) noexcept nogil:
    """NULL when memory is short. The arena stays the caller's and must outlive the pool."""
    cdef pool_t* pool = <pool_t*>calloc(1, sizeof(pool_t))
    cdef size_class_t* c
    cdef size_class_t* larger = NULL
    cdef page_owner_t owner
    cdef uint32_t size, pages, objs
    cdef int i, group
    if pool == NULL:
        return NULL
    pool.arena = a
    pool.ops = ops[0]
    pool.free_number = NONE32
    pool.deferred = NONE32
    pool.wake_fd = -1
    short_mutex_init(&pool.number_lock)
    a.sb.chain_max = chain_max
    for i in range(NR_RAW_CLASSES - 1, -1, -1):
        size = <uint32_t>(ZS_MIN_ALLOC + i * ZS_CLASS_DELTA)
        pages = chain_length(size, chain_max)
        objs = pages * FRAME_SIZE // size
        if larger != NULL and larger.pages == pages and larger.objs == objs:
            pool.by_index[i] = larger
            continue
        # The first class from above that shares a page: one byte more than it holds is huge.
        if pool.huge_size == 0 and objs != 1:
            pool.huge_size = size - OBJ_HEADER + 1
        c = &pool.classes[pool.nr_classes]
        pool.nr_classes += 1
        c.size = size
        c.objs = objs
        c.pages = pages
        c.index = <uint32_t>i
        short_mutex_init(&c.lock)
        for group in range(NR_FULLNESS):
            c.head[group] = NONE32
        pool.by_index[i] = c
        larger = c
    owner.ctx = pool
    owner.isolate = zs_isolate
    owner.migrate = zs_migrate
    owner.putback = zs_putback
    owner_register(a, OWNER_ZSMALLOC, &owner)
    return pool


cdef void pool_delete(pool_t* pool, bint arena_stays) noexcept nogil:
    cdef zspage_desc_t* z
    cdef size_class_t* c
    cdef uint32_t number
    if pool == NULL:
        return
    if pool.arena != NULL:
        owner_unregister(pool.arena, OWNER_ZSMALLOC)
    if pool.arena != NULL and arena_stays:
        zs_flush_deferred(pool)
        for number in range(pool.next_number):
            z = &pool.arena.zspages[number]
            if z.magic == ZSPAGE_MAGIC:
                c = pool.by_index[z.class_idx]
                disown_pages(pool, c, z, True)
                zspage_delete(pool, c, number)
        pool.arena.sb.chain_max = 0
    for number in range(pool.nr_classes):
        pthread_mutex_destroy(&pool.classes[number].lock)
    pthread_mutex_destroy(&pool.number_lock)
    free(pool)


cdef inline bint is_huge(const size_class_t* c) noexcept nogil:
    return c.objs == 1


# ---- objects in frames ----------------------------------------------------------------------

cdef uint64_t* header_ptr(pool_t* pool, zspage_desc_t* z, size_class_t* c, uint32_t idx) noexcept nogil:
    # Objects start at multiples of 16, so a header never straddles two frames.
    cdef uint32_t off = idx * c.size
    if is_huge(c):
        return &z.huge_header
    return <uint64_t*>(frame_ptr(pool.arena, z.frames[off >> FRAME_SHIFT]) + (off & (FRAME_SIZE - 1)))


cdef inline uint32_t data_offset(size_class_t* c, uint32_t idx) noexcept nogil:
    return idx * c.size + (0 if is_huge(c) else OBJ_HEADER)


cdef void copy_in(pool_t* pool, zspage_desc_t* z, uint32_t off, const uint8_t* src, uint32_t n) noexcept nogil:
    cdef uint32_t room = FRAME_SIZE - (off & (FRAME_SIZE - 1))
    cdef uint32_t i = off >> FRAME_SHIFT
    cdef uint32_t first = n if n < room else room
    memcpy(frame_ptr(pool.arena, z.frames[i]) + (off & (FRAME_SIZE - 1)), src, first)
    if n > first:
        memcpy(frame_ptr(pool.arena, z.frames[i + 1]), src + first, n - first)


cdef const uint8_t* view(pool_t* pool, zspage_desc_t* z, uint32_t off, uint32_t n,
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


cdef inline void read_lock(zspage_desc_t* z) noexcept nogil:
    """Waits for a writer, who holds it for the copy of one frame."""
    cdef unsigned int round = 0
    cdef int readers
    while True:
        readers = load_i32(&z.rwlock)
        if readers >= 0 and cas_i32(&z.rwlock, readers, readers + 1):
            return
        relax(round)
        round += 1


cdef inline bint write_trylock(zspage_desc_t* z) noexcept nogil:
    return cas_i32(&z.rwlock, 0, -1)


cdef inline void write_unlock(zspage_desc_t* z) noexcept nogil:
    store_i32(&z.rwlock, 0)


cdef inline void read_unlock(zspage_desc_t* z) noexcept nogil:
    sub_i32(&z.rwlock, 1)


# ---- fullness lists -------------------------------------------------------------------------

cdef void insert_locked(pool_t* pool, size_class_t* c, uint32_t number) noexcept nogil:
    cdef zspage_desc_t* z = &pool.arena.zspages[number]
    cdef int group = fullness_group(z.inuse, c.objs)
    cdef uint32_t head = c.head[group]
    z.fullness = <uint8_t>group
    z.prev = NONE32
    z.next = head
    if head != NONE32:
        pool.arena.zspages[head].prev = number
    c.head[group] = number
    c.nr[group] += 1


cdef void remove_locked(pool_t* pool, size_class_t* c, uint32_t number) noexcept nogil:
    cdef zspage_desc_t* z = &pool.arena.zspages[number]
    if z.prev != NONE32:
        pool.arena.zspages[z.prev].next = z.next
    else:
        c.head[z.fullness] = z.next
    if z.next != NONE32:
        pool.arena.zspages[z.next].prev = z.prev
    c.nr[z.fullness] -= 1
    z.fullness = FULLNESS_OFF_LIST


cdef inline void fix_fullness_locked(pool_t* pool, size_class_t* c, uint32_t number) noexcept nogil:
    cdef zspage_desc_t* z = &pool.arena.zspages[number]
    if z.fullness == FULLNESS_OFF_LIST or z.fullness == fullness_group(z.inuse, c.objs):
        return
    remove_locked(pool, c, number)
    insert_locked(pool, c, number)


cdef uint32_t find_fullest_locked(size_class_t* c) noexcept nogil:
    """A zspage with room, from the fullest group that has one; NONE32 if all are full."""
    cdef int group
    for group in range(FULLNESS_99, FULLNESS_EMPTY, -1):
        if c.head[group] != NONE32:
            return c.head[group]
    return NONE32


cdef uint32_t find_sparsest_locked(size_class_t* c) noexcept nogil:
    cdef int group
    for group in range(FULLNESS_EMPTY + 1, FULLNESS_FULL):
        if c.head[group] != NONE32:
            return c.head[group]
    return NONE32


# ---- zspages --------------------------------------------------------------------------------

cdef uint32_t take_number(pool_t* pool) noexcept nogil:
    cdef uint32_t number
    pthread_mutex_lock(&pool.number_lock)
    number = pool.free_number
    if number != NONE32:
        pool.free_number = pool.arena.zspages[number].next
    elif pool.next_number < pool.arena.nr_frames:
        number = pool.next_number
        pool.next_number += 1
    pthread_mutex_unlock(&pool.number_lock)
    return number


cdef void put_number(pool_t* pool, uint32_t number) noexcept nogil:
    pthread_mutex_lock(&pool.number_lock)
    pool.arena.zspages[number].next = pool.free_number
    pool.free_number = number
    pthread_mutex_unlock(&pool.number_lock)


cdef uint64_t reserve_pages(pool_t* pool, uint32_t n, uint32_t over) noexcept nogil:
    """Pool pages with n more of them, or 0 where that is more than over above the limit. Nothing is counted that is then taken back:
    that would turn away another thread's smaller zspage that still fits."""
    cdef uint64_t limit = peek64(&pool.limit_pages), pages
    while True:
        pages = peek64(&pool.pages)
        # What the balloon holds is not the pool's to use.
        if limit != 0 and pages + n + peek64(&pool.arena.reserved) > limit + over:
            return 0
        if cas64(&pool.pages, pages, pages + n):
            return pages + n


cdef int zspage_new(pool_t* pool, size_class_t* c, uint32_t over, uint32_t* number) noexcept nogil:
    """A complete empty zspage, in no list: 0, -ENOSPC at the limit, or -ENOMEM."""
    cdef uint64_t pages = reserve_pages(pool, c.pages, over)
    cdef zspage_desc_t* z
    cdef uint32_t i
    cdef int r
    if pages == 0:
        return -ENOSPC
    number[0] = take_number(pool)
    if number[0] == NONE32:
        sub64(&pool.pages, c.pages)
        return -ENOMEM
    z = &pool.arena.zspages[number[0]]
    r = arena_alloc_frames(pool.arena, <int>c.pages, OWNER_ZSMALLOC, number[0], z.frames)
    if r != 0:
        put_number(pool, number[0])
        sub64(&pool.pages, c.pages)
        return r
    max64(&pool.max_pages, pages)
    z.inuse = 0
    z.freeobj = 0
    z.class_idx = <uint8_t>c.index
    z.fullness = FULLNESS_OFF_LIST
    z.rwlock = 0
    z.isolated = 0
    z.magic = ZSPAGE_MAGIC
    for i in range(c.objs):
        header_ptr(pool, z, c, i)[0] = (i + 1) << 1
    for i in range(c.pages):
        set_page_movable(pool.arena, z.frames[i], OWNER_ZSMALLOC, number[0])
    return 0


cdef bint disown_pages(pool_t* pool, size_class_t* c, zspage_desc_t* z, bint wait) noexcept nogil:
    """Locks all pages of a zspage and ends their ownership. Without wait: False, and nothing done, if
    one of them is locked; the migration core has it in its hands just now."""
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
    """Frees a zspage whose pages nobody owns any more."""
    cdef zspage_desc_t* z = &pool.arena.zspages[number]
    z.magic = 0
    arena_free_frames(pool.arena, <int>c.pages, z.frames)
    put_number(pool, number)
    sub64(&pool.pages, c.pages)


cdef void defer_free(pool_t* pool, uint32_t number) noexcept nogil:
    pthread_mutex_lock(&pool.number_lock)
    pool.arena.zspages[number].next = pool.deferred
    pool.deferred = number
    pthread_mutex_unlock(&pool.number_lock)


cdef void free_zspage(pool_t* pool, size_class_t* c, uint32_t number) noexcept nogil:
    """An empty zspage that stands in no list and is no longer counted in its class; nobody waits."""
    if disown_pages(pool, c, &pool.arena.zspages[number], False):
        zspage_delete(pool, c, number)
    else:
        defer_free(pool, number)


cdef uint32_t zs_flush_deferred(pool_t* pool) noexcept nogil:
    cdef uint32_t number, n = 0
    cdef size_class_t* c
    while True:
        pthread_mutex_lock(&pool.number_lock)
        number = pool.deferred
        if number != NONE32:
            pool.deferred = pool.arena.zspages[number].next
        pthread_mutex_unlock(&pool.number_lock)
        if number == NONE32:
            return n
        c = pool.by_index[pool.arena.zspages[number].class_idx]
        disown_pages(pool, c, &pool.arena.zspages[number], True)
        zspage_delete(pool, c, number)
        n += 1


cdef inline size_class_t* class_of(pool_t* pool, uint64_t loc) noexcept nogil:
    """The class of the zspage that a location names; NULL, and counted, if there is none."""
    cdef uint32_t number = loc_zspage(loc)
    cdef zspage_desc_t* z = &pool.arena.zspages[number]
    cdef size_class_t* c
    if number < pool.arena.nr_frames and z.magic == ZSPAGE_MAGIC and z.class_idx < NR_RAW_CLASSES:
        c = pool.by_index[z.class_idx]
        if loc_idx(loc) < c.objs:
            return c
    add64(&pool.corrupt, 1)
    return NULL


# ---- allocation -----------------------------------------------------------------------------

cdef uint64_t obj_alloc_locked(pool_t* pool, size_class_t* c, uint32_t number, uint32_t size,
                               uint64_t tag) noexcept nogil:
    cdef zspage_desc_t* z = &pool.arena.zspages[number]
    cdef uint32_t idx = z.freeobj
    cdef uint64_t* header = header_ptr(pool, z, c, idx)
    z.freeobj = <uint16_t>(header[0] >> 1)
    header[0] = HDR_ALLOCATED | (<uint64_t>size << 1) | (tag << HDR_TAG_SHIFT)
    z.inuse += 1
    c.inuse += 1
    fix_fullness_locked(pool, c, number)
    return location(number, idx)


cdef int obj_free_locked(pool_t* pool, size_class_t* c, uint64_t loc) noexcept nogil:
    """The object's size; its zspage stays in its list, empty or not. -EIO if it is free already."""
    cdef zspage_desc_t* z = &pool.arena.zspages[loc_zspage(loc)]
    cdef uint64_t* header = header_ptr(pool, z, c, loc_idx(loc))
    cdef uint64_t was = header[0]
    if not was & HDR_ALLOCATED:
        add64(&pool.corrupt, 1)
        return -EIO
    header[0] = <uint64_t>z.freeobj << 1
    z.freeobj = <uint16_t>loc_idx(loc)
    z.inuse -= 1
    c.inuse -= 1
    return <int>((was >> 1) & HDR_SIZE_MASK)


cdef int zs_malloc(pool_t* pool, uint32_t size, uint64_t tag, uint64_t* loc) noexcept nogil:
    return zs_malloc_over(pool, size, tag, 0, loc)


cdef int zs_malloc_over(pool_t* pool, uint32_t size, uint64_t tag, uint32_t over, uint64_t* loc) noexcept nogil:
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
        insert_locked(pool, c, number)
    loc[0] = obj_alloc_locked(pool, c, number, size, tag)
    pthread_mutex_unlock(&c.lock)
    return 0


cdef void zs_wake_after(pool_t* pool, uint64_t n) noexcept nogil:
    store64(&pool.wake_at, peek64(&pool.frees) + n)


cdef inline void count_free(pool_t* pool) noexcept nogil:
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
        remove_locked(pool, c, number)
        c.zspages -= 1
    elif size >= 0:
        fix_fullness_locked(pool, c, number)
    pthread_mutex_unlock(&c.lock)
    if empty:
        free_zspage(pool, c, number)
    count_free(pool)
    return size


cdef int zs_write(pool_t* pool, uint64_t loc, const uint8_t* src, uint32_t n) noexcept nogil:
    cdef size_class_t* c = class_of(pool, loc)
    cdef zspage_desc_t* z = &pool.arena.zspages[loc_zspage(loc)]
    if c == NULL:
        return -EIO
    read_lock(z)
    copy_in(pool, z, data_offset(c, loc_idx(loc)), src, n)
    read_unlock(z)
    return 0


cdef const uint8_t* zs_map(pool_t* pool, uint64_t loc, uint8_t* scratch, uint32_t* size) noexcept nogil:
    cdef size_class_t* c = class_of(pool, loc)
    cdef zspage_desc_t* z = &pool.arena.zspages[loc_zspage(loc)]
    cdef uint64_t header
    cdef uint32_t n, off
    if c == NULL:
        return NULL
    read_lock(z)
    off = data_offset(c, loc_idx(loc))
    fetch_object(frame_ptr(pool.arena, z.frames[off >> FRAME_SHIFT]) + (off & (FRAME_SIZE - 1)))
    header = header_ptr(pool, z, c, loc_idx(loc))[0]
    n = <uint32_t>((header >> 1) & HDR_SIZE_MASK)
    if not header & HDR_ALLOCATED or n > ZS_MAX_ALLOC or (n > c.size - OBJ_HEADER and not is_huge(c)):
        read_unlock(z)
        add64(&pool.corrupt, 1)
        return NULL
    size[0] = n
    return view(pool, z, off, n, scratch)


cdef void zs_unmap(pool_t* pool, uint64_t loc) noexcept nogil:
    read_unlock(&pool.arena.zspages[loc_zspage(loc)])


# ---- object compaction ------------------------------------------------------------------------

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
    if dst == NONE32 or not pool.ops.pin(pool.ops.ctx, tag, location(src, idx)):
        return False
    loc = obj_alloc_locked(pool, c, dst, size, tag)
    copy_in(pool, &pool.arena.zspages[dst], data_offset(c, loc_idx(loc)),
            view(pool, from_, data_offset(c, idx), size, scratch), size)
    pool.ops.moved(pool.ops.ctx, tag, loc)
    obj_free_locked(pool, c, location(src, idx))
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


cdef uint64_t zs_compact_class(pool_t* pool, size_class_t* c, uint32_t max_zspages, bint* more) noexcept nogil:
    """The lock is dropped after each zspage: the longest hold is the copy of one zspage's objects,
    at most 32 KiB, about 10 us."""
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
        remove_locked(pool, c, src)
        emptied = empty_zspage_locked(pool, c, src)
        if emptied:
            c.zspages -= 1
        else:
            insert_locked(pool, c, src)
        pthread_mutex_unlock(&c.lock)
        if not emptied:
            break
        free_zspage(pool, c, src)
        freed += c.pages
    add64(&pool.pages_compacted, freed)
    return freed


cdef uint64_t zs_compact(pool_t* pool) noexcept nogil:
    cdef uint64_t freed = 0
    cdef uint32_t i
    cdef int compact_pass
    cdef bint more
    for compact_pass in range(COMPACT_PASSES):
        for i in range(pool.nr_classes):
            freed += zs_compact_class(pool, &pool.classes[i], NONE32, &more)
    return freed


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


# ---- owner of movable pages: see migrate.pyx for the contracts --------------------------------------

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
    # Empty: it is being freed. Off the lists and not isolated: it is being made or freed.
    taken = z.inuse != 0 and (z.fullness != FULLNESS_OFF_LIST or z.isolated != 0)
    if taken:
        # Off the list with the first page, so that no allocation can hit it.
        if z.isolated == 0:
            remove_locked(pool, c, number)
            c.isolated += 1
        z.isolated += 1
    pthread_mutex_unlock(&c.lock)
    return taken


cdef bint end_isolation_locked(pool_t* pool, size_class_t* c, uint32_t number) noexcept nogil:
    """One page less is isolated. True if that leaves an empty zspage, which is no longer counted and
    has to be freed."""
    cdef zspage_desc_t* z = &pool.arena.zspages[number]
    z.isolated -= 1
    if z.isolated != 0:
        return False
    c.isolated -= 1
    if z.inuse != 0:
        insert_locked(pool, c, number)
        return False
    c.zspages -= 1
    return True


cdef int zs_migrate(void* ctx, uint32_t new, uint32_t old) noexcept nogil:
    """The move changes one word of the zspage: locations, and so slots, stay as they are. Whoever
    reads or writes the zspage's bytes has it locked for reading; then it is busy."""
    cdef pool_t* pool = <pool_t*>ctx
    cdef uint32_t number = 0, i = 0
    cdef size_class_t* c = class_of_page(pool, old, &number)
    cdef zspage_desc_t* z
    if c == NULL:
        return -EIO
    z = &pool.arena.zspages[number]
    if not write_trylock(z):
        return -EAGAIN
    pthread_mutex_lock(&c.lock)
    if z.inuse == 0:
        pthread_mutex_unlock(&c.lock)
        write_unlock(z)
        return -EBUSY
    while z.frames[i] != old:
        i += 1
    memcpy(frame_ptr(pool.arena, new), frame_ptr(pool.arena, old), FRAME_SIZE)
    set_page_movable(pool.arena, new, OWNER_ZSMALLOC, number)
    z.frames[i] = new
    clear_page_movable(pool.arena, old)
    end_isolation_locked(pool, c, number)
    pthread_mutex_unlock(&c.lock)
    write_unlock(z)
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
        # Its page is locked just now, by the caller.
        defer_free(pool, number)


# ---- statistics -------------------------------------------------------------------------------

cdef list pool_classes(pool_t* pool):
    cdef size_class_t* c
    cdef uint64_t nr[NR_FULLNESS]
    cdef uint64_t zspages, inuse, waste
    cdef int i, g
    result = []
    for i in range(<int>pool.nr_classes - 1, -1, -1):
        c = &pool.classes[i]
        pthread_mutex_lock(&c.lock)
        for g in range(NR_FULLNESS):
            nr[g] = c.nr[g]
        zspages = c.zspages
        inuse = c.inuse
        pthread_mutex_unlock(&c.lock)
        waste = zspages * c.objs - inuse
        result.append(ClassStats(
            index=c.index, size=c.size, zspages_by_group=tuple([nr[g] for g in range(NR_FULLNESS)]),
            obj_allocated=zspages * c.objs, obj_used=inuse, pages_used=zspages * c.pages,
            pages_per_zspage=c.pages, objs_per_zspage=c.objs, freeable=waste // c.objs * c.pages,
        ))
    return result


cdef object pool_stats(pool_t* pool):
    cdef uint64_t objects = 0, zspages = 0
    cdef uint32_t i
    for i in range(pool.nr_classes):
        pthread_mutex_lock(&pool.classes[i].lock)
        objects += pool.classes[i].inuse
        zspages += pool.classes[i].zspages
        pthread_mutex_unlock(&pool.classes[i].lock)
    return PoolStats(
        pages=peek64(&pool.pages), max_pages=peek64(&pool.max_pages),
        limit_pages=peek64(&pool.limit_pages), pages_compacted=peek64(&pool.pages_compacted),
        objects=objects, zspages=zspages, corrupt=peek64(&pool.corrupt),
    )


# ---- stand-alone use from Python ----------------------------------------------------------------

cdef bint python_pin(void* ctx, uint64_t tag, uint64_t loc) noexcept with gil:
    return (<Pool>ctx).places.get(tag) == loc


cdef void python_moved(void* ctx, uint64_t tag, uint64_t loc) noexcept with gil:
    (<Pool>ctx).places[tag] = loc


# The collector must not take the arena away before __dealloc__ has used it.
@cython.no_gc_clear
cdef class Pool:
    """A pool for Python programs; the block device uses the C interface.

    Objects are named by a tag (an integer below 2^48, unique among live objects); where an object
    lies may change in compact(), so it is always looked up by its tag.
    chain_max: frames of the longest zspage, 1 to 8. An arena takes one pool at a time.
    Raises ValueError for a bad chain_max or an arena that has a pool, and MemoryError. Once the arena
    is closed, so is the pool.
    """

    def __cinit__(self, Arena arena not None, chain_max=CHAIN_MAX):
        cdef arena_t* a = arena.open()
        cdef pool_ops_t ops
        if not 1 <= chain_max <= CHAIN_MAX:
            raise ValueError(f"chain of 1 to {CHAIN_MAX} frames expected, got {chain_max}")
        # Zspage descriptors lie in the arena, numbered from 0, and zsmalloc is one owner of pages.
        if a.sb.chain_max != 0:
            raise ValueError("this arena has a pool already: make a second arena for a second pool")
        self.arena = arena
        self.places = {}
        ops.ctx = <void*>self
        ops.pin = python_pin
        ops.moved = python_moved
        self.pool = pool_new(a, chain_max, &ops)
        if self.pool == NULL:
            raise MemoryError("no memory for the tables of a pool (about 50 KiB)")

    def __dealloc__(self):
        # A closed arena has taken the pool's frames with it.
        if self.pool != NULL and self.arena.a == NULL:
            self.pool.arena = NULL
        with nogil:
            pool_delete(self.pool, True)

    cdef pool_t* open(self) except NULL:
        self.arena.open()
        return self.pool

    cdef uint64_t find(self, tag) except? 0xffffffffffffffff:
        if tag not in self.places:
            raise KeyError(f"no object is named {tag}")
        return self.places[tag]

    def malloc(self, tag, data):
        """Stores 1 to 4096 bytes under a new tag.

        Raises ValueError (size, tag in use), OSError(ENOSPC) at the limit, MemoryError; nothing
        is changed then.
        """
        cdef uint64_t loc = 0, name
        cdef bytes payload = bytes(data)
        cdef pool_t* pool = self.open()
        cdef int r
        if not (0 <= tag < <uint64_t>1 << TAG_BITS and 1 <= len(payload) <= ZS_MAX_ALLOC):
            raise ValueError(f"1 to 4096 bytes and a tag below 2^48 expected, got {len(payload)} and {tag}")
        if tag in self.places:
            raise ValueError(f"tag {tag} is in use")
        name = tag
        r = zs_malloc(pool, <uint32_t>len(payload), name, &loc)
        if r == -ENOMEM:
            raise MemoryError("the arena has no free frame left")
        if r != 0:
            raise OSError(-r, f"the pool's limit of {pool.limit_pages} pages is reached")
        zs_write(pool, loc, payload, <uint32_t>len(payload))
        self.places[tag] = loc

    def read(self, tag):
        """The object's bytes. Raises KeyError, or OSError(EIO) for a damaged pool."""
        cdef uint64_t loc = self.find(tag)
        cdef uint8_t scratch[FRAME_SIZE]
        cdef uint32_t size = 0
        cdef const uint8_t* p = zs_map(self.open(), loc, scratch, &size)
        if p == NULL:
            raise OSError(EIO, f"object {tag} is damaged")
        try:
            return (<const char*>p)[:size]
        finally:
            zs_unmap(self.pool, loc)

    def free(self, tag):
        """Frees the object and returns its size. Raises KeyError."""
        cdef int size = zs_free(self.open(), self.find(tag))
        if size < 0:
            raise OSError(-size, f"object {tag} is damaged")
        del self.places[tag]
        return size

    def location(self, tag):
        """(zspage number, object index) at this moment."""
        cdef uint64_t loc = self.find(tag)
        return loc_zspage(loc), loc_idx(loc)

    def compact(self):
        """Object compaction, to the end: pool pages freed."""
        # The GIL is kept: python_pin() needs it under a class lock, and malloc() takes a class lock
        # with the GIL held.
        freed = zs_compact(self.open())
        with nogil:
            zs_flush_deferred(self.pool)
        return freed

    def set_limit(self, pages):
        """Pool pages that may be in use; 0 = no limit. What is stored stays."""
        store64(&self.pool.limit_pages, pages)

    @property
    def huge_size(self):
        """Objects of this many bytes and more take a page of their own."""
        return self.pool.huge_size

    def classes(self):
        """ClassStats of every class that was not merged into a larger one, smallest first."""
        return pool_classes(self.pool)

    def stats(self):
        return pool_stats(self.pool)
