# SPDX-License-Identifier: Apache-2.0
# Lock order: slots.pxd. Chunks beyond the new end are pinned, and their slots locked, one at a time.
# - store_t.nr_slots is the one word that says how large the device is. One resize at a time writes it: who
#   has Store.resizing, which the GIL guards.
"""The size of a device that is in use.

Larger: the tables have address space for more slots than the device has. So nothing moves, and no reader or
writer waits. The new part is opened first, which the system may refuse. The new number of slots comes last,
in the record before it counts here: whoever reads it finds the tables ready, and a process that adopts the
memory file finds every page that a write could reach.

Smaller: the new number of slots comes first, and keeps new writes away from what lies behind it. A write that
had read the old number may still be on its way. It has pinned its chunk, or it looks at the number once more
after it has pinned it (store_write()). So each chunk behind the end is waited for until nobody but this
thread has it pinned, and then its pages are freed. The end is a multiple of a chunk's 2 MiB, because the
chunk in the middle of which it lay would never be without a pin. The record gets the new number once it is
certain that no page behind the end is wanted: recovery frees what lies there.
"""
from libc.errno cimport EBUSY, ENOTEMPTY
from libc.stdint cimport uint32_t, uint64_t

from allocator.prim cimport *
from zramfs.store.access_times cimport times_give_back
from zramfs.store.record cimport record_size
from zramfs.store.slots cimport *
from zramfs.store.store cimport Store
from zramfs.store.tables cimport slots_make_resident

from zramfs.model import config

STEP = PAGE << CHUNK_SHIFT
assert STEP == config.RESIZE_STEP


cdef int tables_open(store_t* st, uint64_t nr_slots) noexcept nogil:
    """0 or -ENOMEM. A part that was opened all the same is used by the next attempt."""
    cdef int r = try_open_space(st.chunks, chunks_of(nr_slots) * sizeof(uint32_t))
    if r == 0 and st.stays_ready:
        r = slots_make_resident(st, chunk_count(st), chunks_of(nr_slots))
    return r


cdef int times_open(store_t* st, uint64_t nr_slots) noexcept nogil:
    """0 or -ENOMEM. Without a reserve, chunk_open() asks for the memory of each chunk."""
    cdef uint64_t chunk
    cdef int r = 0
    if st.stays_ready and load32(&st.atime_wanted):
        for chunk in range(chunk_count(st), chunks_of(nr_slots)):
            if r == 0:
                r = chunk_populate_times(st, chunk)
    return r


cdef int store_grow(store_t* st, uint64_t nr_slots) noexcept:
    """0, or -ENOMEM and the device is as it was. The second part has the GIL, so that access times are not
    switched on meanwhile: that makes the times of the chunks resident that the device has at that moment."""
    cdef int r
    with nogil:
        r = tables_open(st, nr_slots)
    if r == 0:
        r = times_open(st, nr_slots)
    if r == 0:
        store64(&st.record.size, record_size(st.record, nr_slots))
        store64(&st.nr_slots, nr_slots)
    return r


cdef bint chunk_is_unused(store_t* st, uint64_t chunk) noexcept nogil:
    """True if a chunk behind the end has no slot in use and never will. Waits until no other thread is
    inside: for a piece of a request, which may be one read of the backing store."""
    cdef unsigned int round = 0
    # A change of the word, even of nothing, and not only a look at it: a thread that pins the chunk after
    # that sees the new size.
    cdef uint32_t word = add32(&st.chunks[chunk], 0)
    while word & ~<uint32_t>CHUNK_USED:
        relax(round)
        round += 1
        word = add32(&st.chunks[chunk], 0)
    return word == 0


cdef void chunk_drop(store_t* st, uint64_t chunk) noexcept nogil:
    cdef uint64_t slot
    if chunk_pin(st, chunk):
        for slot in range(chunk << CHUNK_SHIFT, (chunk + 1) << CHUNK_SHIFT):
            page_free(st, slot)
    chunk_unpin(st, chunk)


cdef bint has_pages_behind(store_t* st, uint64_t nr_slots, uint64_t before) noexcept nogil:
    cdef uint64_t chunk
    for chunk in range(chunks_of(nr_slots), chunks_of(before)):
        if load32(&st.chunks[chunk]) & CHUNK_USED != 0:
            return True
    return False


cdef bint store_shrink(store_t* st, uint64_t nr_slots, bint discard) noexcept nogil:
    """False if pages are stored behind the new end and are not to be discarded: the device is as it was."""
    cdef uint64_t before = slot_count(st), chunk
    if not discard and has_pages_behind(st, nr_slots, before):
        return False
    if discard:
        store64(&st.record.size, record_size(st.record, nr_slots))
    store64(&st.nr_slots, nr_slots)
    for chunk in range(chunks_of(nr_slots), chunks_of(before)):
        if chunk_is_unused(st, chunk):
            continue
        if not discard:
            # It was written between the two looks.
            store64(&st.nr_slots, before)
            return False
        chunk_drop(st, chunk)
    store64(&st.record.size, record_size(st.record, nr_slots))
    # Not the chunk words: a thread that is on its way may have its pin there.
    times_give_back(st, nr_slots * sizeof(uint32_t), before * sizeof(uint32_t))
    return True


def room_to_grow(Store store not None):
    """Bytes: the most that resize() can make of the device."""
    store.check_range(0, 0)
    return store.st.most_slots << PAGE_SHIFT


def resize(Store store not None, disksize, *, bint discard=False):
    """Changes the size of a device that may be in use: to disksize bytes, rounded up to 2 MiB. Returns the
    size that it has then. discard: pages that are stored behind the new end are dropped.

    A write that is under way behind the new end fails with EINVAL. Raises ValueError for a size outside 1 to
    room_to_grow(); OSError, with the device as it was: EBUSY beside another resize, ENOTEMPTY for pages
    behind the new end; MemoryError when the system refuses memory for the tables.
    """
    cdef uint64_t slots
    cdef store_t* st
    cdef bint done
    store.check_range(0, 0)
    most = room_to_grow(store)
    if not 1 <= disksize <= most:
        raise ValueError(f"a size of 1 to {most} bytes expected, got {disksize}: the device was made with "
                         "address space for no more")
    st = store.st
    if disksize > (slot_count(st) - 1) << PAGE_SHIFT and disksize <= slot_count(st) << PAGE_SHIFT:
        return store.disksize
    # The room itself need not be a multiple.
    slots = min((disksize + STEP - 1) // STEP * STEP, most) >> PAGE_SHIFT
    if store.resizing:
        raise OSError(EBUSY, "the size of this device is just being changed")
    store.resizing = True
    try:
        if slots > slot_count(st):
            if store_grow(st, slots) != 0:
                raise MemoryError(f"the system refuses the tables of a device of {slots << PAGE_SHIFT} bytes")
        elif slots < slot_count(st):
            with nogil:
                done = store_shrink(st, slots, discard)
            if not done:
                raise OSError(ENOTEMPTY, f"pages are stored behind {slots << PAGE_SHIFT} bytes")
    finally:
        store.resizing = False
    return store.disksize
