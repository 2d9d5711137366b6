# SPDX-License-Identifier: Apache-2.0
# No locks: one thread has a table.
"""The table of a sharing; see share_table.pxd."""
from libc.stdint cimport uint32_t, uint64_t

from allocator.prim cimport map_sparse, munmap

cdef enum:
    BUCKET = 8                  # entries


cdef uint64_t share_table_bytes(const share_table_t* t) noexcept nogil:
    return t.nr_buckets * BUCKET * sizeof(uint64_t) if t.entries != NULL else 0


cdef bint share_table_open(share_table_t* t, uint64_t pages, uint64_t seed) noexcept nogil:
    t.nr_buckets = min(max(2 * pages // BUCKET, <uint64_t>2), <uint64_t>1 << 31)
    t.seed = seed
    t.entries = <uint64_t*>map_sparse(t.nr_buckets * BUCKET * sizeof(uint64_t), -1)
    return t.entries != NULL


cdef void share_table_close(share_table_t* t) noexcept nogil:
    if t.entries != NULL:
        munmap(t.entries, t.nr_buckets * BUCKET * sizeof(uint64_t))
        t.entries = NULL


cdef inline uint64_t sum_part(uint64_t sum) noexcept nogil:
    """The bits that an entry has of a sum. Never 0."""
    cdef uint64_t part = sum << ENTRY_PART
    return part if part != 0 else <uint64_t>1 << ENTRY_PART


cdef inline uint64_t* bucket_of(share_table_t* t, uint64_t sum, uint32_t turn) noexcept nogil:
    """By the high bits of the sum, of which the entry has the low ones. turn: 0 or 1."""
    cdef uint64_t at = ((sum >> 32) * t.nr_buckets >> 32) + turn
    return &t.entries[(at if at < t.nr_buckets else 0) * BUCKET]


cdef uint64_t* share_table_find(share_table_t* t, uint64_t sum) noexcept nogil:
    cdef uint64_t part = sum_part(sum)
    cdef uint64_t* bucket
    cdef uint32_t turn, i
    for turn in range(<uint32_t>2):
        bucket = bucket_of(t, sum, turn)
        for i in range(<uint32_t>BUCKET):
            if bucket[i] >> ENTRY_PART == part >> ENTRY_PART:
                return &bucket[i]
    return NULL


cdef void share_table_put(share_table_t* t, uint64_t sum, uint64_t what, uint64_t* place) noexcept nogil:
    cdef uint64_t* bucket
    cdef uint32_t turn, i
    for turn in range(<uint32_t>2):
        bucket = bucket_of(t, sum, turn)
        for i in range(<uint32_t>BUCKET):
            if place == NULL and bucket[i] == 0:
                place = &bucket[i]
    if place == NULL:
        place = &bucket_of(t, sum, 0)[sum >> 25 & (BUCKET - 1)]
    place[0] = sum_part(sum) | what
