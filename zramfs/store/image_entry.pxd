# SPDX-License-Identifier: Apache-2.0
"""One page in an image, as zramfs/image/layout.py describes it: 64 bits in a part's directory.

    63      54 53  51 50  49 48          36 35                                   0
    +---------+------+------+--------------+-------------------------------------+
    | 0       | kind | prio | bytes        | slot                                |
    +---------+------+------+--------------+-------------------------------------+
"""
from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    ENTRY_SLOT_BITS = 36
    ENTRY_SIZE_SHIFT = 36
    ENTRY_SIZE_MASK = 0x1fff
    ENTRY_PRIO_SHIFT = 49
    ENTRY_KIND_SHIFT = 51
    ENTRY_BITS = 54

    IMAGE_SAME = 1              # 8 bytes: the word that fills the page
    IMAGE_OBJECT = 2            # compressed by the algorithm of prio
    IMAGE_RAW = 3               # 4096 bytes
    IMAGE_LOST = 4              # none: the page could not be read when it was saved
    IMAGE_BACK = 5              # never in an image: 8 bytes, the value of a slot on the backing store


cdef inline uint64_t image_entry(uint64_t slot, uint32_t kind, uint32_t prio, uint32_t size) noexcept nogil:
    return (slot | <uint64_t>size << ENTRY_SIZE_SHIFT | <uint64_t>prio << ENTRY_PRIO_SHIFT
            | <uint64_t>kind << ENTRY_KIND_SHIFT)

cdef inline uint64_t entry_slot(uint64_t entry) noexcept nogil:
    return entry & ((1ull << ENTRY_SLOT_BITS) - 1)

cdef inline uint32_t entry_size(uint64_t entry) noexcept nogil:
    return <uint32_t>(entry >> ENTRY_SIZE_SHIFT) & ENTRY_SIZE_MASK

cdef inline uint32_t entry_prio(uint64_t entry) noexcept nogil:
    return <uint32_t>(entry >> ENTRY_PRIO_SHIFT) & 3

cdef inline uint32_t entry_kind(uint64_t entry) noexcept nogil:
    return <uint32_t>(entry >> ENTRY_KIND_SHIFT)
