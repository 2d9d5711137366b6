# SPDX-License-Identifier: Apache-2.0
# No locks:
# - The word of a block and that of a group are atomic.
# - A block is taken by a compare-and-swap of a word that counts nothing. So no two write-backs get the same
#   block, and a block that counts anything is never written.
# - Callers hold no lock across backing_write() and backing_fetch(), which wait for the device.
"""The backing store: objects on a block device or in a regular file, packed into blocks of 4 KiB.

    block n                               block n + 1                         block n + 2
    +--------+-----------+---+--------+---+-------+---+--------+--------+.....+------------------+
    | header | object    | 0 | header | obj...|...ect | header | object |     | raw (huge) page  |
    +--------+-----------+---+--------+---+-------+---+--------+--------+.....+------------------+
    ^ multiples of 16 bytes, 8 of them the header                             ^ whole block, no header

    slot of a compressed page that was written back      slot of a raw page that was written back
     63                        24 23 22        10 9 0     63            32 31      24 23 22      10 9 0
    +----------------------------+--+------------+---+   +----------------+----------+--+----------+---+
    | byte offset / 16 (16 TiB)  |0 | its size   |...|   | block          | sum, low |1 | sum, high|...|
    +----------------------------+--+------------+---+   +----------------+----------+--+----------+---+

    slot of a page in a unit that was written back
     63                        24 23 22 21       10 9 0
    +----------------------------+--+--+-----------+---+     A unit is written as it is (back_units.pxd). Each
    | byte offset / 16 of the    |0 |1 | bytes / 16|...|     of its slots names all of it, and the number of
    | unit                       |  |  | of it     |   |     the slot says which of its pages it means.
    +----------------------------+--+--+-----------+---+

An object lies in at most two blocks, so that reading it is one read of 4 or 8 KiB; a unit in at most 16. The
header of an object is a 64-bit sum of its bytes, its slot, its size and a key that each backing store draws
by lot; of a raw page's sum the slot keeps 21 bits. Both are verified when it is read: a damaged or misplaced
block, or one that another device has left there, is EIO. (Two kinds of damage pass: that of a raw page with a
chance of 1 in 2 million, and an older page of the same slot, size and place, if the device lost a write
silently.) The store is of no use without the slots, and has no block that describes it.

A block's word: what live pages count in it (bits 0 to 12), pins (16 to 30), and STALE, that the file still
holds data there (31). A page with an object of its own counts the bytes that the object takes in the block. A
page in a unit counts 1 in each block of the unit, so that no block of it is free before its last page has
gone. (The parts of units in a block are longer than their pages are many: the sum is at most 4096.) A pin is
a read under way, or the write-back that is filling the block. A block is free when it counts neither; nothing
is written into a block a second time before that, so a read never meets a change.

Sums that hold at rest (Backing.check):
    [B1] live count of a block = sum over the slots of what they count in it
    [B2] no block is pinned; used = blocks with a live count; per group as well
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from zramfs.store.record cimport backing_record_t

cdef extern from *:
    """
    #define STALE 0x80000000u
    """
    const uint32_t STALE

cdef enum:
    BLOCK = 4096
    BLOCK_SHIFT = 12
    UNIT_SHIFT = 4              # objects start at multiples of 16 bytes
    BACK_HEADER = 8
    BACK_SIZE_SHIFT = 10        # in a slot
    BACK_SIZE_MASK = 0x1fff     # up to 4095: bytes of an object; above 4096: bytes of a unit / 16
    BACK_HUGE = 1 << 23         # in a slot
    BACK_LOC_SHIFT = 24
    GROUP_SHIFT = 12            # blocks a group, as a power of two: 16 MiB
    FETCH_BYTES = 8192          # the most that one object takes on the device
    COUNTS = 0x7fffffff         # of a block's word: live count and pins
    GROUP_STALE = 1 << 16


cdef struct backing_t:
    # constant
    int fd
    bint is_file                # else a block device
    bint wipe                   # blocks are zeroed before they are given back
    uint64_t nr_blocks
    uint64_t nr_groups
    uint32_t* blocks            # words, see above; atomic
    uint8_t* zeros              # ZERO_BLOCKS of them, with wipe
    uint32_t* groups            # per group: used (low half) and stale free blocks (high half); atomic
    backing_record_t own        # before a store has it, and after that is closed
    backing_record_t* record    # own, or in the memory file of the store
    # the write-back's own
    uint64_t cursor             # where the search for a free block goes on
    # atomic, relaxed
    uint64_t used               # blocks that count something
    uint64_t stale              # free blocks whose data is still in the file
    uint64_t unit_left          # pages that were overwritten or discarded while they were in a unit
    # atomic: grows before a block that has held data is written again. As long as it has not grown, a place
    # that has held a unit holds no other one.
    uint64_t reuses


# What a slot says of its object on the backing store; v is the slot's value.
cdef inline uint64_t back_offset(uint64_t v) noexcept nogil:
    if v & BACK_HUGE:
        return (v >> 32) << BLOCK_SHIFT
    return (v >> BACK_LOC_SHIFT) << UNIT_SHIFT

cdef inline uint32_t back_size(uint64_t v) noexcept nogil:
    """Bytes of the object; BLOCK: it is raw; above that: a unit, see back_unit_size()."""
    if v & BACK_HUGE:
        return BLOCK
    return <uint32_t>(v >> BACK_SIZE_SHIFT) & BACK_SIZE_MASK

cdef inline uint32_t back_unit_size(uint32_t nbytes) noexcept nogil:
    """What stands as the size in the slots of a unit of so many bytes, with its head."""
    return BLOCK + ((nbytes + (1u << UNIT_SHIFT) - 1) >> UNIT_SHIFT)

cdef inline bint back_is_unit(uint64_t v) noexcept nogil:
    return back_size(v) > BLOCK

cdef inline uint32_t back_extent(uint32_t size) noexcept nogil:
    """Bytes that an object of this size takes on the device."""
    if size > BLOCK:
        return (size - BLOCK) << UNIT_SHIFT
    if size == BLOCK:
        return BLOCK
    return (size + BACK_HEADER + (1u << UNIT_SHIFT) - 1) & ~((1u << UNIT_SHIFT) - 1)

cdef inline uint32_t back_share(uint64_t offset, uint32_t size, uint64_t block) noexcept nogil:
    """What a page with such an object counts in a block where it lies."""
    cdef uint64_t first = block << BLOCK_SHIFT, last = first + BLOCK, end = offset + back_extent(size)
    if size > BLOCK:
        return 1
    return <uint32_t>(min(end, last) - max(offset, first))

# The sum of an object, and the bits of a slot that lead to it at a byte offset.
cdef uint64_t back_sum(const backing_t* b, uint64_t slot, const uint8_t* data, uint32_t size) noexcept nogil
cdef uint64_t back_place(uint64_t offset, uint32_t size, uint64_t total) noexcept nogil

# Takes a free block, which is pinned then: the wanted one, or if that is taken another one. -ENOSPC.
cdef int64_t backing_take(backing_t* b, uint64_t wanted) noexcept nogil
# That block and no other: False if it is not free.
cdef bint backing_try_take(backing_t* b, uint64_t block) noexcept nogil
cdef void backing_unpin_block(backing_t* b, uint64_t block) noexcept nogil
# Counts a page of the write-back's in the blocks of its object, and takes it out again. The caller of add has
# the blocks pinned.
cdef void backing_add(backing_t* b, uint64_t offset, uint32_t size) noexcept nogil
cdef void backing_remove(backing_t* b, uint64_t offset, uint32_t size) noexcept nogil
# Blocks from `first` on: 0 or a negative errno.
cdef int backing_write(backing_t* b, uint64_t first, uint64_t count, const uint8_t* data) noexcept nogil
# Whole blocks to io, which is page aligned: n bytes at a byte offset. False: the device refuses, which is
# counted.
cdef bint backing_read(backing_t* b, uint64_t offset, uint64_t n, uint8_t* io) noexcept nogil
# Keeps the blocks of a slot's object from being used for another one. The caller holds the slot, or
# has it pinned.
cdef void backing_pin(backing_t* b, uint64_t v) noexcept nogil
cdef void backing_unpin(backing_t* b, uint64_t v) noexcept nogil
# The bytes of a pinned object, but for that of a unit, verified; NULL: -EIO. io: FETCH_BYTES, page aligned;
# they lie in there.
cdef const uint8_t* backing_fetch(backing_t* b, uint64_t slot, uint64_t v, uint8_t* io) noexcept nogil
# Takes the page that a slot named until then out of its blocks.
cdef void backing_release(backing_t* b, uint64_t v) noexcept nogil
# Gives the data of free blocks back to the file system, and zeroes it before with wipe. At most so many of
# them: how many.
cdef uint64_t backing_trim(backing_t* b, uint64_t most) noexcept nogil


cdef class Backing:
    cdef backing_t* b               # NULL once closed
    cdef readonly str path
    cdef bint taken                 # by a store
    cdef bint kept                  # it holds the data of a store that is to be adopted
    cdef object __weakref__

    cdef int check(self, const uint32_t* live) except -1
