# SPDX-License-Identifier: Apache-2.0
"""The slots that post-processing has selected; see candidates.pxd."""
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset


cdef void candidates_init(candidates_t* c) noexcept nogil:
    memset(c, 0, sizeof(c[0]))
    c.top = -1


cdef bint candidates_add(candidates_t* c, uint64_t slot, uint32_t size) noexcept nogil:
    cdef int k = <int>(size >> BUCKET_SHIFT)
    cdef block_t* block = c.bucket[k]
    if block == NULL or c.fill[k] == BLOCK_SLOTS:
        block = <block_t*>malloc(sizeof(block_t))
        if block == NULL:
            return False
        block.next = c.bucket[k]
        c.bucket[k] = block
        c.fill[k] = 0
    block.slots[c.fill[k]] = slot
    c.fill[k] += 1
    if k > c.top:
        c.top = k
    return True


cdef bint candidates_take(candidates_t* c, uint64_t* slot) noexcept nogil:
    cdef block_t* block
    while c.top >= 0:
        block = c.bucket[c.top]
        if block == NULL:
            c.top -= 1
            continue
        c.fill[c.top] -= 1
        slot[0] = block.slots[c.fill[c.top]]
        if c.fill[c.top] == 0:
            c.bucket[c.top] = block.next
            c.fill[c.top] = BLOCK_SLOTS
            free(block)
        return True
    return False
