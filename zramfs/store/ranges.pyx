# SPDX-License-Identifier: Apache-2.0
# Lock order: slots.pxd. A range takes the chunks it covers one after the other, pinned one at a time.
"""Byte ranges of a device: read, written, zeroed and sought, over the slot table; see ranges.pxd."""
from libc.errno cimport EAGAIN, EINVAL, ENXIO
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from allocator.prim cimport add64, cas64, load32, load64, peek64, store32, store64, write
from zramfs.store.slots cimport *

cdef enum:
    # For a piece of 32 KiB: 16 MiB/s with two threads, then 8 to 1. The governor acts within 20 ms, but on
    # two CPUs with 16 busy programs it took more than 0.4 s, in which 6 MiB came in at 16 MiB/s.
    SLOW_US = 4000
    MOST_SLOW_SHIFT = 4

cdef extern from "<unistd.h>" nogil:
    int usleep(unsigned int us) noexcept


cdef uint64_t store_disksize(store_t* st) noexcept nogil:
    return slot_count(st) << PAGE_SHIFT


cdef uint64_t store_data_bytes(store_t* st) noexcept nogil:
    return peek64(&st.pages_stored) << PAGE_SHIFT


cdef inline bint in_range(store_t* st, uint64_t off, uint64_t n) noexcept nogil:
    return off <= store_disksize(st) and n <= store_disksize(st) - off


cdef inline uint64_t piece_end(uint64_t off, uint64_t end, uint32_t shift) noexcept nogil:
    """The end of the piece of [off, end) that lies in the unit of 2^shift bytes around off."""
    cdef uint64_t border = ((off >> shift) + 1) << shift
    return border if border < end else end


cdef int read_chunk(store_t* st, store_ctx_t* ctx, uint64_t off, uint64_t end, uint8_t* buf) noexcept nogil:
    cdef uint64_t piece
    cdef uint32_t start
    cdef int r = 0
    while off < end:
        piece = piece_end(off, end, PAGE_SHIFT)
        start = <uint32_t>(off & (PAGE - 1))
        if piece - off == PAGE:
            r = page_read(st, ctx, off >> PAGE_SHIFT, buf)
        else:
            r = page_read(st, ctx, off >> PAGE_SHIFT, ctx.page)
            if r == 0:
                memcpy(buf, ctx.page + start, piece - off)
        if r != 0:
            if r != -EAGAIN:
                add64(&st.record.failed_reads, 1)
            return r
        buf += piece - off
        off = piece
    return 0


cdef int store_read(store_t* st, store_ctx_t* ctx, uint64_t off, uint8_t* buf, uint64_t n) noexcept nogil:
    cdef uint64_t end = off + n, piece, chunk
    cdef int r
    if not in_range(st, off, n):
        return -EINVAL
    while off < end:
        piece = piece_end(off, end, PAGE_SHIFT + CHUNK_SHIFT)
        chunk = off >> (PAGE_SHIFT + CHUNK_SHIFT)
        # Looked at first without a pin, so that reading an empty device changes no word.
        if load32(&st.chunks[chunk]) & CHUNK_USED == 0:
            memset(buf, 0, piece - off)
        else:
            r = 0
            if chunk_pin(st, chunk):
                r = read_chunk(st, ctx, off, piece, buf)
            else:
                memset(buf, 0, piece - off)
            chunk_unpin(st, chunk)
            if r != 0:
                return r
        buf += piece - off
        off = piece
    return 0


cdef int write_chunk(store_t* st, store_ctx_t* ctx, uint64_t off, uint64_t end, const uint8_t* buf,
                     uint64_t* done) noexcept nogil:
    cdef uint64_t piece
    cdef int r
    while off < end:
        piece = piece_end(off, end, PAGE_SHIFT)
        if piece - off == PAGE:
            r = page_write(st, ctx, off >> PAGE_SHIFT, buf)
        else:
            r = page_update(st, ctx, off >> PAGE_SHIFT, <uint32_t>(off & (PAGE - 1)), buf,
                            <uint32_t>(piece - off))
        if r != 0:
            if r != -EAGAIN:
                add64(&st.record.failed_writes, 1)
            return r
        done[0] += piece - off
        buf += piece - off
        off = piece
    return 0


cdef inline void note_change(store_t* st, uint64_t n) noexcept nogil:
    """Wakes whoever keeps a file system within the pool's limit, when so much has changed."""
    cdef uint64_t changed, at, one = 1
    if load32(&st.watched) == 0:
        return
    changed = add64(&st.changed, n)
    at = peek64(&st.change_at)
    if at != 0 and changed >= at and cas64(&st.change_at, at, 0):
        write(st.change_fd, &one, sizeof(one))


