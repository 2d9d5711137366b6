# SPDX-License-Identifier: Apache-2.0
"""The slots that post-processing has selected, by the size of their objects: the largest first, as the
memory that they give back pays most for the work. 8 bytes a slot while they are remembered."""
from libc.stdint cimport uint32_t, uint64_t

from zramfs.store.slots cimport PAGE

cdef enum:
    BUCKET_SHIFT = 6
    NR_BUCKETS = PAGE // 64 + 1     # objects of 64 k to 64 k + 63 bytes; the last: raw pages
    BLOCK_SLOTS = 511


cdef struct block_t:                # 4 KiB
    block_t* next
    uint64_t slots[BLOCK_SLOTS]


# One thread's. Full blocks but for the first of each list, which has fill slots.
cdef struct candidates_t:
    block_t* bucket[NR_BUCKETS]
    uint32_t fill[NR_BUCKETS]
    int top                         # the highest bucket that may hold something


cdef void candidates_init(candidates_t* c) noexcept nogil
# size: of the slot's object, in bytes. False when memory is short.
cdef bint candidates_add(candidates_t* c, uint64_t slot, uint32_t size) noexcept nogil
# The next slot. False when there is none left.
cdef bint candidates_take(candidates_t* c, uint64_t* slot) noexcept nogil
