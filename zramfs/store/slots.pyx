# SPDX-License-Identifier: Apache-2.0
# Lock order: see slots.pxd. Functions named _locked are given the value of a slot that the caller
# has locked, and unlock it.
"""Pages of the device: read, write, update and free one slot."""
from libc.errno cimport EAGAIN, EIO, ENOMEM, ENOSPC
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from allocator.layout cimport LOC_BITS
from allocator.populate cimport arena_populate_user
from allocator.prim cimport *
from allocator.zsmalloc cimport zs_free, zs_malloc_over, zs_map, zs_unmap, zs_write
from zramfs.store.backing cimport (
    BACK_SIZE_SHIFT, back_is_unit, backing_fetch, backing_pin, backing_release, backing_unpin, back_size,
)
from zramfs.store.back_units cimport back_unit_read
from zramfs.codecs.codec cimport codec_compress, codec_decompress
from zramfs.store.page cimport boot_seconds, fill_words, same_filled
from zramfs.store.shared cimport shared_fetch, shared_leave, shared_moved, shared_pin
from zramfs.store.units cimport UNIT_TAG, unit_leave, unit_moved, unit_pin, unit_read


# ---- chunks -----------------------------------------------------------------------------------

cdef bint chunk_pin(store_t* st, uint64_t chunk) noexcept nogil:
    cdef unsigned int round = 0
    cdef uint32_t v = add32(&st.chunks[chunk], CHUNK_PIN)
    while v & CHUNK_CLOSING:
        sub32(&st.chunks[chunk], CHUNK_PIN)
        relax(round)
        round += 1
        v = add32(&st.chunks[chunk], CHUNK_PIN)
    return v & CHUNK_USED != 0


cdef bint chunk_try_pin(store_t* st, uint64_t chunk) noexcept nogil:
    if add32(&st.chunks[chunk], CHUNK_PIN) & CHUNK_CLOSING:
        sub32(&st.chunks[chunk], CHUNK_PIN)
        return False
    return True


cdef void chunk_give_back(store_t* st, uint64_t chunk) noexcept nogil:
    """Returns the chunk's page of the slot table to the OS, if no slot is in use and nobody is
    inside; the word's top bit keeps others out meanwhile."""
    cdef int64_t off
    if st.stays_ready or not cas32(&st.chunks[chunk], 0, CHUNK_CLOSING):
        return
    off = <int64_t>(st.arena.sb.user_off + chunk * PAGE)
    fallocate(st.arena.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, off, PAGE)
    # A subtraction, because a thread that is being turned away may have added its pin.
    sub32(&st.chunks[chunk], CHUNK_CLOSING)


cdef void chunk_unpin(store_t* st, uint64_t chunk) noexcept nogil:
    # Not only after a discard: a write that failed has asked for the page too, and another thread inside
    # keeps the discarding thread from giving it back.
    if sub32(&st.chunks[chunk], CHUNK_PIN) == 0:
        chunk_give_back(st, chunk)


cdef int chunk_populate_times(store_t* st, uint64_t chunk) noexcept nogil:
    return arena_populate_user(st.arena, times_off(st) + chunk * ATIME_CHUNK, ATIME_CHUNK)


cdef int chunk_open(store_t* st, uint64_t chunk) noexcept nogil:
    # Two threads may do this at once, which does no harm. A chunk that counts a slot was opened before.
    if (chunk_pin(st, chunk) or st.stays_ready
            or arena_populate_user(st.arena, chunk * PAGE, PAGE) == 0
            and (load32(&st.atime_wanted) == 0 or chunk_populate_times(st, chunk) == 0)):
        return 0
    chunk_unpin(st, chunk)
    return -ENOSPC


# ---- slots ------------------------------------------------------------------------------------

cdef uint64_t slot_lock(store_t* st, uint64_t slot) noexcept nogil:
    cdef unsigned int round = 0
    cdef uint64_t v
    while True:
        v = peek64(&st.slots[slot])
        if not v & SLOT_LOCK and cas64(&st.slots[slot], v, v | SLOT_LOCK):
            return v
        relax(round)
        round += 1


cdef void slot_unlock(store_t* st, uint64_t slot, uint64_t v) noexcept nogil:
    store64(&st.slots[slot], v)


cdef uint64_t page_keep(store_t* st, uint64_t slot, uint64_t v) noexcept nogil:
    """For a save under way, whose end waits for the threads that are counted when it has set saving to 0."""
    add32(&st.keepers, 1)
    if load32(&st.saving) != 0:
        v = st.save.keep(st.save.run, slot, v)
    sub32(&st.keepers, 1)
    return v


cdef inline uint64_t slot_lock_to_change(store_t* st, uint64_t slot) noexcept nogil:
    """slot_lock() for a slot whose page is about to be replaced or freed: a save under way keeps the page."""
    cdef uint64_t v = slot_lock(st, slot)
    # Under the lock: by this look the page counts as changed before or after the instant of the save.
    return v if load32(&st.saving) == 0 else page_keep(st, slot, v)


