# SPDX-License-Identifier: Apache-2.0
# No locks: nothing else is at work on the store yet.
"""Recovery of units: the words of the groups, and their counts, from the slots and the heads (units.pxd)."""
from libc.stdint cimport uint64_t

from zramfs.store.slots cimport store_t

ctypedef void (*word_visit_t)(store_t* st, uint64_t number, void* to) noexcept nogil

# Each word that is not 0 of an array in the user region. A touch of the rest of it would give it memory.
cdef void words_visit(store_t* st, const uint64_t* words, uint64_t nr_words, word_visit_t visit,
                      void* to) noexcept nogil

# Takes from all words what is not persistent. A word that names a unit keeps WORD_MAKING until units_count().
cdef void units_clear(store_t* st) noexcept nogil
# A slot of type UNIT: False if its group has no unit with its page.
cdef bint word_claim(store_t* st, uint64_t slot) noexcept nogil
# After all slots: units that no slot claimed are forgotten, so that the pool frees their objects. A unit with
# an object that is not there is forgotten too, and the pages in it are lost, which is added. How many objects
# the others have.
cdef uint64_t units_count(store_t* st, uint64_t* lost) noexcept nogil
# Whether an object with a unit's tag belongs to a unit.
cdef bint unit_named(store_t* st, uint64_t tag, uint64_t loc) noexcept nogil
# After the pool has been recovered: units of which it has dropped an object are forgotten, and the others
# counted.
cdef void units_sum(store_t* st, uint64_t* lost) noexcept nogil
# The header of an object that has a location and a tag, whether or not the pool is whole yet; NULL: it is not
# there.
cdef uint64_t* object_at(store_t* st, uint64_t tag, uint64_t loc) noexcept nogil
