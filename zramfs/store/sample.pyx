# SPDX-License-Identifier: Apache-2.0
# Lock order: slots.pxd. A slot is locked while the sum of its object is made, 0.2 us.
"""A sample of the groups of a store; see sample.pxd."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from allocator.prim cimport *
from allocator.zsmalloc cimport zs_map, zs_unmap
from zramfs.store.page cimport bytes_sum
from zramfs.store.shared cimport shared_fetch
from zramfs.store.slots cimport *
from zramfs.store.units cimport UNIT_PAGES

cdef enum:
    CHUNK_GROUPS = CHUNK_SLOTS // 16
    LOOK = 8                    # chunks between two looks at the clock: up to 2 ms


cdef void sample_init(sample_t* s, store_t* st, uint8_t* object, uint64_t wanted,
                      uint64_t seed) noexcept nogil:
    memset(s, 0, sizeof(s[0]))
    s.st, s.object, s.wanted = st, object, wanted
    s.seed = s.lot = seed


cdef void sample_free(sample_t* s) noexcept nogil:
    free(s.chosen)
    free(s.entries)
    s.chosen, s.entries = NULL, NULL


# ---- the table ----------------------------------------------------------------------------------

cdef inline sample_entry_t* entry_at(sample_t* s, uint64_t sum) noexcept nogil:
    """That of a sum, or the empty one where it belongs. The table is at most half full."""
    cdef uint64_t i = sum & s.mask
    while s.entries[i].sum != 0 and s.entries[i].sum != sum:
        i = (i + 1) & s.mask
    return &s.entries[i]


cdef inline uint64_t object_sum(sample_t* s, uint64_t v, const uint8_t* p, uint32_t size) noexcept nogil:
    cdef uint64_t sum = bytes_sum(p, size, s.seed ^ slot_prio(v))
    return sum if sum != 0 else 1


cdef uint64_t sample_copies(sample_t* s, uint64_t v, const uint8_t* object, uint32_t size) noexcept nogil:
    cdef uint64_t copies = entry_at(s, object_sum(s, v, object, size)).copies
    return copies if copies != 0 else 1


cdef uint64_t slot_sum(sample_t* s, uint64_t slot) noexcept nogil:
    """Of the object of a slot; 0: it has none that can be shared."""
    cdef store_t* st = s.st
    cdef const uint8_t* p
    cdef uint32_t size = 0
    cdef uint64_t v, sum = 0
    if not may_share(load64(&st.slots[slot])):
        return 0
    if st.stays_ready:
        # Before the lock: see "Why swap cannot deadlock" in docs/concurrency.md.
        make_resident(s.object, PAGE)
    v = slot_lock(st, slot)
    if slot_type(v) == SHARED:
        size = shared_fetch(&st.shared, slot_cell(slot, v), s.object)
        sum = object_sum(s, v, s.object, size) if size != 0 else 0
    elif may_share(v):
        p = zs_map(st.pool, v >> LOC_SHIFT, s.object, &size)
        if p != NULL:
            sum = object_sum(s, v, p, size)
            zs_unmap(st.pool, v >> LOC_SHIFT)
    slot_unlock(st, slot, v)
    return sum


# ---- the walks ----------------------------------------------------------------------------------

cdef inline double lot_draw(sample_t* s) noexcept nogil:
    """At least 0 and below 1, by splitmix64."""
    cdef uint64_t z
    s.lot += <uint64_t>0x9e3779b97f4a7c15
    z = s.lot
    z = (z ^ z >> 30) * <uint64_t>0xbf58476d1ce4e5b9
    z = (z ^ z >> 27) * <uint64_t>0x94d049bb133111eb
    return ((z ^ z >> 31) >> 11) / 9007199254740992.0


cdef inline bint group_counts(store_t* st, uint64_t first, uint64_t end) noexcept nogil:
    cdef uint64_t slot
    for slot in range(first, end):
        if takes_memory(load64(&st.slots[slot])):
            return True
    return False


cdef void group_choose(sample_t* s, uint64_t first, uint64_t end) noexcept nogil:
    """Each choice of `wanted` among `groups` has the same chance (Knuth 3.4.2, algorithm S)."""
    cdef uint64_t slot, sum
    # Groups that came since they were counted have none.
    if s.ahead == 0:
        return
    s.ahead -= 1
    if lot_draw(s) * (s.ahead + 1) >= s.wanted - s.nr_chosen:
        return
    s.chosen[s.nr_chosen] = first
    s.nr_chosen += 1
    for slot in range(first, end):
        sum = slot_sum(s, slot)
        if sum != 0:
            entry_at(s, sum).sum = sum


cdef void group_compare(sample_t* s, uint64_t first, uint64_t end) noexcept nogil:
    cdef uint64_t slot, sum
    cdef sample_entry_t* entry
    for slot in range(first, end):
        sum = slot_sum(s, slot)
        if sum != 0:
            entry = entry_at(s, sum)
            if entry.sum != 0:
                entry.copies += 1


cdef void chunk_visit(sample_t* s, uint64_t chunk) noexcept nogil:
    cdef store_t* st = s.st
    cdef uint64_t k, first, end
    # With the chunk pinned the device may have become smaller: see store_write().
    if chunk_pin(st, chunk) and chunk < chunk_count(st):
        for k in range(<uint64_t>CHUNK_GROUPS):
            first = (chunk << CHUNK_SHIFT) + k * UNIT_PAGES
            end = min(first + UNIT_PAGES, slot_count(st))
            if first >= end or not group_counts(st, first, end):
                continue
            if s.walk == SAMPLE_COUNT:
                s.groups += 1
            elif s.walk == SAMPLE_CHOOSE:
                group_choose(s, first, end)
            else:
                group_compare(s, first, end)
    chunk_unpin(st, chunk)


cdef bint table_make(sample_t* s) noexcept nogil:
    """After the first walk. False: memory is short."""
    cdef uint64_t entries = 1024
    s.ahead = s.groups
    s.wanted = min(s.wanted, s.groups)
    while entries < 2 * UNIT_PAGES * s.wanted:
        entries *= 2
    s.mask = entries - 1
    s.chosen = <uint64_t*>calloc(s.wanted + 1, sizeof(uint64_t))
    s.entries = <sample_entry_t*>calloc(entries, sizeof(sample_entry_t))
    return s.chosen != NULL and s.entries != NULL


cdef int sample_slice(sample_t* s, uint64_t until) noexcept nogil:
    while s.walk != SAMPLE_TAKEN:
        if s.chunk >= chunk_count(s.st):
            if s.walk == SAMPLE_COUNT and not table_make(s):
                return -1
            s.walk += 1
            s.chunk = 0
            continue
        if load32(&s.st.chunks[s.chunk]) & CHUNK_USED != 0:
            chunk_visit(s, s.chunk)
        s.chunk += 1
        if s.chunk % LOOK == 0 and now_ns() >= until:
            return 1
    return 0
