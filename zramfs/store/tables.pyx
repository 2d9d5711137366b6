# SPDX-License-Identifier: Apache-2.0
"""The memory of a store; see tables.pxd."""
from libc.errno cimport ENOMEM
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from allocator.arena cimport arena_stats
from allocator.frames cimport arena_t
from allocator.layout cimport CHAIN_MAX, PAGEBLOCK_FRAMES
from allocator.populate cimport arena_populate_user
from allocator.pool cimport pool_delete, pool_new, pool_stats
from allocator.prim cimport *
from allocator.zscompact cimport zs_freeable
from allocator.zspage cimport pool_ops_t
from zramfs.store.backing cimport FETCH_BYTES
from zramfs.codecs.codec cimport codec_ctx_bytes, codec_ctx_free, codec_ctx_new, codec_ctx_t
from zramfs.store.record cimport *
from zramfs.store.slots cimport *
from zramfs.store.units cimport unit_cache_free, unit_cache_new

from zramfs.model.stats import StoreStats
from zramfs.store.record import is_kept


cdef void store_delete(store_t* st) noexcept nogil:
    if st == NULL:
        return
    if st.backing != NULL:
        # It is closed after the arena.
        st.backing.own = st.backing.record[0]
        st.backing.record = &st.backing.own
    contexts_leave(st)
    pool_delete(st.pool, False)
    if st.chunks != NULL:
        munmap(st.chunks, chunks_of(st.most_slots) * sizeof(uint32_t))
    free(st)


cdef void units_attach(store_t* st) noexcept nogil:
    st.units.pool = st.pool
    st.units.words = <uint64_t*>(st.arena.user + units_off(st))
    st.units.nr_words = chunks_of(st.most_slots) * UNITS_CHUNK // sizeof(uint64_t)
    st.units.serial = &st.record.unit_serial
    st.units.codecs = st.codec


cdef void shared_attach(store_t* st) noexcept nogil:
    st.shared.pool = st.pool
    st.shared.cells = <uint64_t*>(st.arena.user + cells_off(st))
    st.shared.nr_cells = chunks_of(st.most_slots) * CELLS_CHUNK // sizeof(uint64_t)


cdef store_t* store_new(arena_t* arena, uint64_t nr_slots, uint64_t most_slots) noexcept nogil:
    cdef store_t* st = <store_t*>calloc(1, sizeof(store_t))
    cdef pool_ops_t ops
    if st == NULL:
        return NULL
    pthread_mutex_init(&st.contexts_lock, NULL)
    st.nr_slots = nr_slots
    st.most_slots = most_slots
    st.arena = arena
    st.slots = <uint64_t*>arena.user
    st.record = record_of(arena)
    st.atime = <uint32_t*>(arena.user + times_off(st))
    st.chunks = <uint32_t*>reserve_space(chunks_of(most_slots) * sizeof(uint32_t))
    if st.chunks != NULL and try_open_space(st.chunks, chunks_of(nr_slots) * sizeof(uint32_t)) == 0:
        ops.ctx = st
        ops.pin = slot_pin
        ops.moved = slot_moved
        st.pool = pool_new(st.arena, CHAIN_MAX, &ops)
    if st.pool == NULL:
        store_delete(st)
        return NULL
    st.max_object = st.pool.huge_size - 1
    units_attach(st)
    shared_attach(st)
    st.change_fd = -1
    return st


cdef int store_stay_ready(store_t* st) noexcept nogil:
    st.stays_ready = True
    return slots_make_resident(st, 0, chunk_count(st))


cdef int slots_make_resident(store_t* st, uint64_t first, uint64_t end) noexcept nogil:
    make_resident(&st.chunks[first], (end - first) * sizeof(uint32_t))
    return arena_populate_user(st.arena, first << PAGE_SHIFT, (end - first) << PAGE_SHIFT)


cdef void record_finish(store_t* st) noexcept nogil:
    cdef store_record_t* record = st.record
    cdef bint adopted = record.magic == RECORD_MAGIC
    if not adopted:
        record.version = RECORD_VERSION
        record.wipe = st.pool.wipe
        record.has_backing = st.backing != NULL
        record.most_slots = st.most_slots
        if st.backing != NULL:
            record.backing = st.backing.own
        record.size = record_size(record, st.nr_slots)
    if st.backing != NULL:
        st.backing.record = &record.backing
    if adopted and record.atime_on:
        store32(&st.atime_wanted, 1)
        store32(&st.atime_on, 1)
    store64(&record.magic, RECORD_MAGIC)


cdef int clear_memory_file(int fd) except -1:
    if fd >= 0 and is_kept(fd):
        raise ValueError("expected an empty memory file, got one with a store in it; adopt it")
    if fd >= 0 and ftruncate(fd, 0) != 0:
        raise ValueError("expected a memory file that may be written")
    return 0


# ---- contexts -----------------------------------------------------------------------------------

cdef void context_enter(store_t* st, store_ctx_t* ctx) noexcept nogil:
    ctx.st = st
    ctx.next = st.contexts
    if ctx.next != NULL:
        ctx.next.prev = ctx
    st.contexts = ctx


cdef void context_leave(store_t* st, store_ctx_t* ctx) noexcept nogil:
    if ctx.prev != NULL:
        ctx.prev.next = ctx.next
    else:
        st.contexts = ctx.next
    if ctx.next != NULL:
        ctx.next.prev = ctx.prev


