# SPDX-License-Identifier: Apache-2.0
# Lock order: see shared.pxd.
"""The cells of shared objects; see shared.pxd."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from allocator.layout cimport FRAME_SIZE
from allocator.prim cimport add64, cas64, load64, peek64, relax, store64, sub64
from allocator.zsmalloc cimport zs_free, zs_malloc_over, zs_map, zs_unmap, zs_write


cdef uint64_t cell_lock(shared_t* s, uint64_t cell) noexcept nogil:
    """The word without its lock."""
    cdef unsigned int round = 0
    cdef uint64_t w
    while True:
        w = peek64(&s.cells[cell])
        if not w & CELL_LOCK and cas64(&s.cells[cell], w, w | CELL_LOCK):
            return w
        relax(round)
        round += 1


cdef inline void cell_unlock(shared_t* s, uint64_t cell, uint64_t w) noexcept nogil:
    store64(&s.cells[cell], w)


# ---- users --------------------------------------------------------------------------------------

cdef uint32_t shared_fetch(shared_t* s, uint64_t cell, uint8_t* dst) noexcept nogil:
    cdef uint32_t size = 0
    cdef const uint8_t* p = NULL
    cdef uint64_t w
    if cell < s.nr_cells:
        w = cell_lock(s, cell)
        if w != 0:
            p = zs_map(s.pool, cell_loc(w), dst, &size)
            if p != NULL:
                if p != dst:
                    memcpy(dst, p, min(size, <uint32_t>FRAME_SIZE))
                zs_unmap(s.pool, cell_loc(w))
        cell_unlock(s, cell, w)
    if p == NULL or size > FRAME_SIZE:
        add64(&s.pool.corrupt, 1)
        return 0
    return size


cdef bint shared_hold(shared_t* s, uint64_t cell) noexcept nogil:
    cdef uint64_t w = cell_lock(s, cell)
    cdef bint room = w != 0 and cell_users(w) < CELL_MOST_USERS
    cell_unlock(s, cell, w + (<uint64_t>1 << CELL_USERS_SHIFT) if room else w)
    return room


cdef void shared_leave(shared_t* s, uint64_t cell) noexcept nogil:
    cdef uint64_t w = cell_lock(s, cell) if cell < s.nr_cells else 0
    cdef int size
    if cell_users(w) == 0:
        # Damage: an object too many is better than one that others name and which is gone.
        if cell < s.nr_cells:
            cell_unlock(s, cell, w)
        add64(&s.pool.corrupt, 1)
        return
    if cell_users(w) > 1:
        cell_unlock(s, cell, w - (<uint64_t>1 << CELL_USERS_SHIFT))
        return
    # Free before its object is: if the cell is used again before that, its word names another location.
    cell_unlock(s, cell, 0)
    size = zs_free(s.pool, cell_loc(w))
    if size > 0:
        sub64(&s.nbytes, <uint64_t>size)
    sub64(&s.objects, 1)


# ---- making -------------------------------------------------------------------------------------

cdef uint64_t cell_choose(shared_t* s) noexcept nogil:
    """While a quarter of the cells below `high` is free, one of them: then the search takes four looks on
    average. So the array has no more memory than it needs, but for a third."""
    cdef uint64_t used = peek64(&s.objects), _turn
    if s.high < s.nr_cells and 4 * used >= 3 * s.high:
        s.high += 1
        return s.high - 1
    for _turn in range(s.high):
        s.cursor = s.cursor + 1 if s.cursor + 1 < s.high else 0
        if load64(&s.cells[s.cursor]) == 0:
            return s.cursor
    return NO_CELL


cdef int shared_make(shared_t* s, uint64_t cell, const uint8_t* data, uint32_t size,
                     uint32_t over) noexcept nogil:
    cdef uint64_t loc = 0
    cdef int r = zs_malloc_over(s.pool, size, SHARED_TAG | cell, over, &loc)
    if r == 0:
        r = zs_write(s.pool, loc, data, size)
    if r != 0:
        return r
    add64(&s.objects, 1)
    add64(&s.nbytes, size)
    store64(&s.cells[cell], loc << CELL_LOC_SHIFT | <uint64_t>1 << CELL_USERS_SHIFT | CELL_USED)
    return 0


# ---- object compaction --------------------------------------------------------------------------

cdef bint shared_pin(shared_t* s, uint64_t tag, uint64_t loc) noexcept nogil:
    cdef uint64_t cell = tag & ~SHARED_TAG, w
    if cell >= s.nr_cells:
        return False
    w = peek64(&s.cells[cell])
    # An object that its cell does not name is about to be published or freed by another thread.
    return (w & CELL_USED != 0 and not w & CELL_LOCK and cell_loc(w) == loc
            and cas64(&s.cells[cell], w, w | CELL_LOCK))


cdef void shared_moved(shared_t* s, uint64_t tag, uint64_t loc) noexcept nogil:
    cdef uint64_t cell = tag & ~SHARED_TAG
    cdef uint64_t w = peek64(&s.cells[cell])
    cell_unlock(s, cell, (w & ((1ull << CELL_LOC_SHIFT) - 1) & ~CELL_LOCK) | loc << CELL_LOC_SHIFT)