cdef inline void slow_down(store_t* st) noexcept nogil:
    """Makes a write that takes from the governed reserve wait, the longer the more is taken, before it holds
    anything."""
    cdef uint32_t step = load32(&st.slow_step)
    cdef uint64_t slow, used
    if step == 0:
        return
    slow = peek64(&st.arena.sb.limit_pages) + load32(&st.slow_overdraft)
    used = peek64(&st.pool.pages) + peek64(&st.arena.reserved)
    if used > slow:
        usleep(<unsigned int>SLOW_US << min((used - slow) // step, <uint64_t>MOST_SLOW_SHIFT))


cdef void store_set_overdraft(store_t* st, uint32_t pages, uint32_t reserve) noexcept nogil:
    store32(&st.overdraft, pages)
    store32(&st.raw_overdraft, pages - reserve // 4)
    store32(&st.slow_overdraft, pages - reserve // 4 * 3)
    store32(&st.slow_step, reserve // 16)


cdef int store_write(store_t* st, store_ctx_t* ctx, uint64_t off, const uint8_t* buf, uint64_t n,
                     uint64_t* done) noexcept nogil:
    cdef uint64_t end = off + n, piece, chunk
    cdef int r
    if not in_range(st, off, n) or done[0] > n:
        return -EINVAL
    slow_down(st)
    note_change(st, n - done[0])
    off += done[0]
    buf += done[0]
    while off < end:
        piece = piece_end(off, end, PAGE_SHIFT + CHUNK_SHIFT)
        chunk = off >> (PAGE_SHIFT + CHUNK_SHIFT)
        r = chunk_open(st, chunk)
        if r != 0:
            add64(&st.record.failed_writes, 1)
            return r
        # With the chunk pinned, because a device that was made smaller meanwhile waits for the pins before it
        # drops what lies behind its end.
        r = write_chunk(st, ctx, off, piece, buf, done) if chunk < chunk_count(st) else -EINVAL
        chunk_unpin(st, chunk)
        if r != 0:
            return r
        buf += piece - off
        off = piece
    return 0


cdef void free_pages(store_t* st, store_ctx_t* ctx, uint64_t slot, uint64_t last) noexcept nogil:
    """Slots [slot, last)."""
    cdef uint64_t piece, chunk
    while slot < last:
        chunk = slot >> CHUNK_SHIFT
        piece = piece_end(slot, last, CHUNK_SHIFT)
        # Without a slot in use there is nothing to free, however large the range.
        if load32(&st.chunks[chunk]) & CHUNK_USED != 0:
            if chunk_pin(st, chunk):
                while slot < piece:
                    page_free(st, slot)
                    slot += 1
            chunk_unpin(st, chunk)
            if ctx.steps != NULL:
                store64(ctx.steps, peek64(ctx.steps) + 1)
        slot = piece


cdef int zero_part(store_t* st, store_ctx_t* ctx, uint64_t off, uint64_t end) noexcept nogil:
    """[off, end) of one page."""
    cdef uint64_t slot = off >> PAGE_SHIFT, chunk = slot >> CHUNK_SHIFT
    cdef int r = 0
    if off >= end or load32(&st.chunks[chunk]) & CHUNK_USED == 0:
        return 0
    if chunk_pin(st, chunk):
        r = page_update(st, ctx, slot, <uint32_t>(off & (PAGE - 1)), NULL, <uint32_t>(end - off))
    chunk_unpin(st, chunk)
    if r != 0 and r != -EAGAIN:
        add64(&st.record.failed_writes, 1)
    return r


cdef int store_zero(store_t* st, store_ctx_t* ctx, uint64_t off, uint64_t n, uint64_t* done) noexcept nogil:
    """done: 1 when the whole pages are free."""
    cdef uint64_t end = off + n, first, last
    cdef int r
    if not in_range(st, off, n):
        return -EINVAL
    first = (off + PAGE - 1) >> PAGE_SHIFT
    last = end >> PAGE_SHIFT
    # Whole pages first: in a full pool they make the room that the rest of a partial page may need.
    if last > first and not done[0]:
        add64(&st.record.notify_free, last - first)
        free_pages(st, ctx, first, last)
        note_change(st, (last - first) << PAGE_SHIFT)
        done[0] = 1
    if first > last:
        return zero_part(st, ctx, off, end)
    r = zero_part(st, ctx, off, first << PAGE_SHIFT)
    if r != 0:
        return r
    return zero_part(st, ctx, last << PAGE_SHIFT, end)


cdef uint64_t seek_in_chunk(store_t* st, uint64_t slot, uint64_t end, bint hole) noexcept nogil:
    """The first slot of a kind at or after slot, or the end of its part of a chunk."""
    cdef uint64_t chunk = slot >> CHUNK_SHIFT
    if chunk_pin(st, chunk):
        while slot < end and (slot_type(load64(&st.slots[slot])) == EMPTY) != hole:
            slot += 1
    elif not hole:
        slot = end
    chunk_unpin(st, chunk)
    return slot


cdef int64_t store_seek(store_t* st, uint64_t off, bint hole) noexcept nogil:
    cdef uint64_t slot = off >> PAGE_SHIFT, slots = slot_count(st), end, start
    cdef uint32_t used
    if off >= slots << PAGE_SHIFT:
        return -ENXIO
    while slot < slots:
        end = piece_end(slot, slots, CHUNK_SHIFT)
        used = load32(&st.chunks[slot >> CHUNK_SHIFT]) & CHUNK_USED
        if used == 0:
            if hole:
                break
            slot = end
        elif hole and used == CHUNK_SLOTS:
            slot = end
        else:
            slot = seek_in_chunk(st, slot, end, hole)
            if slot < end:
                break
    if slot >= slots:
        return <int64_t>(slots << PAGE_SHIFT) if hole else -ENXIO
    start = slot << PAGE_SHIFT
    return <int64_t>(off if start < off else start)
