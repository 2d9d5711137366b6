# SPDX-License-Identifier: Apache-2.0
# Lock order: slots.pxd. Chunks are pinned, and slots locked, one at a time. No slot is locked while the
# device works.
"""The upkeep of units on the backing store: what is left of a worn one comes back to memory.

A unit there has up to 16 blocks, and keeps them until its last page has gone (backing.pxd). A unit is worn
when its pages take no more than it does, even if they do not compress. Each of them becomes a single page in
memory again, and the blocks are free. Nothing is written to the device, which would wear it and count against
the limit of the write-back. The pages count as idle: nobody has asked for them, and the next write-back may
take them.

A page comes back by one store into its slot, if the slot still names the unit then. So a kill leaves it
there, or here. The pool takes no page for that beyond what is left of its limit, less a part that others may
need soon.
"""
cimport cython
from libc.stdint cimport uint32_t, uint64_t

from allocator.prim cimport load32, load64, now_ns, peek64, sub64
from zramfs.store.backing cimport (
    BACK_SIZE_SHIFT, back_extent, back_is_unit, back_size, backing_pin, backing_unpin,
)
from zramfs.store.slots cimport *
from zramfs.store.store cimport Store
from zramfs.store.units cimport UNIT_PAGES, UNIT_SHIFT_PAGES, popcount

from time import thread_time_ns

from zramfs.model.stats import BackUpkeepStats

cdef enum:
    SPARE_SHIFT = 4             # a 16th of the limit stays free


cdef struct upkeep_t:
    # constant
    store_t* st
    store_ctx_t* ctx
    uint64_t group              # the next one
    # results
    uint64_t units
    uint64_t pages
    uint64_t busy
    uint64_t failed
    uint64_t no_room
    uint64_t cpu_ns


cdef inline bint pool_has_room(store_t* st) noexcept nogil:
    cdef uint64_t limit = peek64(&st.arena.sb.limit_pages)
    return limit == 0 or peek64(&st.pool.pages) < limit - (limit >> SPARE_SHIFT)


cdef inline bint is_at(uint64_t v, uint64_t place) noexcept nogil:
    """Whether the value of a slot names this place on the backing store."""
    return slot_type(v) == WRITTEN_BACK and v >> BACK_SIZE_SHIFT == place


cdef void page_store(upkeep_t* job, uint64_t slot, uint64_t place) noexcept nogil:
    """The page in ctx.page becomes a single one, if its slot still names the place, which is pinned."""
    cdef store_t* st = job.st
    cdef prepared_t page
    cdef uint64_t v
    page_prepare(st, job.ctx, job.ctx.page, &page)
    page.over = 0
    if page.type == OBJ or page.type == HUGE:
        page.bits = SLOT_IDLE
    v = slot_lock(st, slot)
    if not is_at(v, place):
        slot_unlock(st, slot, v)
        job.busy += 1
    elif commit_locked(st, slot, v, &page) != 0:
        job.no_room += 1
    else:
        # Releasing it has counted it as one that others have taken out.
        sub64(&st.backing.unit_left, 1)
        job.pages += 1


cdef void page_return(upkeep_t* job, uint64_t slot, uint64_t place) noexcept nogil:
    cdef store_t* st = job.st
    cdef uint64_t v = slot_lock(st, slot)
    cdef bint found = is_at(v, place)
    if found:
        backing_pin(st.backing, v)
    slot_unlock(st, slot, v)
    if not found:
        job.busy += 1
        return
    if back_load(st, job.ctx, slot, v, job.ctx.page) == 0:
        page_store(job, slot, place)
    else:
        job.failed += 1
    backing_unpin(st.backing, v)


cdef void unit_return(upkeep_t* job, uint64_t first, uint32_t which, uint64_t place) noexcept nogil:
    """The pages of one unit; which: bit k for slot first + k."""
    cdef uint64_t pages = job.pages, failed = job.failed
    cdef uint32_t k
    for k in range(<uint32_t>UNIT_PAGES):
        # What has no room, or can't be read, has no better luck with the next page.
        if which >> k & 1 and job.no_room == 0 and job.failed == failed:
            page_return(job, first + k, place)
    job.units += job.pages != pages


