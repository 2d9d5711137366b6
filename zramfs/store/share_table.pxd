# SPDX-License-Identifier: Apache-2.0
# No locks: one thread has a table.
"""The table of a sharing: from the sum of a page to a page, or a shared object, with that sum.

    63                        39 38  37  36  35                                 0
    +---------------------------+------+----+------------------------------------+
    | part of the sum           | prio |cell| number of the slot, or of the cell |
    +---------------------------+------+----+------------------------------------+
An entry is a hint: the page may be another one by now, and another page may have the same sum. Its bytes
decide. prio is that of the cell's object. An entry of 0 is empty, so that of slot 0 has a part that is not 0.

Entries lie in buckets of 8, a cache line. One is looked for in two buckets next to each other. There are two
entries for each page that the store has when the table is made, so that a bucket is half full. Where both are
full all the same, an entry gives way: its page may share less than it could. So the table takes at most 16
bytes for each page stored, 1/256 of the data, and no more when pages are added meanwhile.
"""
from libc.stdint cimport uint64_t

cdef enum:
    ENTRY_NUMBER = 36           # bits
    ENTRY_PRIO = 37
    ENTRY_PART = 39

cdef extern from *:
    """
    #define ENTRY_CELL (1ull << 36)
    """
    const uint64_t ENTRY_CELL


cdef struct share_table_t:
    uint64_t* entries           # NULL: none
    uint64_t nr_buckets
    uint64_t seed               # of the sums


cdef inline bint entry_is_cell(uint64_t e) noexcept nogil:
    return e & ENTRY_CELL != 0

cdef inline uint64_t entry_number(uint64_t e) noexcept nogil:
    return e & ((<uint64_t>1 << ENTRY_NUMBER) - 1)

cdef inline unsigned int entry_prio(uint64_t e) noexcept nogil:
    return <unsigned int>(e >> ENTRY_PRIO) & 3

# Bytes of address space, which gets memory as entries are put. False: there is none.
cdef uint64_t share_table_bytes(const share_table_t* t) noexcept nogil
cdef bint share_table_open(share_table_t* t, uint64_t pages, uint64_t seed) noexcept nogil
cdef void share_table_close(share_table_t* t) noexcept nogil
# The entry of a page with this sum; NULL: there is none.
cdef uint64_t* share_table_find(share_table_t* t, uint64_t sum) noexcept nogil
# Stores an entry at a place that share_table_find() gave, or where there is room: place is NULL then.
# what: number, and for a cell ENTRY_CELL and prio.
cdef void share_table_put(share_table_t* t, uint64_t sum, uint64_t what, uint64_t* place) noexcept nogil
