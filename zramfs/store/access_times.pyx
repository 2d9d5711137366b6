# SPDX-License-Identifier: Apache-2.0
# Lock order: slots.pxd. Chunks are pinned, and slots locked, one at a time.
"""Access times and idle marks; see access_times.pxd."""
from libc.stdint cimport uint32_t, uint64_t

from allocator.prim cimport *
from zramfs.store.page cimport boot_seconds
from zramfs.store.slots cimport *


cdef int keep_access_times(store_t* st, bint on) except -1:
    cdef uint64_t n
    cdef void* p
    if on and st.atime == NULL:
        n = slot_count(st) * sizeof(uint32_t)
        p = reserve_space(st.most_slots * sizeof(uint32_t))
        if p == NULL or try_open_space(p, n) != 0:
            if p != NULL:
                munmap(p, st.most_slots * sizeof(uint32_t))
            raise MemoryError(f"no address space for {n} bytes of access times")
        if st.stays_ready:
            make_resident(p, n)
        st.atime = <uint32_t*>p
    if on and not load32(&st.atime_on):
        store32(&st.atime_since, boot_seconds())
    # The store of atime_on is what shows the mapping to the threads; it stays until close(),
    # because a thread may be on its way to write there.
    store32(&st.atime_on, on)
    if not on and st.atime != NULL:
        madvise(st.atime, slot_count(st) * sizeof(uint32_t), MADV_DONTNEED)
    return 0


cdef uint32_t last_access(store_t* st, uint64_t slot) noexcept nogil:
    cdef uint32_t since, t
    if not load32(&st.atime_on):
        return 0
    since = load32(&st.atime_since)
    t = load32(&st.atime[slot])
    return t if t > since else since


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
        if slot_type(v) == OBJ or slot_type(v) == HUGE:
            v = slot_lock(st, slot)
            if slot_type(v) == OBJ or slot_type(v) == HUGE:
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
