# SPDX-License-Identifier: Apache-2.0
# No locks: nothing else is at work on the store yet.
"""Recovery of shared objects: the cells and their users, from the slots (shared.pxd)."""
from libc.stdint cimport uint32_t, uint64_t

from zramfs.store.slots cimport store_t

# Takes from all cells what is not persistent.
cdef void cells_clear(store_t* st) noexcept nogil
# A slot of type SHARED, whose value is sound: False if its cell names nothing, or has too many users.
cdef bint cell_claim(store_t* st, uint64_t cell) noexcept nogil
# After all slots: cells that no slot claimed are freed, so that the pool frees their objects. How many others
# there are: as many objects are named.
cdef uint64_t cells_count(store_t* st) noexcept nogil
# Whether an object with the tag of a shared one is that of its cell.
cdef bint cell_named(store_t* st, uint64_t tag, uint64_t loc, uint32_t size) noexcept nogil
# Whether the object of a claimed cell is there, after the pool has been recovered.
cdef bint cell_is_whole(store_t* st, uint64_t cell) noexcept nogil
# A slot of a cell that is not whole is lost. The last one frees the cell.
cdef void cell_unclaim(store_t* st, uint64_t cell) noexcept nogil
# At the end: counts the cells.
cdef void cells_sum(store_t* st) noexcept nogil