cdef bint slot_pin(void* st, uint64_t slot, uint64_t loc) noexcept nogil:
    cdef store_t* s = <store_t*>st
    cdef uint64_t v
    if slot & UNIT_TAG:
        return unit_pin(&s.units, slot, loc)
    if slot & SHARED_TAG:
        return shared_pin(&s.shared, slot, loc)
    if slot >= slot_count(s) or not chunk_try_pin(s, slot >> CHUNK_SHIFT):
        return False
    v = peek64(&s.slots[slot])
    # An object that its slot does not name is about to be committed or freed by another thread.
    if (not v & SLOT_LOCK and has_object(v) and v >> LOC_SHIFT == loc
            and cas64(&s.slots[slot], v, v | SLOT_LOCK)):
        return True
    chunk_unpin(s, slot >> CHUNK_SHIFT)
    return False


cdef void slot_moved(void* st, uint64_t slot, uint64_t loc) noexcept nogil:
    cdef store_t* s = <store_t*>st
    cdef uint64_t v
    if slot & UNIT_TAG:
        unit_moved(&s.units, slot, loc)
        return
    if slot & SHARED_TAG:
        shared_moved(&s.shared, slot, loc)
        return
    v = peek64(&s.slots[slot])
    v = (v & ((1u << LOC_SHIFT) - 1) & ~<uint64_t>SLOT_LOCK) | (loc << LOC_SHIFT)
    slot_unlock(s, slot, v)
    chunk_unpin(s, slot >> CHUNK_SHIFT)


cdef inline void note_access(store_t* st, uint64_t slot) noexcept nogil:
    if load32(&st.atime_on):
        store32(&st.atime[slot], boot_seconds())


# ---- what a slot names --------------------------------------------------------------------------

cdef inline bint fits_slot(uint64_t word) noexcept nogil:
    return word >> LOC_BITS == 0 or word >> 32 == <uint32_t>word


cdef inline uint64_t same_slot(uint64_t word) noexcept nogil:
    if word >> LOC_BITS == 0:
        return SAME << TYPE_SHIFT | word << LOC_SHIFT
    return SAME << TYPE_SHIFT | SLOT_HALVES | <uint64_t><uint32_t>word << LOC_SHIFT


cdef int page_load(store_t* st, store_ctx_t* ctx, uint64_t v, uint8_t* dst) noexcept nogil:
    # SAME and EMPTY need no lock: the value is all.
    cdef const uint8_t* p
    cdef uint64_t word
    cdef uint32_t size = 0, kind = slot_type(v)
    cdef int r = 0
    if kind == EMPTY:
        memset(dst, 0, PAGE)
        return 0
    if kind == SAME:
        fill_words(dst, same_word(v))
        return 0
    p = zs_map(st.pool, v >> LOC_SHIFT, ctx.scratch, &size)
    if p == NULL:
        return -EIO
    if kind == OBJ:
        if codec_decompress(ctx.codec[slot_prio(v)], p, <int>size, dst, PAGE) != PAGE:
            r = -EIO
    elif kind == HUGE and size == PAGE:
        memcpy(dst, p, PAGE)
    elif kind == SAME_OBJ and size == sizeof(word):
        memcpy(&word, p, sizeof(word))
        fill_words(dst, word)
    else:
        r = -EIO
    zs_unmap(st.pool, v >> LOC_SHIFT)
    return r


cdef int object_unpack(store_ctx_t* ctx, uint64_t v, const uint8_t* p, uint32_t size,
                       uint8_t* dst) noexcept nogil:
    if size == PAGE:
        memcpy(dst, p, PAGE)
        return 0
    if codec_decompress(ctx.codec[(v >> PRIO_SHIFT) & PRIO_MASK], p, <int>size, dst, PAGE) != PAGE:
        return -EIO
    return 0


cdef int shared_page_load(store_t* st, store_ctx_t* ctx, uint64_t slot, uint64_t v,
                          uint8_t* dst) noexcept nogil:
    cdef uint32_t size = shared_fetch(&st.shared, slot_cell(slot, v), ctx.scratch)
    return object_unpack(ctx, v, ctx.scratch, size, dst) if size != 0 else -EIO


cdef int back_load(store_t* st, store_ctx_t* ctx, uint64_t slot, uint64_t v, uint8_t* dst) noexcept nogil:
    cdef const uint8_t* p
    if back_is_unit(v):
        return back_unit_read(st.backing, &st.units, ctx.units, slot, v, slot_prio(v), dst)
    p = backing_fetch(st.backing, slot, v, ctx.io)
    return object_unpack(ctx, v, p, back_size(v), dst) if p != NULL else -EIO


