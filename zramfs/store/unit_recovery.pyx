# SPDX-License-Identifier: Apache-2.0
# No locks: nothing else is at work on the store yet.
"""Recovery of units; see unit_recovery.pxd.

A word and what it names are whole at every instant (unit.h). What a kill can leave is a unit that no slot is
in, new or old, and pages in a unit that no slot asks for: both follow from the slots."""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from allocator.layout cimport (
    HDR_ALLOCATED, HDR_SIZE_MASK, HDR_TAG_SHIFT, LOC_NONE, NR_RAW_CLASSES, PAGEBLOCK_FRAMES, ZSPAGE_MAGIC,
    zspage_desc_t,
)
from allocator.prim cimport *
from allocator.zsmalloc cimport zs_free
from allocator.zspage cimport (
    data_offset, header_ptr, is_huge, loc_idx, loc_zspage, object_view, size_class_t,
)
from zramfs.store.slots cimport *
from zramfs.store.units cimport *


cdef void words_visit(store_t* st, const uint64_t* words, uint64_t nr_words, word_visit_t visit,
                      void* to) noexcept nogil:
    cdef int64_t start = <int64_t>st.arena.sb.user_off + (<const uint8_t*>words - st.arena.user)
    cdef int64_t end = start + <int64_t>(nr_words * sizeof(uint64_t)), at = start, hole
    cdef uint64_t number
    while at < end:
        at = lseek(st.arena.fd, at, SEEK_DATA)
        if at < 0 or at >= end:
            break
        hole = min(lseek(st.arena.fd, at, SEEK_HOLE), end)
        for number in range(<uint64_t>(at - start) // sizeof(uint64_t),
                            <uint64_t>(hole - start) // sizeof(uint64_t)):
            if words[number] != 0:
                visit(st, number, to)
        at = hole


cdef void units_visit(store_t* st, word_visit_t visit, void* to) noexcept nogil:
    words_visit(st, st.units.words, st.units.nr_words, visit, to)


# ---- objects ------------------------------------------------------------------------------------

cdef uint64_t* object_at(store_t* st, uint64_t tag, uint64_t loc) noexcept nogil:
    cdef uint32_t number = loc_zspage(loc), i
    cdef zspage_desc_t* z = &st.arena.zspages[number]
    cdef size_class_t* c
    cdef uint64_t* header
    if number >= st.arena.sb.next_number or z.magic != ZSPAGE_MAGIC or z.class_idx >= NR_RAW_CLASSES:
        return NULL
    c = st.pool.by_index[z.class_idx]
    if loc_idx(loc) >= c.objs:
        return NULL
    for i in range(c.pages):
        if z.frames[i] >= st.arena.sb.fresh * PAGEBLOCK_FRAMES:
            return NULL
    header = header_ptr(st.pool, z, c, loc_idx(loc))
    return header if header[0] & HDR_ALLOCATED and header[0] >> HDR_TAG_SHIFT == tag else NULL


cdef uint32_t object_length(store_t* st, uint64_t tag, uint64_t loc) noexcept nogil:
    """In bytes; 0 if it is not there, or cannot be as long as it says."""
    cdef uint64_t* header = object_at(st, tag, loc)
    cdef size_class_t* c
    cdef uint32_t n
    if header == NULL:
        return 0
    c = st.pool.by_index[st.arena.zspages[loc_zspage(loc)].class_idx]
    n = <uint32_t>((header[0] >> 1) & HDR_SIZE_MASK)
    return n if n <= (<uint32_t>PAGE if is_huge(c) else c.size - 8) else 0


cdef const unit_head_t* head_at(store_t* st, uint64_t group, uint8_t* scratch) noexcept nogil:
    """The head that the word of a group names. NULL: it is damaged."""
    cdef uint64_t loc = word_loc(st.units.words[group])
    cdef uint32_t n = object_length(st, UNIT_TAG | group, loc)
    cdef zspage_desc_t* z = &st.arena.zspages[loc_zspage(loc)]
    cdef const unit_head_t* head
    if n < sizeof(unit_head_t):
        return NULL
    head = <const unit_head_t*>object_view(
        st.pool, z, data_offset(st.pool.by_index[z.class_idx], loc_idx(loc)), n, scratch)
    if not head_is_sound(head, n) or head.prio and st.codec[head.prio].dictionary == NULL:
        return NULL
    return head


cdef bint unit_is_whole(store_t* st, uint64_t group, const unit_head_t* head) noexcept nogil:
    cdef uint32_t i, left = head.size
    for i in range(part_count(head.size)):
        if object_length(st, part_tag(group, i), head_parts(head)[i]) != min(left, <uint32_t>UNIT_PART):
            return False
        left -= min(left, <uint32_t>UNIT_PART)
    return True


cdef bint unit_named(store_t* st, uint64_t tag, uint64_t loc) noexcept nogil:
    cdef uint64_t group = tag & UNIT_TAG_GROUP
    cdef uint32_t part = <uint32_t>((tag & ~UNIT_TAG) >> UNIT_TAG_PART)
    cdef uint8_t scratch[PAGE]
    cdef const unit_head_t* head
    if group >= st.units.nr_words or st.units.words[group] == 0:
        return False
    if part == 0:
        return word_loc(st.units.words[group]) == loc
    head = head_at(st, group, scratch)
    return head != NULL and part <= part_count(head.size) and head_parts(head)[part - 1] == loc


# ---- words --------------------------------------------------------------------------------------

cdef void word_clear(store_t* st, uint64_t group, void* to) noexcept nogil:
    # A location may be 0.
    store64(&st.units.words[group], word_loc(st.units.words[group]) << WORD_LOC_SHIFT | WORD_MAKING)


cdef void units_clear(store_t* st) noexcept nogil:
    units_visit(st, word_clear, NULL)


cdef bint word_claim(store_t* st, uint64_t slot) noexcept nogil:
    if st.units.words[group_of(slot)] == 0:
        return False
    st.units.words[group_of(slot)] |= <uint64_t>place_bit(slot) << WORD_LIVE_SHIFT
    return True


cdef void pages_lose(store_t* st, uint64_t group, uint32_t which, uint64_t* lost) noexcept nogil:
    cdef uint64_t slot
    cdef uint32_t place
    for place in range(<uint32_t>UNIT_PAGES):
        slot = (group << UNIT_SHIFT_PAGES) + place
        if which >> place & 1:
            store64(&st.slots[slot], OBJ << TYPE_SHIFT | LOC_NONE << LOC_SHIFT)
            lost[0] += 1


cdef struct count_t:
    uint64_t objects
    uint64_t* lost


cdef void word_count(store_t* st, uint64_t group, void* to) noexcept nogil:
    cdef count_t* count = <count_t*>to
    cdef uint64_t w = st.units.words[group] & ~<uint64_t>WORD_MAKING
    cdef uint32_t live = word_live(w), members
    cdef uint8_t scratch[PAGE]
    cdef const unit_head_t* head
    if live != 0:
        head = head_at(st, group, scratch)
        members = head.members if head != NULL and unit_is_whole(st, group, head) else 0
        pages_lose(st, group, live & ~members, count.lost)
        live &= members
        w &= ~(<uint64_t>(WORD_LIVE_MASK & ~members) << WORD_LIVE_SHIFT)
    if live == 0:
        store64(&st.units.words[group], 0)
        return
    store64(&st.units.words[group], w)
    count.objects += 1 + part_count(head.size)


cdef uint64_t units_count(store_t* st, uint64_t* lost) noexcept nogil:
    cdef count_t count
    count.objects, count.lost = 0, lost
    units_visit(st, word_count, &count)
    return count.objects


cdef void unit_drop(store_t* st, uint64_t group, const unit_head_t* head, uint64_t* lost) noexcept nogil:
    """A unit of which an object is not there; head: NULL if it is that one."""
    cdef uint64_t w = st.units.words[group]
    cdef uint32_t i
    pages_lose(st, group, word_live(w), lost)
    store64(&st.units.words[group], 0)
    if head == NULL:
        return
    for i in range(part_count(head.size)):
        if object_at(st, part_tag(group, i), head_parts(head)[i]) != NULL:
            zs_free(st.pool, head_parts(head)[i])
    zs_free(st.pool, word_loc(w))


cdef void word_sum(store_t* st, uint64_t group, void* to) noexcept nogil:
    cdef uint8_t scratch[PAGE]
    cdef const unit_head_t* head = head_at(st, group, scratch)
    if head == NULL or not unit_is_whole(st, group, head):
        unit_drop(st, group, head, <uint64_t*>to)
        return
    st.units.units += 1
    st.units.pages += popcount(word_live(st.units.words[group]))
    st.units.members += popcount(head.members)
    if head.prio != 0:
        st.units.by_prio[head.prio] += popcount(head.members)
    st.units.nbytes += head.size + sizeof(unit_head_t) + 8 * part_count(head.size)


cdef void units_sum(store_t* st, uint64_t* lost) noexcept nogil:
    units_visit(st, word_sum, lost)