cdef void group_return(upkeep_t* job, uint64_t first) noexcept nogil:
    """The units of a group that are worn. A look without locks, as most groups have none."""
    cdef store_t* st = job.st
    cdef uint64_t v, place, end = min(first + UNIT_PAGES, slot_count(st)), slot, other
    cdef uint32_t which, seen = 0
    for slot in range(first, end):
        v = load64(&st.slots[slot])
        if seen >> (slot - first) & 1 or slot_type(v) != WRITTEN_BACK or not back_is_unit(v):
            continue
        place = v >> BACK_SIZE_SHIFT
        which = 0
        for other in range(slot, end):
            which |= <uint32_t>is_at(load64(&st.slots[other]), place) << (other - first)
        seen |= which
        if popcount(which) * PAGE <= <int>back_extent(back_size(v)):
            unit_return(job, first, which, place)


cdef bint upkeep_slice(upkeep_t* job, uint64_t until) noexcept nogil:
    """True if there is more to do."""
    cdef store_t* st = job.st
    cdef uint64_t first, chunk
    while job.group << UNIT_SHIFT_PAGES < slot_count(st):
        first = job.group << UNIT_SHIFT_PAGES
        chunk = first >> CHUNK_SHIFT
        if job.no_room == 0 and not pool_has_room(st):
            job.no_room += 1
        if job.no_room != 0:
            return False
        if load32(&st.chunks[chunk]) & CHUNK_USED == 0:
            job.group = (chunk + 1) << (CHUNK_SHIFT - UNIT_SHIFT_PAGES)
            continue
        job.group += 1
        # With the chunk pinned the device may have become smaller: see store_write().
        if chunk_pin(st, chunk) and chunk < chunk_count(st):
            group_return(job, first)
        chunk_unpin(st, chunk)
        if now_ns() >= until:
            break
    return job.group << UNIT_SHIFT_PAGES < slot_count(st)


# ---- Python -----------------------------------------------------------------------------------

# The collector must not take the store away before __dealloc__ has used it.
@cython.no_gc_clear
cdef class BackUpkeep:
    """One pass over a store: the pages of worn units on the backing store come back to memory.

    To be driven as UnitMaking is. It ends early when the pool has no room (no_room in stats() is not 0 then).
    Raises ValueError for a store without a backing store, OSError(EBUSY) beside a recompression or
    write-back, MemoryError.
    """
    cdef upkeep_t job
    cdef Store store                # None once finished

    def __cinit__(self, Store store not None):
        store.check_range(0, 0)
        if store.st.backing == NULL:
            raise ValueError("expected a store with a backing store")
        self.job.st = store.st
        store.begin_post()
        self.store = store
        try:
            self.job.ctx = store.take_ctx()
        except BaseException:
            self.finish()
            raise

    def __dealloc__(self):
        if self.store is not None:
            self.finish()

    def step(self, uint64_t ns):
        """Goes on for about ns nanoseconds, but for at least one group. True if there is more to do."""
        cdef bint more
        if self.store is None:
            raise ValueError("this upkeep is finished")
        self.store.check_range(0, 0)
        began = thread_time_ns()
        with nogil:
            more = upkeep_slice(&self.job, now_ns() + ns)
        self.job.cpu_ns += thread_time_ns() - began
        return more

    def finish(self):
        """Returns stats()."""
        cdef store_ctx_t* ctx = self.job.ctx
        store, self.store = self.store, None
        if store is not None:
            self.job.ctx = NULL
            if ctx != NULL:
                (<Store>store).put_ctx(ctx)
            (<Store>store).end_post()
        return self.stats()

    def stats(self):
        cdef upkeep_t* job = &self.job
        return BackUpkeepStats(units=job.units, pages=job.pages, busy=job.busy, failed=job.failed,
                               no_room=job.no_room, cpu_ns=job.cpu_ns)