cdef int fetch_locked(store_t* st, store_ctx_t* ctx, uint64_t slot, uint64_t v, uint8_t* dst) noexcept nogil:
    """The page of a locked slot that was written back. The slot is unlocked before the device is asked.
    After a success the object's blocks stay pinned, so that the caller can check whether the slot still
    names the object: no other object can lie there meanwhile, so an equal value names the same one."""
    cdef int r
    if not ctx.may_wait:
        slot_unlock(st, slot, v)
        return -EAGAIN
    backing_pin(st.backing, v)
    # Before the slot can change: the algorithm stays as long (secondary.pxd).
    store32(&ctx.fetching, slot_prio(v))
    slot_unlock(st, slot, v & ~<uint64_t>SLOT_IDLE)
    r = back_load(st, ctx, slot, v, dst)
    store32(&ctx.fetching, 0)
    if r != 0:
        backing_unpin(st.backing, v)
    return r


cdef inline void object_release(store_t* st, uint64_t v) noexcept nogil:
    cdef int size = zs_free(st.pool, v >> LOC_SHIFT)
    if size > 0:
        sub64(&st.compr_bytes, <uint64_t>size)
        if slot_prio(v) != 0:
            sub64(&st.recompressed_pages, 1)
            sub64(&st.recompressed_bytes, <uint64_t>size)


cdef void value_release(store_t* st, uint64_t slot, uint64_t v) noexcept nogil:
    """Frees what an old value of a slot named, which it does not name any more. What most are comes first: a
    discard takes 400 instructions, and each comparison two of them."""
    cdef uint32_t kind = slot_type(v)
    if kind == OBJ:
        object_release(st, v)
    elif kind == HUGE:
        sub64(&st.huge_pages, 1)
        object_release(st, v)
    elif kind == SAME:
        sub64(&st.same_pages, 1)
    elif kind == SAME_OBJ:
        sub64(&st.same_pages, 1)
        zs_free(st.pool, v >> LOC_SHIFT)
    elif kind == WRITTEN_BACK:
        sub64(&st.written_back, 1)
        if back_is_unit(v):
            add64(&st.backing.unit_left, 1)
        backing_release(st.backing, v)
    elif kind == SHARED:
        sub64(&st.shared.pages, 1)
        shared_leave(&st.shared, slot_cell(slot, v))


cdef void slot_replace(store_t* st, uint64_t slot, uint64_t old, uint64_t new) noexcept nogil:
    if slot_type(old) == UNIT:
        # This store is the commit. The slot stays locked, so that the page cannot join the next unit before
        # it has left this one.
        store64(&st.slots[slot], new | SLOT_LOCK)
        unit_leave(&st.units, slot)
    slot_unlock(st, slot, new)
    value_release(st, slot, old)


cdef void page_prepare(store_t* st, store_ctx_t* ctx, const uint8_t* page, prepared_t* p) noexcept nogil:
    cdef int n
    p.bits = 0
    p.over = load32(&st.overdraft)
    if same_filled(page, &p.word):
        p.type = SAME if fits_slot(p.word) else SAME_OBJ
        p.data = <const uint8_t*>&p.word
        p.size = 0 if p.type == SAME else sizeof(p.word)
        return
    n = codec_compress(ctx.codec[0], page, PAGE, ctx.comp, <int>st.max_object)
    if n > 0:
        p.type = OBJ
        p.data = ctx.comp
        p.size = <uint32_t>n
    else:
        p.type = HUGE
        p.data = page
        p.size = PAGE
        p.over = load32(&st.raw_overdraft)


cdef int commit_locked(store_t* st, uint64_t slot, uint64_t old, const prepared_t* page) noexcept nogil:
    cdef uint64_t loc = 0, new
    cdef int r
    if page.type == SAME:
        new = same_slot(page.word)
    else:
        r = zs_malloc_over(st.pool, page.size, slot, page.over, &loc)
        if r == 0:
            r = zs_write(st.pool, loc, page.data, page.size)
        if r != 0:
            slot_unlock(st, slot, old)
            return -ENOSPC if r == -ENOMEM else r
        new = <uint64_t>page.type << TYPE_SHIFT | loc << LOC_SHIFT | page.bits
    if slot_type(old) == EMPTY:
        add32(&st.chunks[slot >> CHUNK_SHIFT], 1)
        add64(&st.pages_stored, 1)
    # Counted before another thread can free it: a sum must not pass below zero, even for a moment.
    if page.type == SAME or page.type == SAME_OBJ:
        add64(&st.same_pages, 1)
    else:
        add64(&st.compr_bytes, page.size)
        if slot_prio(page.bits) != 0:
            add64(&st.recompressed_pages, 1)
            add64(&st.recompressed_bytes, page.size)
    if page.type == HUGE:
        add64(&st.huge_pages, 1)
        add64(&st.record.huge_pages_since, 1)
    slot_replace(st, slot, old, new)
    return 0


