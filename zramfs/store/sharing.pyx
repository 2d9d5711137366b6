# SPDX-License-Identifier: Apache-2.0
# Lock order: slots.pxd. Chunks are pinned, and slots locked, one at a time. Pages are unpacked and compared
# with no lock held.
"""Sharing: pages that nobody uses, and whose bytes are equal, become one object (shared.pxd).

It goes through the slots once. As in all post-processing (slots.pxd) a page is selected and copied under its
slot's lock. Its sum is looked up in a table of the pages before (share_table.pxd). If a page or a shared
object is there, that is copied too, in the same way, and their bytes are compared. Only if all are equal the
slot gets the value that names the object's cell, and only if it is selected still: then the page has the
bytes that were compared.

The first two equal pages make a new object, with the tag of a cell, of the smaller of theirs. So a kill at
any point leaves each slot with the object that it had, or with the shared one.

A page takes 2.3 us of CPU without a partner, and 4.0 if it joins (lz4, text; 128 MiB of them).

In the end a second walk gives an object of its own to each page that is the last one of its cell, so that
recompression, units and write-back, which leave shared pages alone, take it again.
"""
cimport cython
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcmp, memcpy

from allocator.populate cimport arena_populate_user
from allocator.prim cimport *
from allocator.zsmalloc cimport zs_map, zs_unmap
from allocator.zspage cimport class_for
from zramfs.store.access_times cimport time_of_age, was_used_before
from zramfs.store.page cimport page_sum
from zramfs.store.selection cimport slot_unselect
from zramfs.store.share_table cimport *
from zramfs.store.shared cimport *
from zramfs.store.slots cimport *
from zramfs.store.store cimport Store

from time import thread_time_ns

from zramfs.model.stats import SharingStats

cdef enum:
    # As in recompress.pyx: a pool at its limit has no room for a new object before the old ones are gone.
    OVER = 64


cdef struct taken_t:            # a page that was selected and copied
    uint64_t slot
    uint64_t v                  # the slot's value then
    uint32_t size               # of the object
    uint8_t* object             # a page each
    uint8_t* page


cdef struct sharing_t:
    # constant
    store_t* st
    store_ctx_t* ctx
    uint64_t wanted             # flags of a slot that may share, all of which it must have
    uint32_t before             # of was_used_before()
    uint8_t* memory             # of the pages below
    taken_t mine                # the page whose turn it is
    taken_t other               # the one with the same sum
    share_table_t table
    uint64_t slot               # the next one
    bint second                 # the walk that looks for pages that are alone
    # results
    uint64_t looked
    uint64_t joined
    uint64_t made
    uint64_t bytes_saved        # modulo 2^64
    uint64_t unequal
    uint64_t alone
    uint64_t no_room
    uint64_t busy
    uint64_t cpu_ns


# ---- one page -----------------------------------------------------------------------------------

cdef inline bint may_share(sharing_t* job, uint64_t slot, uint64_t v) noexcept nogil:
    if slot_type(v) == SHARED:
        return True
    return ((slot_type(v) == OBJ or slot_type(v) == HUGE) and not slot_lost(v)
            and v & job.wanted == job.wanted and was_used_before(job.st, slot, job.before))


cdef uint32_t object_copy_locked(sharing_t* job, uint64_t slot, uint64_t v, uint8_t* dst) noexcept nogil:
    """The object of a locked slot that may share: its bytes, or 0."""
    cdef store_t* st = job.st
    cdef const uint8_t* p
    cdef uint32_t size = 0
    if slot_type(v) == SHARED:
        return shared_fetch(&st.shared, slot_cell(slot, v), dst)
    p = zs_map(st.pool, v >> LOC_SHIFT, dst, &size)
    if p == NULL:
        return 0
    if p != dst and size <= PAGE:
        memcpy(dst, p, size)
    zs_unmap(st.pool, v >> LOC_SHIFT)
    return size if size <= PAGE else 0


cdef inline void buffers_ready(sharing_t* job, taken_t* t) noexcept nogil:
    """Before a lock: see "Why swap cannot deadlock" in docs/concurrency.md."""
    if job.st.stays_ready:
        make_resident(t.object, 2 * PAGE)


