# SPDX-License-Identifier: Apache-2.0
# Lock order: slots.pxd. Chunks are pinned, and slots locked, one at a time.
"""Access times and idle marks; see access_times.pxd."""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from allocator.prim cimport *
from zramfs.store.page cimport boot_seconds
from zramfs.store.slots cimport *


cdef int times_populate(store_t* st) noexcept nogil:
    """Asks for the memory of the times of every chunk that is in use, or that a thread is in. Threads that
    come later do that themselves (chunk_open())."""
    cdef uint64_t chunk
    cdef int r = 0
    # A swap, so that no chunk is looked at before it.
    swap32(&st.atime_wanted, 1)
    for chunk in range(chunk_count(st)):
        if r == 0 and (st.stays_ready or load32(&st.chunks[chunk]) != 0):
            r = chunk_populate_times(st, chunk)
    return r


cdef void times_give_back(store_t* st, uint64_t begin, uint64_t end) noexcept nogil:
    begin = round_up(begin, PAGE)
    end = round_up(end, PAGE)
    if begin < end:
        fallocate(st.arena.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  <int64_t>(st.arena.sb.user_off + times_off(st) + begin), <int64_t>(end - begin))


cdef int keep_access_times(store_t* st, bint on) except -1:
    cdef int r = 0
    cdef uint64_t n = slot_count(st) * sizeof(uint32_t)
    if on and not load32(&st.atime_on):
        with nogil:
            r = times_populate(st)
        if r != 0:
            store32(&st.atime_wanted, 0)
            raise MemoryError(f"the system refuses the memory of access times, at most {n} bytes")
        store32(&st.record.atime_since, boot_seconds())
    store32(&st.record.atime_on, on)
    store32(&st.atime_on, on)
    if not on and load32(&st.atime_wanted):
        store32(&st.atime_wanted, 0)
        # A thread may be on its way to write there: it makes a page anew.
        times_give_back(st, 0, n)
    return 0


cdef uint32_t last_access(store_t* st, uint64_t slot) noexcept nogil:
    cdef uint32_t since, t
    if not load32(&st.atime_on):
        return 0
    since = load32(&st.record.atime_since)
    t = load32(&st.atime[slot])
    return t if t > since else since


cdef uint32_t time_of_age(store_t* st, age) except? 0:
    cdef uint32_t seconds, now = boot_seconds()
    if age is None:
        return 0
    if not load32(&st.atime_on):
        raise ValueError("access times are not kept, so no page has an age")
    seconds = min(max(age, 0), now)
    # No page was used in the first second since boot.
    return max(now - seconds, <uint32_t>1)


cdef void chunk_mark_idle(store_t* st, uint64_t chunk, uint32_t age) noexcept nogil:
    cdef uint64_t slot = chunk << CHUNK_SHIFT, end, v
    cdef uint32_t now = boot_seconds()
    end = slot + CHUNK_SLOTS
    if end > slot_count(st):
        end = slot_count(st)
    while slot < end:
        v = load64(&st.slots[slot])
        # A page that is locked is in use by another thread. It is looked at all the same, because that
        # thread may have begun long before the mark.
        if slot_can_idle(v):
            v = slot_lock(st, slot)
            if slot_can_idle(v):
                if age == 0 or <uint64_t>last_access(st, slot) + age < now:
                    v |= SLOT_IDLE
                else:
                    v &= ~<uint64_t>SLOT_IDLE
            slot_unlock(st, slot, v)
        slot += 1


cdef uint64_t mark_idle(store_t* st, uint64_t chunk, uint32_t age, uint64_t ns) noexcept nogil:
    cdef uint64_t until = now_ns() + ns
    while chunk < chunk_count(st):
        if load32(&st.chunks[chunk]) & CHUNK_USED != 0:
            if chunk_pin(st, chunk):
                chunk_mark_idle(st, chunk, age)
            chunk_unpin(st, chunk)
        chunk += 1
        if ns != 0 and chunk & 15 == 0 and now_ns() >= until:
            break
    return chunk