# ---- whole pages ----------------------------------------------------------------------------------

cdef int unit_page_read(store_t* st, store_ctx_t* ctx, uint64_t slot, uint64_t v,
                        uint8_t* dst) noexcept nogil:
    """A page that was read since it joined its unit, or since it was marked idle, is in use again: it becomes
    a single page. Not where the pool is full; nor on a swap device, because a page that was swapped in is in
    memory then."""
    cdef prepared_t page
    cdef uint64_t limit = peek64(&st.arena.sb.limit_pages)
    cdef int r = unit_read(&st.units, ctx.units, slot, dst)
    if r != 0 or v & SLOT_IDLE or st.stays_ready or limit != 0 and peek64(&st.pool.pages) >= limit:
        slot_unlock(st, slot, v & ~<uint64_t>(SLOT_IDLE | SLOT_POST))
        return r
    page_prepare(st, ctx, dst, &page)
    page.over = 0
    commit_locked(st, slot, v & ~<uint64_t>SLOT_POST, &page)
    return 0


cdef int page_read(store_t* st, store_ctx_t* ctx, uint64_t slot, uint8_t* dst) noexcept nogil:
    cdef uint64_t v = load64(&st.slots[slot])
    cdef int r
    note_access(st, slot)
    if not v & SLOT_LOCK and slot_type(v) <= SAME:
        return page_load(st, ctx, v, dst)
    v = slot_lock(st, slot)
    if slot_type(v) == UNIT:
        return unit_page_read(st, ctx, slot, v, dst)
    if slot_type(v) == WRITTEN_BACK:
        # What the slot named when it was locked is an answer, whatever was written meanwhile.
        r = fetch_locked(st, ctx, slot, v, dst)
        if r == 0:
            backing_unpin(st.backing, v)
        return r
    r = slot_load(st, ctx, slot, v, dst)
    slot_unlock(st, slot, v & ~<uint64_t>(SLOT_IDLE | SLOT_POST))
    return r


cdef int page_peek(store_t* st, store_ctx_t* ctx, uint64_t slot, uint8_t* dst, uint64_t* v) noexcept nogil:
    cdef int r = 0
    v[0] = 0
    memset(dst, 0, PAGE)
    if chunk_pin(st, slot >> CHUNK_SHIFT):
        v[0] = slot_lock(st, slot)
        if slot_type(v[0]) != WRITTEN_BACK:
            r = slot_load(st, ctx, slot, v[0], dst)
        slot_unlock(st, slot, v[0])
    chunk_unpin(st, slot >> CHUNK_SHIFT)
    return r


cdef int page_write(store_t* st, store_ctx_t* ctx, uint64_t slot, const uint8_t* src) noexcept nogil:
    cdef prepared_t page
    page_prepare(st, ctx, src, &page)
    note_access(st, slot)
    return commit_locked(st, slot, slot_lock_to_change(st, slot), &page)


cdef int page_update(store_t* st, store_ctx_t* ctx, uint64_t slot, uint32_t start, const uint8_t* src,
                     uint32_t n) noexcept nogil:
    cdef uint64_t v = slot_lock_to_change(st, slot), now
    cdef prepared_t page
    cdef bint fetched = False
    cdef int r
    while slot_type(v) == WRITTEN_BACK and not fetched:
        r = fetch_locked(st, ctx, slot, v, ctx.page)
        if r != 0:
            return r
        now = slot_lock_to_change(st, slot)
        backing_unpin(st.backing, v)
        fetched = slot_type(now) == WRITTEN_BACK and now >> BACK_SIZE_SHIFT == v >> BACK_SIZE_SHIFT
        v = now
    if src == NULL and slot_type(v) == EMPTY:
        slot_unlock(st, slot, v)
        return 0
    r = 0 if fetched else slot_load(st, ctx, slot, v, ctx.page)
    if r != 0:
        slot_unlock(st, slot, v)
        return r
    if src != NULL:
        memcpy(ctx.page + start, src, n)
    else:
        memset(ctx.page + start, 0, n)
    note_access(st, slot)
    page_prepare(st, ctx, ctx.page, &page)
    return commit_locked(st, slot, v, &page)


cdef void page_free(store_t* st, uint64_t slot) noexcept nogil:
    cdef uint64_t v = load64(&st.slots[slot])
    # A locked empty slot is being written: this free came first.
    if slot_type(v) == EMPTY:
        return
    v = slot_lock_to_change(st, slot)
    if slot_type(v) == EMPTY:
        slot_unlock(st, slot, 0)
        return
    slot_replace(st, slot, v, 0)
    sub32(&st.chunks[slot >> CHUNK_SHIFT], 1)
    sub64(&st.pages_stored, 1)
