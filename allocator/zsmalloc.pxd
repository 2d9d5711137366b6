# SPDX-License-Identifier: Apache-2.0
# Lock order, outermost first:
#   the user's pin (a slot's lock bit)
#   the page lock             held by the migration core around the owner's calls; freeing a zspage
#                             only tries it, and leaves it to the deferred list otherwise
#   zspage_desc_t.rwlock      readers may wait for a writer; a writer only ever tries
#   size_class_t.lock         under it the user's pin is only ever tried (pool_ops_t.pin)
#   pool_t.number_lock
#   arena_t.lock
"""C interface of the pool: objects of 1 to 4096 bytes, found by location, never by address."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from allocator.arena cimport Arena, arena_t
from allocator.layout cimport (
    LOC_IDX_BITS, NR_FULLNESS, NR_RAW_CLASSES, OBJ_HEADER, ZS_CLASS_DELTA, ZS_MAX_ALLOC, ZS_MIN_ALLOC,
    zspage_desc_t,
)
from allocator.prim cimport pthread_mutex_t


# What object compaction asks of the pool's user, by the tag that the user gave an object.
cdef struct pool_ops_t:
    void* ctx
    # Try to pin the object that is named tag and, as far as the pool knows, lies at loc. True: its
    # user holds still and says that loc is right. Never waits.
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
    size_class_t* by_index[NR_RAW_CLASSES]
    size_class_t classes[NR_RAW_CLASSES]
    uint32_t nr_classes
    uint32_t huge_size              # objects of this many bytes and more take a page of their own
    pthread_mutex_t number_lock
    uint32_t free_number            # guarded by number_lock: list of free zspage numbers
    uint32_t next_number            # guarded by number_lock: never used from here on
    uint32_t deferred               # guarded by number_lock: list of empty zspages to be freed
    # atomic
    uint64_t pages
    uint64_t max_pages
    uint64_t limit_pages
    uint64_t pages_compacted
    uint64_t corrupt
    uint64_t frees                  # objects freed since creation
    uint64_t wake_at                # the free with this number writes to wake_fd; 0 = none does
    int wake_fd                     # an eventfd of the user's, or -1; constant while wake_at is set


cdef pool_t* pool_new(arena_t* a, uint32_t chain_max, const pool_ops_t* ops) noexcept nogil
# Ends the pool, after a migration under way has ended. arena_stays: every zspage, also those queued,
# is freed; otherwise its frames go with the arena.
cdef void pool_delete(pool_t* pool, bint arena_stays) noexcept nogil
# A place for size bytes, named tag: 0 and *loc; -ENOSPC at the limit, -ENOMEM, -EINVAL.
cdef int zs_malloc(pool_t* pool, uint32_t size, uint64_t tag, uint64_t* loc) noexcept nogil
# The same, where the pool may take up to over pages more than its limit: for a smaller object that
# takes the place of a larger one.
cdef int zs_malloc_over(pool_t* pool, uint32_t size, uint64_t tag, uint32_t over, uint64_t* loc) noexcept nogil
# Frees it: its size in bytes, or -EIO if loc names no object.
cdef int zs_free(pool_t* pool, uint64_t loc) noexcept nogil
# Fills an object that was just allocated, and that nobody else knows yet.
cdef int zs_write(pool_t* pool, uint64_t loc, const uint8_t* src, uint32_t n) noexcept nogil
# The bytes of an object until zs_unmap(); NULL if loc names none. scratch (4096 bytes) is used
# when the object straddles two frames that are no neighbours.
cdef const uint8_t* zs_map(pool_t* pool, uint64_t loc, uint8_t* scratch, uint32_t* size) noexcept nogil
cdef void zs_unmap(pool_t* pool, uint64_t loc) noexcept nogil
# Object compaction: pool pages freed. One class, at most max_zspages emptied (*more says whether
# it stopped there), or all of them to the end.
cdef uint64_t zs_compact_class(pool_t* pool, size_class_t* c, uint32_t max_zspages, bint* more) noexcept nogil
cdef uint64_t zs_compact(pool_t* pool) noexcept nogil
# Pool pages that object compaction could free.
cdef uint64_t zs_freeable(pool_t* pool) noexcept nogil
# One write to wake_fd when n more objects have been freed.
cdef void zs_wake_after(pool_t* pool, uint64_t n) noexcept nogil
# Frees the zspages whose pages were locked when they became empty; waits for those locks. How many.
cdef uint32_t zs_flush_deferred(pool_t* pool) noexcept nogil
cdef list pool_classes(pool_t* pool)
cdef object pool_stats(pool_t* pool)

cdef inline uint64_t location(uint32_t zspage, uint32_t idx) noexcept nogil:
    return (<uint64_t>zspage << LOC_IDX_BITS) | idx

cdef inline uint32_t loc_zspage(uint64_t loc) noexcept nogil:
    return <uint32_t>(loc >> LOC_IDX_BITS)

cdef inline uint32_t loc_idx(uint64_t loc) noexcept nogil:
    return <uint32_t>(loc & ((1u << LOC_IDX_BITS) - 1))

# The class of objects of so many bytes; of two sizes, the one in the smaller class takes less memory.
cdef inline size_class_t* class_for(pool_t* pool, uint32_t size) noexcept nogil:
    cdef uint32_t total = size + OBJ_HEADER
    if total <= ZS_MIN_ALLOC:
        return pool.by_index[0]
    if total > ZS_MAX_ALLOC:
        total = ZS_MAX_ALLOC
    return pool.by_index[(total - ZS_MIN_ALLOC + ZS_CLASS_DELTA - 1) // ZS_CLASS_DELTA]

# The header word of object idx; the caller holds the class lock, or the zspage for reading.
cdef uint64_t* header_ptr(pool_t* pool, zspage_desc_t* z, size_class_t* c, uint32_t idx) noexcept nogil
cdef int fullness_group(uint32_t inuse, uint32_t objs) noexcept nogil


cdef class Pool:
    cdef pool_t* pool
    cdef readonly Arena arena
    cdef dict places            # stand-alone use: tag -> location

    cdef pool_t* open(self) except NULL
    cdef uint64_t find(self, tag) except? 0xffffffffffffffff