cdef bint page_take(sharing_t* job, taken_t* t, uint64_t slot) noexcept nogil:
    """Selects a page and copies it. False: it may not share, or is damaged."""
    cdef store_t* st = job.st
    t.slot, t.size = slot, 0
    buffers_ready(job, t)
    # Looked at first without the lock: most slots may not.
    if chunk_pin(st, slot >> CHUNK_SHIFT) and may_share(job, slot, load64(&st.slots[slot])):
        t.v = slot_lock(st, slot)
        if may_share(job, slot, t.v):
            t.size = object_copy_locked(job, slot, t.v, t.object)
        slot_unlock(st, slot, t.v | SLOT_POST if t.size != 0 else t.v)
    chunk_unpin(st, slot >> CHUNK_SHIFT)
    if t.size == 0:
        return False
    if object_unpack(job.ctx, t.v, t.object, t.size, t.page) != 0:
        slot_unselect(st, slot)
        return False
    return True


cdef void slot_drop(sharing_t* job, taken_t* t) noexcept nogil:
    """Of a page that was selected: it stays as it is."""
    slot_unselect(job.st, t.slot)


cdef bint slot_join(sharing_t* job, taken_t* t, uint64_t cell, uint32_t prio) noexcept nogil:
    """A selected page, whose bytes are those of the cell's object, joins it, and becomes the user as which
    the caller holds the cell. False: it has changed, and the hold ends."""
    cdef store_t* st = job.st
    cdef uint64_t v
    cdef bint joined = False
    if chunk_pin(st, t.slot >> CHUNK_SHIFT):
        v = slot_lock(st, t.slot)
        joined = v & SLOT_POST != 0
        if joined:
            add64(&st.shared.pages, 1)
            slot_replace(st, t.slot, v, shared_slot(t.slot, cell, prio) | v & SLOT_IDLE)
        else:
            slot_unlock(st, t.slot, v)
    chunk_unpin(st, t.slot >> CHUNK_SHIFT)
    if not joined:
        shared_leave(&st.shared, cell)
        job.busy += 1
        return False
    job.joined += 1
    if slot_type(t.v) != SHARED:
        job.bytes_saved += class_for(st.pool, t.size).size
    return True


# ---- two pages ----------------------------------------------------------------------------------

cdef bint cell_compare(sharing_t* job, uint64_t cell, uint32_t prio) noexcept nogil:
    """Whether the bytes of my page are those of a cell that is held."""
    buffers_ready(job, &job.other)
    job.other.size = shared_fetch(&job.st.shared, cell, job.other.object)
    return (job.other.size != 0
            and object_unpack(job.ctx, <uint64_t>prio << PRIO_SHIFT, job.other.object, job.other.size,
                              job.other.page) == 0
            and memcmp(job.mine.page, job.other.page, PAGE) == 0)


cdef uint64_t cell_make(sharing_t* job, const taken_t* t) noexcept nogil:
    """A cell with the object of a page, held; NO_CELL: the pool or the cells have no room."""
    cdef store_t* st = job.st
    cdef uint64_t cell = cell_choose(&st.shared), at
    if cell == NO_CELL:
        return NO_CELL
    # A touch that the OS refuses would be a SIGBUS.
    at = cells_off(st) + cell * sizeof(uint64_t)
    if (arena_populate_user(st.arena, at & ~<uint64_t>(PAGE - 1), PAGE) != 0
            or shared_make(&st.shared, cell, t.object, t.size, OVER) != 0):
        return NO_CELL
    job.made += 1
    job.bytes_saved -= class_for(st.pool, t.size).size
    return cell


cdef inline uint64_t cell_entry(uint64_t cell, uint32_t prio) noexcept nogil:
    return ENTRY_CELL | <uint64_t>prio << ENTRY_PRIO | cell


cdef uint64_t mine_entry(sharing_t* job) noexcept nogil:
    if slot_type(job.mine.v) != SHARED:
        return job.mine.slot
    return cell_entry(job.mine.v >> LOC_SHIFT, slot_prio(job.mine.v))


