# SPDX-License-Identifier: Apache-2.0
# No locks: see backing.pxd.
"""Units on the backing store. A unit leaves memory as it is: its stream, behind a head (back_unit_t in
unit.h).

    backing store                                        slots of a group: each names place and length
    .....+-----------------------+-------------+....     +------+------+-  -+------+
         | sum, members, size    | the stream  |    <----| page | page |    | page |
    .....+-----------------------+-------------+....     +------+------+-  -+------+
         ^ a multiple of 16 bytes; at most 16 blocks

Nothing else speaks of such a unit. Each of its pages counts in each of its blocks (backing.pxd), so the last
one that is written or discarded frees them. A group may have several units there, and one in memory.

A thread keeps what it has unpacked, as it does for units in memory (units.pxd). In place of the serial number
stands where the unit lies. That is enough for as long as no block of the backing store is used again
(backing_t.reuses).
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from zramfs.store.backing cimport backing_t
from zramfs.store.units cimport unit_cache_t, units_t

# What a stream of so many bytes has as the size in its slots (back_size()).
cdef uint32_t back_stream_size(uint32_t nbytes) noexcept nogil
# Writes head, stream and zeros to dst: back_extent() bytes, in which dst has no other data.
cdef void back_unit_make(const backing_t* b, uint64_t group, uint32_t members, const uint8_t* stream,
                         uint32_t nbytes, uint8_t* dst) noexcept nogil
# The page of a slot whose value v says that it is in a unit, with the priority of its dictionary. The caller
# has pinned its blocks, or no other thread is at work. 0 or -EIO.
cdef int back_unit_read(backing_t* b, units_t* u, unit_cache_t* c, uint64_t slot, uint64_t v, uint32_t prio,
                        uint8_t* dst) noexcept nogil
# For the write-back: so many free blocks behind each other, pinned. The number of the first; -ENOSPC: there
# are not so many in a row.
cdef int64_t backing_take_run(backing_t* b, uint64_t count) noexcept nogil
