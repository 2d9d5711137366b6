# SPDX-License-Identifier: Apache-2.0
"""Units on the backing store; see back_units.pxd."""
from libc.errno cimport EIO, ENOSPC
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from allocator.prim cimport add64, load32, load64
from zramfs.store.backing cimport *
from zramfs.store.units cimport *

cdef enum:
    SUMMED = 8                  # bytes of the head that the sum leaves out: the sum

cdef extern from *:
    """
    #define PLACE_SERIAL (1ull << 63) /* no unit in memory has such a serial number */
    """
    const uint64_t PLACE_SERIAL


cdef uint32_t back_stream_size(uint32_t nbytes) noexcept nogil:
    return back_unit_size(<uint32_t>sizeof(back_unit_t) + nbytes)


cdef inline uint64_t unit_sum(const backing_t* b, uint64_t group, const back_unit_t* head) noexcept nogil:
    return back_sum(b, UNIT_TAG | group, <const uint8_t*>head + SUMMED,
                    <uint32_t>sizeof(back_unit_t) - SUMMED + head.size)


cdef void back_unit_make(const backing_t* b, uint64_t group, uint32_t members, const uint8_t* stream,
                         uint32_t nbytes, uint8_t* dst) noexcept nogil:
    cdef back_unit_t* head = <back_unit_t*>dst
    cdef uint32_t extent = back_extent(back_stream_size(nbytes))
    memset(dst + extent - (1u << UNIT_SHIFT), 0, 1u << UNIT_SHIFT)
    head.magic, head.members, head.size = BACK_UNIT_MAGIC, <unsigned short>members, nbytes
    memcpy(head + 1, stream, nbytes)
    head.sum = unit_sum(b, group, head)


# ---- reading ------------------------------------------------------------------------------------

cdef const back_unit_t* unit_fetch(backing_t* b, unit_cache_t* c, uint64_t group, uint64_t v) noexcept nogil:
    """The unit that the value of a slot names, verified, in c.stream. NULL: it can't be read, or is not
    there."""
    cdef uint64_t offset = back_offset(v)
    cdef uint32_t size = back_size(v), start = <uint32_t>(offset & (BLOCK - 1))
    cdef uint64_t n = (start + back_extent(size) + BLOCK - 1) & ~<uint64_t>(BLOCK - 1)
    cdef const back_unit_t* head = <const back_unit_t*>(c.stream + start)
    if n > UNIT_BYTES or not backing_read(b, offset - start, n, c.stream):
        return NULL
    if (head.magic == BACK_UNIT_MAGIC and head.size <= UNIT_MOST_STREAM
            and back_stream_size(head.size) == size and head.sum == unit_sum(b, group, head)):
        return head
    add64(&b.record.read_errors, 1)
    return NULL


cdef int unit_begin(backing_t* b, units_t* u, unit_cache_t* c, uint64_t group, uint64_t v, uint32_t prio,
                    int i) noexcept nogil:
    """Begins a unit anew: in entry i, or in the oldest if that is -1. The entry, or -EIO."""
    cdef const back_unit_t* head
    cdef unit_head_t like
    # Before the stream that was there is overwritten.
    i = entry_clear(c, i)
    # And before the device is asked: what it answers may be older than a later look at this.
    c.entry[i].reuses = load64(&b.reuses)
    head = unit_fetch(b, c, group, v)
    if head == NULL:
        return -EIO
    like.members, like.size, like.serial = head.members, <unsigned short>head.size, place_serial(v)
    like.prio = <unsigned char>prio
    return entry_begin(u, c, i, group, &like, <const uint8_t*>(head + 1))


cdef inline uint64_t place_serial(uint64_t v) noexcept nogil:
    return PLACE_SERIAL | v >> BACK_SIZE_SHIFT


cdef int back_unit_read(backing_t* b, units_t* u, unit_cache_t* c, uint64_t slot, uint64_t v, uint32_t prio,
                        uint8_t* dst) noexcept nogil:
    cdef uint64_t group = group_of(slot)
    cdef uint32_t at
    cdef int i = entry_find(c, group, place_serial(v))
    # The blocks are pinned: a unit that was in its place when the entry was made, and is not there any more,
    # has let a block be used again before that.
    if i < 0 or c.entry[i].reuses != load64(&b.reuses):
        i = unit_begin(b, u, c, group, v, prio, i)
    if i < 0:
        return i
    if not c.entry[i].members & place_bit(slot):
        add64(&b.record.read_errors, 1)
        return -EIO
    at = <uint32_t>popcount(c.entry[i].members & (place_bit(slot) - 1)) * UNIT_PART
    if not entry_reaches(c, i, at):
        i = unit_begin(b, u, c, group, v, prio, i)
        if i < 0:
            return i
    return entry_read(c, i, at, dst)


# ---- room for one -------------------------------------------------------------------------------

cdef bint blocks_try_take(backing_t* b, uint64_t first, uint64_t count) noexcept nogil:
    """All of them or none: a block may just be trimmed."""
    cdef uint64_t i
    for i in range(count):
        if not backing_try_take(b, first + i):
            while i:
                i -= 1
                backing_unpin_block(b, first + i)
            return False
    return True


cdef int64_t backing_take_run(backing_t* b, uint64_t count) noexcept nogil:
    """As backing_take(): from the cursor, once around. Looks before it takes, so that no block of a run that
    is too short is taken."""
    cdef uint64_t _turn, block = b.cursor if b.cursor < b.nr_blocks else 0, end, run = 0
    for _turn in range(b.nr_groups + 1):
        end = min(((block >> GROUP_SHIFT) + 1) << GROUP_SHIFT, b.nr_blocks)
        if load32(&b.groups[block >> GROUP_SHIFT]) & (GROUP_STALE - 1) == 1 << GROUP_SHIFT:
            block, run = end, 0
        while block < end:
            run = run + 1 if load32(&b.blocks[block]) & COUNTS == 0 else 0
            block += 1
            if run == count:
                if blocks_try_take(b, block - count, count):
                    b.cursor = block
                    return <int64_t>(block - count)
                run = 0
        if end == b.nr_blocks:
            block = run = 0
    return -ENOSPC
