# SPDX-License-Identifier: Apache-2.0
# Lock order: slots.pxd. Chunks are pinned, and slots locked, one at a time.
"""The steps of post-processing; see selection.pxd."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from allocator.prim cimport add64, load64, make_resident
from allocator.zsmalloc cimport zs_map, zs_unmap
from zramfs.store.slots cimport *
from zramfs.store.units cimport UNIT_PAGES, UNIT_SHIFT_PAGES, unit_head_t, unit_read, unit_stream


cdef uint32_t object_size(store_t* st, store_ctx_t* ctx, uint64_t v) noexcept nogil:
    cdef uint32_t size = 0
    if slot_type(v) == UNIT:
        return UNIT_SHARE
    if slot_type(v) == HUGE:
        return PAGE
    if zs_map(st.pool, v >> LOC_SHIFT, ctx.scratch, &size) == NULL:
        return 0
    zs_unmap(st.pool, v >> LOC_SHIFT)
    return size


cdef inline bint slot_wanted(uint64_t v, uint32_t want) noexcept nogil:
    if not slot_can_idle(v) or v & SLOT_POST or slot_type(v) == SHARED:
        return False
    return ((not want & WANT_IDLE or v & SLOT_IDLE) and (not want & WANT_HUGE or slot_type(v) == HUGE)
            and (not want & WANT_INCOMPRESSIBLE or v & SLOT_INCOMPRESSIBLE))


cdef uint32_t slot_select(store_t* st, store_ctx_t* ctx, uint64_t slot, uint32_t want,
                          bint* in_unit) noexcept nogil:
    cdef uint32_t size = 0
    cdef uint64_t v
    in_unit[0] = False
    # Looked at first without the lock: most slots are not wanted.
    if chunk_pin(st, slot >> CHUNK_SHIFT) and slot_wanted(load64(&st.slots[slot]), want):
        v = slot_lock(st, slot)
        if slot_wanted(v, want):
            size = object_size(st, ctx, v)
            if size != 0:
                v |= SLOT_POST
                in_unit[0] = slot_type(v) == UNIT
        slot_unlock(st, slot, v)
    chunk_unpin(st, slot >> CHUNK_SHIFT)
    return size


cdef void slot_unselect(store_t* st, uint64_t slot) noexcept nogil:
    if chunk_pin(st, slot >> CHUNK_SHIFT):
        slot_unlock(st, slot, slot_lock(st, slot) & ~<uint64_t>SLOT_POST)
    chunk_unpin(st, slot >> CHUNK_SHIFT)


cdef uint32_t unit_page_copy(store_t* st, store_ctx_t* ctx, uint64_t slot, uint8_t* dst) noexcept nogil:
    """An object that a page of a unit is compressed to for the backing store: its size, or 0."""
    cdef prepared_t page
    if unit_read(&st.units, ctx.units, slot, dst) != 0:
        return 0
    page_prepare(st, ctx, dst, &page)
    if page.type == OBJ:
        memcpy(dst, page.data, page.size)
    return page.size if page.type == OBJ or page.type == HUGE else 0


cdef uint32_t slot_copy(store_t* st, store_ctx_t* ctx, uint64_t slot, uint8_t* dst) noexcept nogil:
    cdef const uint8_t* p
    cdef uint32_t size = 0
    cdef uint64_t v
    # Before the lock: see "Why swap cannot deadlock" in docs/concurrency.md.
    if st.stays_ready:
        make_resident(dst, PAGE)
    if chunk_pin(st, slot >> CHUNK_SHIFT):
        v = slot_lock(st, slot)
        if v & SLOT_POST and slot_type(v) == UNIT:
            size = unit_page_copy(st, ctx, slot, dst)
        elif v & SLOT_POST:
            p = zs_map(st.pool, v >> LOC_SHIFT, ctx.scratch, &size)
            if p != NULL:
                memcpy(dst, p, size)
                zs_unmap(st.pool, v >> LOC_SHIFT)
        slot_unlock(st, slot, v)
    chunk_unpin(st, slot >> CHUNK_SHIFT)
    return size


cdef uint32_t unit_copy(store_t* st, store_ctx_t* ctx, uint64_t group, uint32_t* which,
                        unit_head_t* head) noexcept nogil:
    """No unit is made meanwhile. So the slots that are selected still are in this unit, and one of them,
    locked, keeps it."""
    cdef uint64_t first = group << UNIT_SHIFT_PAGES, v
    cdef uint32_t size = 0, place, still = 0
    if chunk_pin(st, first >> CHUNK_SHIFT):
        for place in range(<uint32_t>UNIT_PAGES):
            if which[0] >> place & 1:
                v = slot_lock(st, first + place)
                if slot_type(v) == UNIT and v & SLOT_POST:
                    if still == 0:
                        size = unit_stream(&st.units, ctx.units, group, head)
                    still |= 1u << place
                slot_unlock(st, first + place, v)
    chunk_unpin(st, first >> CHUNK_SHIFT)
    which[0] = still & head.members if size != 0 else still
    return size


cdef bint slot_written_back(store_t* st, uint64_t slot, uint64_t place, uint32_t prio) noexcept nogil:
    cdef uint64_t v, kept = PRIO_MASK << PRIO_SHIFT | SLOT_INCOMPRESSIBLE
    place |= <uint64_t>prio << PRIO_SHIFT   # a slot of type UNIT has none
    cdef bint selected = False
    if chunk_pin(st, slot >> CHUNK_SHIFT):
        v = slot_lock(st, slot)
        selected = v & SLOT_POST != 0
        if selected:
            add64(&st.written_back, 1)
            slot_replace(st, slot, v, place | WRITTEN_BACK << TYPE_SHIFT | v & kept)
        else:
            slot_unlock(st, slot, v)
    chunk_unpin(st, slot >> CHUNK_SHIFT)
    return selected
