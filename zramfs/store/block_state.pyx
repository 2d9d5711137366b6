# SPDX-License-Identifier: Apache-2.0
"""zram/block_state: a line for each page that is stored, in the kernel's format, made as it is read.

    index, time of the last access in seconds since boot, flags
              300           75.000000 .wh..n
    s same-filled  w written back  h huge (stored raw, there too)  i idle  n incompressible
    r recompressed, or compressed together with its neighbours (units.pxd), there too; a page that shares its
    object (shared.pxd) has the flags r and i alone
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.stdio cimport snprintf

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize

from allocator.prim cimport load32, load64
from zramfs.store.access_times cimport last_access
from zramfs.store.backing cimport BACK_HUGE, back_is_unit
from zramfs.store.slots cimport *
from zramfs.store.store cimport Store

cdef enum:
    LINE = 64       # bytes; the longest has 20 + 1 + 12 + 7 + 1 + 6 + 1, and a NUL while it is made


cdef int format_line(store_t* st, uint64_t slot, uint64_t v, char* line) noexcept nogil:
    cdef uint32_t kind = slot_type(v)
    cdef bint huge = kind == HUGE or kind == WRITTEN_BACK and v & BACK_HUGE != 0
    return snprintf(
        line, LINE, "%12llu %12u.%06d %c%c%c%c%c%c\n", <unsigned long long>slot, last_access(st, slot), 0,
        <int>(c's' if kind == SAME or kind == SAME_OBJ else c'.'),
        <int>(c'w' if kind == WRITTEN_BACK else c'.'),
        <int>(c'h' if huge else c'.'), <int>(c'i' if v & SLOT_IDLE else c'.'),
        <int>(c'r' if slot_prio(v) or kind == UNIT or kind == WRITTEN_BACK and back_is_unit(v) else c'.'),
        <int>(c'n' if v & SLOT_INCOMPRESSIBLE else c'.'))


cdef uint64_t format_chunk(store_t* st, uint64_t slot, char* out, uint64_t* used,
                           uint64_t room) noexcept nogil:
    """The slot that found no room, or the first of the next chunk."""
    cdef uint64_t end = ((slot >> CHUNK_SHIFT) + 1) << CHUNK_SHIFT, v
    cdef char line[LINE]
    cdef int n, i
    if end > slot_count(st):
        end = slot_count(st)
    while slot < end:
        # One look, without the lock: what a page is may change before the line is read anyway.
        v = load64(&st.slots[slot])
        if slot_type(v) != EMPTY:
            n = format_line(st, slot, v, line)
            if used[0] + <uint64_t>n > room:
                return slot
            for i in range(n):
                out[used[0] + <uint64_t>i] = line[i]
            used[0] += <uint64_t>n
        slot += 1
    return slot


def lines(Store store not None, slot, room):
    """Whole lines from a slot on, in at most room bytes, and the slot where the next ones begin. No
    lines: the rest of the device is empty, or a line has no room. Takes about 0.3 us a line."""
    cdef uint64_t at, used = 0, n = room, before, slots
    cdef char* out
    store.check_range(0, 0)
    slots = slot_count(store.st)
    at = min(slot, slots)
    whole = PyBytes_FromStringAndSize(NULL, room)
    out = PyBytes_AS_STRING(whole)
    with nogil:
        while at < slots:
            before = at
            if load32(&store.st.chunks[at >> CHUNK_SHIFT]) & CHUNK_USED == 0:
                at = ((at >> CHUNK_SHIFT) + 1) << CHUNK_SHIFT
                continue
            if chunk_pin(store.st, before >> CHUNK_SHIFT):
                at = format_chunk(store.st, at, out, &used, n)
            else:
                at = ((at >> CHUNK_SHIFT) + 1) << CHUNK_SHIFT
            chunk_unpin(store.st, before >> CHUNK_SHIFT)
            if at == before or at & (CHUNK_SLOTS - 1) != 0:
                break
    return whole[:used], at