cdef uint64_t meet_cell(sharing_t* job, uint64_t cell, uint32_t prio) noexcept nogil:
    """My page and a shared object with its sum. What the table's entry becomes."""
    if slot_type(job.mine.v) == SHARED and job.mine.v >> LOC_SHIFT == cell:
        slot_drop(job, &job.mine)
        return mine_entry(job)
    # Free, or full: from now on the others join my page.
    if not shared_hold(&job.st.shared, cell):
        slot_drop(job, &job.mine)
        return mine_entry(job)
    if cell_compare(job, cell, prio):
        slot_join(job, &job.mine, cell, prio)
        return cell_entry(cell, prio)
    job.unequal += 1
    shared_leave(&job.st.shared, cell)
    slot_drop(job, &job.mine)
    return mine_entry(job)


cdef uint64_t meet_in_mine(sharing_t* job) noexcept nogil:
    """The other page, which is equal, joins the object that my page shares already."""
    cdef uint64_t cell = job.mine.v >> LOC_SHIFT
    slot_drop(job, &job.mine)
    if shared_hold(&job.st.shared, cell):
        slot_join(job, &job.other, cell, slot_prio(job.mine.v))
    else:
        slot_drop(job, &job.other)
    return mine_entry(job)


cdef uint64_t meet_slot(sharing_t* job, uint64_t slot) noexcept nogil:
    """My page and another with its sum. What the table's entry becomes."""
    cdef taken_t* smaller
    cdef uint64_t cell
    cdef bint joined
    if slot >= slot_count(job.st) or not page_take(job, &job.other, slot):
        slot_drop(job, &job.mine)
        return mine_entry(job)
    if slot_type(job.other.v) == SHARED or memcmp(job.mine.page, job.other.page, PAGE) != 0:
        job.unequal += 1
        slot_drop(job, &job.other)
        slot_drop(job, &job.mine)
        return mine_entry(job)
    if slot_type(job.mine.v) == SHARED:
        return meet_in_mine(job)
    smaller = &job.mine if job.mine.size < job.other.size else &job.other
    cell = cell_make(job, smaller)
    if cell == NO_CELL:
        job.no_room += 1
        slot_drop(job, &job.other)
        slot_drop(job, &job.mine)
        return mine_entry(job)
    # Two users: each page that joins is one.
    shared_hold(&job.st.shared, cell)
    joined = slot_join(job, &job.other, cell, slot_prio(smaller.v))
    if not slot_join(job, &job.mine, cell, slot_prio(smaller.v)) and not joined:
        job.made -= 1
        job.bytes_saved += class_for(job.st.pool, smaller.size).size
        return mine_entry(job)
    return cell_entry(cell, slot_prio(smaller.v))


cdef void page_share(sharing_t* job, uint64_t slot) noexcept nogil:
    cdef uint64_t sum, what
    cdef uint64_t* place
    if not page_take(job, &job.mine, slot):
        return
    job.looked += 1
    sum = page_sum(job.mine.page, job.table.seed)
    place = share_table_find(&job.table, sum)
    if place == NULL:
        slot_drop(job, &job.mine)
        what = mine_entry(job)
    elif entry_is_cell(place[0]):
        what = meet_cell(job, entry_number(place[0]), entry_prio(place[0]))
    else:
        what = meet_slot(job, entry_number(place[0]))
    share_table_put(&job.table, sum, what, place)


# ---- pages that are alone -----------------------------------------------------------------------

cdef inline bint is_alone(store_t* st, uint64_t slot, uint64_t v) noexcept nogil:
    cdef uint64_t cell
    if slot_type(v) != SHARED:
        return False
    cell = slot_cell(slot, v)
    return cell < st.shared.nr_cells and cell_users(load64(&st.shared.cells[cell])) == 1


cdef void page_part(sharing_t* job, uint64_t slot) noexcept nogil:
    """A page that is the last one of its cell gets an object of its own, with the same bytes."""
    cdef store_t* st = job.st
    cdef prepared_t page
    cdef uint64_t v
    buffers_ready(job, &job.mine)
    v = slot_lock(st, slot)
    page.size = object_copy_locked(job, slot, v, job.mine.object) if is_alone(st, slot, v) else 0
    if page.size == 0:
        slot_unlock(st, slot, v)
        return
    page.type = HUGE if page.size == PAGE else OBJ
    page.data, page.word, page.over = job.mine.object, 0, OVER
    page.bits = v & (PRIO_MASK << PRIO_SHIFT | SLOT_IDLE)
    if commit_locked(st, slot, v, &page) == 0:
        job.alone += 1
    else:
        job.no_room += 1


