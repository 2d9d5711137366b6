# SPDX-License-Identifier: Apache-2.0
# No locks: nothing else is at work on the store yet.
"""Recovery of shared objects; see shared_recovery.pxd.

A slot that is SHARED names a cell that is whole, at every instant (shared.h). What a kill can leave is a cell
that no slot names, with its object, and a number of users that is wrong: both follow from the slots. A slot
never costs an object that another slot names: one goes when no slot with a sound value names its cell."""
from libc.stdint cimport uint32_t, uint64_t

from allocator.prim cimport store64
from zramfs.store.shared cimport *
from zramfs.store.slots cimport *
from zramfs.store.unit_recovery cimport object_at, word_visit_t, words_visit


cdef void cells_visit(store_t* st, word_visit_t visit, void* to) noexcept nogil:
    words_visit(st, st.shared.cells, st.shared.nr_cells, visit, to)


cdef void cell_clear(store_t* st, uint64_t cell, void* to) noexcept nogil:
    store64(&st.shared.cells[cell], cell_loc(st.shared.cells[cell]) << CELL_LOC_SHIFT | CELL_USED)


cdef void cells_clear(store_t* st) noexcept nogil:
    cells_visit(st, cell_clear, NULL)


cdef bint cell_claim(store_t* st, uint64_t cell) noexcept nogil:
    cdef uint64_t w
    if cell >= st.shared.nr_cells:
        return False
    w = st.shared.cells[cell]
    if w == 0 or cell_users(w) == CELL_MOST_USERS:
        return False
    st.shared.cells[cell] = w + (<uint64_t>1 << CELL_USERS_SHIFT)
    return True


cdef void cell_count(store_t* st, uint64_t cell, void* to) noexcept nogil:
    if cell_users(st.shared.cells[cell]) == 0:
        store64(&st.shared.cells[cell], 0)
    else:
        (<uint64_t*>to)[0] += 1


cdef uint64_t cells_count(store_t* st) noexcept nogil:
    cdef uint64_t found = 0
    cells_visit(st, cell_count, &found)
    return found


cdef bint cell_named(store_t* st, uint64_t tag, uint64_t loc, uint32_t size) noexcept nogil:
    cdef uint64_t cell = tag & ~SHARED_TAG
    if cell >= st.shared.nr_cells or size == 0 or size > st.max_object and size != PAGE:
        return False
    if st.shared.cells[cell] == 0 or cell_loc(st.shared.cells[cell]) != loc:
        return False
    st.shared.nbytes += size
    return True


cdef bint cell_is_whole(store_t* st, uint64_t cell) noexcept nogil:
    return object_at(st, SHARED_TAG | cell, cell_loc(st.shared.cells[cell])) != NULL


cdef void cell_unclaim(store_t* st, uint64_t cell) noexcept nogil:
    cdef uint64_t w = st.shared.cells[cell] - (<uint64_t>1 << CELL_USERS_SHIFT)
    store64(&st.shared.cells[cell], w if cell_users(w) != 0 else 0)


cdef void cell_sum(store_t* st, uint64_t cell, void* to) noexcept nogil:
    st.shared.objects += 1
    st.shared.pages += cell_users(st.shared.cells[cell])
    st.shared.high = cell + 1


cdef void cells_sum(store_t* st) noexcept nogil:
    cells_visit(st, cell_sum, NULL)
