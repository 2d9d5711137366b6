# SPDX-License-Identifier: Apache-2.0
"""A sample of the groups of a store, chosen by lot, and how many copies the device has of each object in it.

Three walks, in slices. Nothing changes: no slot, no mark, no access time.
  1. The groups of 16 slots that have a page which takes memory are counted.
  2. As many of them as are wanted are chosen, each choice with the same chance. The sum of each object of
     theirs goes into a table.
  3. All objects of the store are compared with that table. So the number of copies of a page in the sample is
     exact, where the sample alone would hardly ever have two of them. Objects are compared as they are,
     without unpacking. So equal pages that two algorithms have compressed are not found.

The table takes 32 bytes for each page of the sample, and is touched with no lock held.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zramfs.store.slots cimport HUGE, OBJ, SAME_OBJ, SHARED, UNIT, slot_lost, slot_type, store_t

cdef enum:
    SAMPLE_COUNT = 0
    SAMPLE_CHOOSE = 1
    SAMPLE_COMPARE = 2
    SAMPLE_TAKEN = 3


cdef struct sample_entry_t:
    uint64_t sum                # of an object; 0: none
    uint64_t copies             # on the whole device


cdef struct sample_t:
    # constant
    store_t* st
    uint64_t seed
    uint8_t* object             # a page of the owner's
    # the walk
    int walk
    uint64_t chunk              # where it goes on
    uint64_t lot                # state of the random numbers
    uint64_t ahead              # groups that the second walk has not seen
    # results
    uint64_t groups             # of the store
    uint64_t wanted             # of them, for the sample
    uint64_t* chosen            # their first slots
    uint64_t nr_chosen
    sample_entry_t* entries
    uint64_t mask               # of their number, a power of two


cdef inline bint may_share(uint64_t v) noexcept nogil:
    return (slot_type(v) == OBJ or slot_type(v) == HUGE or slot_type(v) == SHARED) and not slot_lost(v)

cdef inline bint takes_memory(uint64_t v) noexcept nogil:
    return may_share(v) or slot_type(v) == UNIT or slot_type(v) == SAME_OBJ

cdef void sample_init(sample_t* s, store_t* st, uint8_t* object, uint64_t wanted,
                      uint64_t seed) noexcept nogil
cdef void sample_free(sample_t* s) noexcept nogil
# Goes on until a moment: 1 = there is more to do, 0 = the sample is there, -1 = memory is short.
cdef int sample_slice(sample_t* s, uint64_t until) noexcept nogil
# The copies of an object, whose slot has the value v; at least 1.
cdef uint64_t sample_copies(sample_t* s, uint64_t v, const uint8_t* object, uint32_t size) noexcept nogil
