# SPDX-License-Identifier: Apache-2.0
# Locks: see zspage.pxd.
"""A pool of objects: its size classes, its making and end, its statistics, and the class Pool for Python.

There are 255 raw classes, of 32 to 4096 bytes in steps of 16. Each takes the chain length that wastes
least. Classes with the same chain and the same number of objects are merged into the largest of them.
How objects are stored is in zsmalloc.pyx.
"""
cimport cython
from libc.errno cimport EIO, ENOMEM
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from allocator.arena cimport Arena
from allocator.frames cimport arena_t, page_owner_t
from allocator.headroom cimport Headroom
from allocator.layout cimport *
from allocator.migrate cimport owner_register, owner_unregister
from allocator.prim cimport *
from allocator.zscompact cimport zs_compact
from allocator.zsmalloc cimport (
    zs_flush_deferred, zs_free, zs_malloc, zs_map, zs_unmap, zs_write, zspage_delete, zspage_disown_pages,
)
from allocator.zsmovable cimport zs_isolate, zs_migrate, zs_putback
from allocator.zspage cimport loc_idx, loc_zspage, pool_ops_t, pool_t, size_class_t

from allocator.stats import ClassStats, PoolStats


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


cdef void pool_make_classes(pool_t* pool, uint32_t chain_max) noexcept nogil:
    """From the largest down, so that a class is merged into the one above it."""
    cdef size_class_t* c
    cdef size_class_t* larger = NULL
    cdef uint32_t size, pages, objs
    cdef int i, group
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


cdef pool_t* pool_new(arena_t* a, uint32_t chain_max, const pool_ops_t* ops) noexcept nogil:
    """NULL when memory is short. The arena stays the caller's and must outlive the pool."""
    cdef pool_t* pool = <pool_t*>calloc(1, sizeof(pool_t))
    cdef page_owner_t owner
    if pool == NULL:
        return NULL
    pool.arena = a
    pool.ops = ops[0]
    pool.free_number = NONE32
    pool.deferred = NONE32
    pool.wake_fd = -1
    short_mutex_init(&pool.number_lock)
    # The first pool of the arena, or one after another that has ended. One that is adopted says its chain.
    if a.sb.chain_max == 0:
        a.sb.next_number = 0
    a.sb.chain_max = chain_max
    pool_make_classes(pool, chain_max)
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
        for number in range(pool.arena.sb.next_number):
            z = &pool.arena.zspages[number]
            if z.magic == ZSPAGE_MAGIC:
                c = pool.by_index[z.class_idx]
                zspage_disown_pages(pool, c, z, True)
                zspage_delete(pool, c, number)
        pool.arena.sb.chain_max = 0
    for number in range(pool.nr_classes):
        pthread_mutex_destroy(&pool.classes[number].lock)
    pthread_mutex_destroy(&pool.number_lock)
    free(pool)


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
        pages=peek64(&pool.pages), max_pages=peek64(&pool.arena.sb.max_pages),
        limit_pages=peek64(&pool.arena.sb.limit_pages),
        pages_compacted=peek64(&pool.arena.sb.pages_compacted),
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
    """Objects of 1 to 4096 bytes in the frames of an arena, packed by size class (zsmalloc).

    An object has a name, its tag: an integer from 0 to 2^48 - 1 that no other live object has. compact() and
    migration move objects, so an object is always found by its tag. chain_max: frames of the longest zspage,
    1 to 8. An arena takes one pool at a time; once the arena is closed, so is the pool.
    Raises ValueError for a bad chain_max or an arena that has a pool, and MemoryError.
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

    def __repr__(self):
        if self.arena.a == NULL:
            return "<Pool, closed>"
        now = self.stats()
        return f"<Pool of {now.objects} objects in {now.pages} pages, {now.zspages} zspages>"

    cdef pool_t* open(self) except NULL:
        self.arena.open()
        return self.pool

    cdef uint64_t find(self, tag) except? 0xffffffffffffffff:
        if tag not in self.places:
            raise KeyError(f"no object is named {tag}")
        return self.places[tag]

    def malloc(self, tag, data):
        """Stores 1 to 4096 bytes under a new tag.

        Raises ValueError for another size, a tag out of range or in use, OSError(ENOSPC) at the limit, and
        MemoryError when the arena is full or the system refuses memory. Then nothing is changed.
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
            raise MemoryError("the arena has no free frame left, or the system refuses its memory")
        if r != 0:
            raise OSError(-r, f"the pool's limit of {pool.arena.sb.limit_pages} pages is reached")
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
        """Frees the object: its size in bytes. Raises KeyError, or OSError(EIO) for a damaged pool."""
        cdef int size = zs_free(self.open(), self.find(tag))
        if size < 0:
            raise OSError(-size, f"object {tag} is damaged")
        del self.places[tag]
        return size

    def location(self, tag):
        """Where the object lies at this moment: (zspage number, object index). Raises KeyError."""
        cdef uint64_t loc = self.find(tag)
        return loc_zspage(loc), loc_idx(loc)

    def compact(self):
        """Moves objects out of sparse zspages into full ones, until no more zspages can be freed. The number
        of pages freed."""
        # The GIL is kept: python_pin() needs it under a class lock, and malloc() takes a class lock
        # with the GIL held.
        freed = zs_compact(self.open())
        with nogil:
            zs_flush_deferred(self.pool)
        return freed

    def set_limit(self, pages):
        """Pages of 4096 bytes that the pool may use, 0 = no limit. What is stored stays."""
        store64(&self.open().arena.sb.limit_pages, pages)

    def set_headroom(self, Headroom headroom):
        """Asked before the pool takes pages, from here on; to be called before the first object."""
        self.headroom = headroom
        self.open().headroom = &headroom.h

    @property
    def huge_size(self):
        """Objects of this many bytes and more take a page of their own."""
        return self.open().huge_size

    def classes(self):
        """ClassStats of every class that was not merged into a larger one, smallest first."""
        return pool_classes(self.open())

    def stats(self):
        """PoolStats of this moment."""
        return pool_stats(self.open())