cdef void contexts_leave(store_t* st) noexcept nogil:
    """The store is about to go; whoever still has a context of it frees it later."""
    cdef store_ctx_t* ctx
    pthread_mutex_lock(&st.contexts_lock)
    while st.contexts != NULL:
        ctx = st.contexts
        st.contexts = ctx.next
        ctx.st = NULL
    pthread_mutex_unlock(&st.contexts_lock)
    pthread_mutex_destroy(&st.contexts_lock)


cdef int ctx_codec_new(store_t* st, store_ctx_t* ctx, uint32_t prio) noexcept nogil:
    cdef codec_ctx_t* fresh = codec_ctx_new(&st.codec[prio], prio == 0)
    if fresh == NULL:
        return -ENOMEM
    if st.stays_ready:
        make_resident(fresh, codec_ctx_bytes(fresh))
    ctx.codec[prio] = fresh
    return 0


cdef store_ctx_t* store_ctx_new(store_t* st) noexcept nogil:
    # One block: the context on a page of its own, then page, scratch, comp, io.
    cdef uint8_t* block = <uint8_t*>aligned_alloc(PAGE, 4 * PAGE + FETCH_BYTES)
    cdef store_ctx_t* ctx = <store_ctx_t*>block
    cdef int prio, r = 0
    if block == NULL:
        return NULL
    memset(block, 0, 4 * PAGE + FETCH_BYTES)
    ctx.page = block + PAGE
    ctx.scratch = block + 2 * PAGE
    ctx.comp = block + 3 * PAGE
    ctx.io = block + 4 * PAGE
    ctx.units = unit_cache_new(st.stays_ready)
    if ctx.units == NULL:
        store_ctx_free(ctx)
        return NULL
    pthread_mutex_lock(&st.contexts_lock)
    for prio in range(NR_PRIO):
        if r == 0 and (prio == 0 or st.codec[prio].algo != 0):
            r = ctx_codec_new(st, ctx, prio)
    context_enter(st, ctx)
    pthread_mutex_unlock(&st.contexts_lock)
    if r != 0:
        store_ctx_free(ctx)
        return NULL
    return ctx


cdef void store_ctx_free(store_ctx_t* ctx) noexcept nogil:
    cdef int prio
    if ctx == NULL:
        return
    if ctx.st != NULL:
        pthread_mutex_lock(&ctx.st.contexts_lock)
        context_leave(ctx.st, ctx)
        pthread_mutex_unlock(&ctx.st.contexts_lock)
    for prio in range(NR_PRIO):
        if ctx.codec[prio] != NULL:
            codec_ctx_free(ctx.codec[prio])
    unit_cache_free(ctx.units)
    free(ctx)


cdef tuple store_winnable(store_t* st):
    cdef uint64_t freeable, used, blocks, needed
    with nogil:
        freeable = zs_freeable(st.pool)
        pthread_mutex_lock(&st.arena.lock)
        used = st.arena.frames_used
        blocks = st.arena.pageblocks_in_use
        pthread_mutex_unlock(&st.arena.lock)
        needed = (used - min(used, freeable) + PAGEBLOCK_FRAMES - 1) // PAGEBLOCK_FRAMES
    return blocks - min(blocks, needed), blocks


cdef object store_stats(store_t* st):
    pool = pool_stats(st.pool)
    arena = arena_stats(st.arena)
    return StoreStats(
        orig_data_size=peek64(&st.pages_stored) * PAGE,
        compr_data_size=peek64(&st.compr_bytes) + peek64(&st.units.nbytes) + peek64(&st.shared.nbytes),
        mem_used_total=pool.pages * PAGE,
        mem_limit=pool.limit_pages * PAGE,
        mem_used_max=pool.max_pages * PAGE,
        same_pages=peek64(&st.same_pages),
        pages_compacted=pool.pages_compacted,
        huge_pages=peek64(&st.huge_pages),
        recompressed_pages=peek64(&st.recompressed_pages),
        recompressed_bytes=peek64(&st.recompressed_bytes),
        huge_pages_since=peek64(&st.record.huge_pages_since),
        failed_reads=peek64(&st.record.failed_reads),
        failed_writes=peek64(&st.record.failed_writes),
        notify_free=peek64(&st.record.notify_free),
        resident=arena.resident,
        pageblocks_in_use=arena.pageblocks_in_use,
        pageblocks_total=arena.pageblocks_total,
        bytes_returned=arena.bytes_returned,
        frames_used=arena.frames_used,
        frames_free=arena.frames_free,
        reserve=arena.reserve,
        reserve_target=arena.reserve_target,
        reserve_misses=arena.reserve_misses,
        corrupt=pool.corrupt,
        written_back=peek64(&st.written_back),
        units=peek64(&st.units.units),
        unit_pages=peek64(&st.units.pages),
        unit_dead=peek64(&st.units.members) - peek64(&st.units.pages),
        unit_bytes=peek64(&st.units.nbytes),
        units_unpacked=peek64(&st.units.unpacked),
        shared_pages=peek64(&st.shared.pages),
        shared_objects=peek64(&st.shared.objects),
        shared_bytes=peek64(&st.shared.nbytes),
        recoveries=peek64(&st.record.recoveries),
        pages_lost=peek64(&st.record.pages_lost),
    )