# ---- all of them --------------------------------------------------------------------------------

cdef void slot_visit(sharing_t* job, uint64_t slot) noexcept nogil:
    cdef store_t* st = job.st
    if not job.second:
        page_share(job, slot)
        return
    if chunk_pin(st, slot >> CHUNK_SHIFT) and is_alone(st, slot, load64(&st.slots[slot])):
        page_part(job, slot)
    chunk_unpin(st, slot >> CHUNK_SHIFT)


cdef bint sharing_slice(sharing_t* job, uint64_t until) noexcept nogil:
    """True if there is more to do."""
    cdef store_t* st = job.st
    while True:
        if job.slot >= slot_count(st):
            if job.second:
                return False
            job.second, job.slot = True, 0
        if load32(&st.chunks[job.slot >> CHUNK_SHIFT]) & CHUNK_USED == 0:
            job.slot = ((job.slot >> CHUNK_SHIFT) + 1) << CHUNK_SHIFT
        else:
            slot_visit(job, job.slot)
            job.slot += 1
        if now_ns() >= until:
            return True


# ---- Python -----------------------------------------------------------------------------------

# The collector must not take the store away before __dealloc__ has used it.
@cython.no_gc_clear
cdef class Sharing:
    """One pass over a store, in which pages with equal contents come to share objects.

    idle, age: only pages that are idle, that were not used for more than so many seconds (None = any), or
    both; and those that share already.

    To be driven so: step() until it answers False, then finish(), which must be called whatever happened, and
    before the store is closed. Each gives the GIL up, holds no lock for longer than the copy of an object
    takes, and can be the last: what was done is complete.
    Raises ValueError (age without access times), OSError(EBUSY) beside a recompression, a making of units or
    a write-back, MemoryError.
    """
    cdef sharing_t job
    cdef Store store                # None once finished

    def __cinit__(self, Store store not None, *, bint idle=False, age=None):
        cdef sharing_t* job = &self.job
        store.check_range(0, 0)
        job.before = time_of_age(store.st, age)
        store.begin_post()
        self.store = store
        job.st = store.st
        job.wanted = SLOT_IDLE if idle else 0
        try:
            job.ctx = store.take_ctx()
            job.memory = <uint8_t*>aligned_alloc(PAGE, 4 * PAGE)
            # The sums differ each time, so that nobody can choose pages which meet in one bucket.
            if job.memory == NULL or not share_table_open(
                    &job.table, peek64(&job.st.pages_stored), now_ns()):
                raise MemoryError("no memory for the table of the pages that may share")
            job.mine.object, job.mine.page = job.memory, job.memory + PAGE
            job.other.object, job.other.page = job.memory + 2 * PAGE, job.memory + 3 * PAGE
        except BaseException:
            self.finish()
            raise

    def __dealloc__(self):
        if self.store is not None:
            self.finish()

    def step(self, uint64_t ns):
        """Goes on for about ns nanoseconds, but for at least one page. True if there is more to do."""
        cdef bint more
        if self.store is None:
            raise ValueError("this sharing is finished")
        self.store.check_range(0, 0)
        began = thread_time_ns()
        with nogil:
            more = sharing_slice(&self.job, now_ns() + ns)
        self.job.cpu_ns += thread_time_ns() - began
        return more

    def finish(self):
        """Returns stats()."""
        cdef sharing_t* job = &self.job
        cdef store_ctx_t* ctx = job.ctx
        store, self.store = self.store, None
        if store is not None:
            job.ctx = NULL
            if ctx != NULL:
                (<Store>store).put_ctx(ctx)
            share_table_close(&job.table)
            free(job.memory)
            job.memory = NULL
            (<Store>store).end_post()
        return self.stats()

    def stats(self):
        cdef sharing_t* job = &self.job
        return SharingStats(
            looked=job.looked, joined=job.joined, made=job.made, bytes_saved=max(<int64_t>job.bytes_saved, 0),
            unequal=job.unequal, alone=job.alone, no_room=job.no_room, busy=job.busy,
            table_bytes=share_table_bytes(&job.table), cpu_ns=job.cpu_ns)
