# SPDX-License-Identifier: Apache-2.0
"""Write-back; see writeback.pxd."""
cimport cython
from libc.errno cimport EFBIG, ENOSPC
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove, memset

from allocator.prim cimport aligned_alloc, load32, now_ns, store32
from zramfs.store.backing cimport (
    BACK_HEADER, BLOCK, BLOCK_SHIFT, UNIT_SHIFT, back_extent, back_place, back_sum, backing_add,
    backing_remove, backing_take, backing_try_take, backing_unpin_block, backing_write,
)
from zramfs.store.back_units cimport back_stream_size, back_unit_make, backing_take_run
from zramfs.store.candidates cimport candidates_add, candidates_init, candidates_take
from zramfs.store.record cimport RECORD_VERSION
from zramfs.store.selection cimport (
    UNIT_SHARE, slot_copy, slot_select, slot_unselect, slot_written_back, unit_copy,
)
from zramfs.store.slots cimport (
    CHUNK_SHIFT, CHUNK_USED, WANT_HUGE, WANT_IDLE, WANT_INCOMPRESSIBLE, slot_count, store_ctx_t,
)
from zramfs.store.store cimport Store
from zramfs.store.units cimport UNIT_PAGES, UNIT_SHIFT_PAGES, group_of, place_bit, popcount, unit_head_t

cdef extern from "errno.h" nogil:
    enum: EDQUOT

cdef enum:
    # 1 MiB: what a loop device or a disk takes at once. More would only take longer to stop.
    MAX_BATCH = 256
    WHICH_SHIFT = 48            # in a candidate: the number of a slot has at most 36 bits

MODES = {
    "idle": WANT_IDLE, "huge": WANT_HUGE, "huge_idle": WANT_HUGE | WANT_IDLE,
    "incompressible": WANT_INCOMPRESSIBLE, None: 0,
}


# ---- candidates -----------------------------------------------------------------------------------

cdef bint candidate_add(writeback_t* job, uint64_t slot, uint32_t size, bint in_unit) noexcept nogil:
    """A page that was selected. One of a unit waits for the others of its unit. False: there is no memory."""
    if in_unit:
        job.unit = group_of(slot)
        job.seen |= place_bit(slot)
        return True
    return candidates_add(&job.selected, slot, size)


cdef bint candidate_add_unit(writeback_t* job) noexcept nogil:
    """The pages of a unit that wait, if there are any. False: there is no memory, and they are not
    selected."""
    cdef uint64_t first = job.unit << UNIT_SHIFT_PAGES
    cdef uint32_t seen = job.seen
    job.seen = 0
    if seen == 0 or candidates_add(&job.selected, first | <uint64_t>seen << WHICH_SHIFT, UNIT_SHARE):
        return True
    pages_unselect(job, first, seen)
    return False


cdef bint candidate_take(writeback_t* job) noexcept nogil:
    if not job.taken:
        job.taken = candidates_take(&job.selected, &job.slot)
        job.which = <uint32_t>(job.slot >> WHICH_SHIFT) if job.taken else 0
        job.slot &= (<uint64_t>1 << WHICH_SHIFT) - 1
        job.singly = False
    return job.taken


cdef void pages_unselect(writeback_t* job, uint64_t first, uint32_t which) noexcept nogil:
    cdef uint32_t place
    for place in range(<uint32_t>UNIT_PAGES):
        if which >> place & 1:
            slot_unselect(job.st, first + place)


# ---- a batch --------------------------------------------------------------------------------------

cdef void batch_drop(writeback_t* job) noexcept nogil:
    """What is in the batch stays in memory."""
    cdef placed_t* p
    cdef uint32_t i, _page
    for i in range(job.nr_placed):
        p = &job.placed[i]
        for _page in range(<uint32_t>popcount(p.which)):
            backing_remove(job.st.backing, p.offset, p.size)
        pages_unselect(job, p.slot, p.which)
    for i in range(job.blocks):
        backing_unpin_block(job.st.backing, job.first + i)
    job.nr_placed = job.blocks = job.fill = 0


cdef void placed_commit(writeback_t* job, const placed_t* p) noexcept nogil:
    cdef uint64_t place = back_place(p.offset, p.size, p.sum), before = job.pages
    cdef uint32_t k
    for k in range(<uint32_t>UNIT_PAGES):
        if not p.which >> k & 1:
            continue
        if slot_written_back(job.st, p.slot + k, place, p.prio):
            job.pages += 1
        else:
            job.passed += 1
            backing_remove(job.st.backing, p.offset, p.size)
    job.units += p.size > BLOCK and job.pages != before


cdef void batch_commit(writeback_t* job, uint64_t end) noexcept nogil:
    """What lies wholly before the byte `end` of the backing store is on the device now."""
    cdef placed_t* p
    cdef uint32_t i, kept = 0
    for i in range(job.nr_placed):
        p = &job.placed[i]
        if p.offset + back_extent(p.size) > end:
            job.placed[kept] = p[0]
            kept += 1
        else:
            placed_commit(job, p)
    job.nr_placed = kept


cdef uint64_t pages_placed(writeback_t* job) noexcept nogil:
    cdef uint64_t pages = 0
    cdef uint32_t i
    for i in range(job.nr_placed):
        pages += popcount(job.placed[i].which)
    return pages


cdef void batch_flush(writeback_t* job, bint whole) noexcept nogil:
    """Writes the batch, its full blocks or all of it, as far as that is allowed. If that fails the batch
    is dropped."""
    cdef uint32_t n = job.fill >> BLOCK_SHIFT, i
    cdef int r
    if whole:
        n = (job.fill + BLOCK - 1) >> BLOCK_SHIFT
        memset(job.data + job.fill, 0, (n << BLOCK_SHIFT) - job.fill)
    n = <uint32_t>min(<uint64_t>n, job.allowed)
    if n == 0:
        return
    r = backing_write(job.st.backing, job.first, n, job.data)
    if r != 0:
        job.error = r
        job.full = job.full or r == -ENOSPC or r == -EDQUOT or r == -EFBIG
        job.failed += pages_placed(job)
        batch_drop(job)
        return
    job.allowed -= n
    batch_commit(job, (job.first + n) << BLOCK_SHIFT)
    for i in range(n):
        backing_unpin_block(job.st.backing, job.first + i)
    job.first += n
    job.blocks -= n
    job.fill = job.fill - (n << BLOCK_SHIFT) if job.fill > n << BLOCK_SHIFT else 0
    memmove(job.data, job.data + (n << BLOCK_SHIFT), job.fill)


cdef bint batch_make_room(writeback_t* job, uint32_t extent) noexcept nogil:
    """Takes blocks for one more object, behind those of the batch. The batch is written first if it is full,
    or if another object has the next block. False: nothing more is allowed, or the device is full."""
    cdef int64_t block
    if extent == BLOCK:
        # Raw pages come first, as the largest; behind anything else they begin a block all the same.
        memset(job.data + job.fill, 0, -job.fill & (BLOCK - 1))
        job.fill = (job.fill + BLOCK - 1) & ~<uint32_t>(BLOCK - 1)
    if job.fill + extent > job.batch << BLOCK_SHIFT:
        batch_flush(job, False)
    if job.fill + extent > job.batch << BLOCK_SHIFT:
        return False
    while job.fill + extent > job.blocks << BLOCK_SHIFT and not job.full:
        block = backing_take(job.st.backing, job.first + job.blocks if job.blocks else <uint64_t>-1)
        if block < 0:
            job.full = True
            job.error = -ENOSPC
            break
        if job.blocks and <uint64_t>block != job.first + job.blocks:
            batch_flush(job, True)
            # Nothing more is allowed: what is left stays in memory.
            batch_drop(job)
        if job.blocks == 0:
            job.first = <uint64_t>block
        job.blocks += 1
    return not job.full


cdef uint8_t* batch_place(writeback_t* job, uint64_t slot, uint32_t which, uint32_t size,
                          uint64_t total) noexcept nogil:
    """An object for which there is room. Where its bytes are to go."""
    cdef placed_t* p = &job.placed[job.nr_placed]
    cdef uint8_t* dst = job.data + job.fill
    cdef uint32_t _page
    job.nr_placed += 1
    p.slot, p.which, p.size, p.sum, p.prio = slot, which, size, total, 0
    p.offset = (job.first << BLOCK_SHIFT) + job.fill
    for _page in range(<uint32_t>popcount(which)):
        backing_add(job.st.backing, p.offset, size)
    job.fill += back_extent(size)
    return dst


cdef bint page_place(writeback_t* job, uint64_t slot) noexcept nogil:
    """Puts a page into the batch. False if there is no room for it, now or at all."""
    cdef store_ctx_t* ctx = job.ctx
    cdef uint32_t size = slot_copy(job.st, ctx, slot, ctx.page), extent = back_extent(size)
    cdef uint64_t total
    cdef uint8_t* dst
    if size == 0:
        job.passed += 1
        return True
    if not batch_make_room(job, extent):
        return False
    total = back_sum(job.st.backing, slot, ctx.page, size)
    dst = batch_place(job, slot, 1, size, total)
    if size != BLOCK:
        memset(dst + extent - 16, 0, 16)
        memcpy(dst, &total, BACK_HEADER)
        dst += BACK_HEADER
    memcpy(dst, ctx.page, size)
    return True


# ---- units --------------------------------------------------------------------------------------------

cdef bint batch_make_room_for_unit(writeback_t* job, uint32_t extent) noexcept nogil:
    """As batch_make_room(), but all of its blocks have to lie behind each other. False: nothing more is
    allowed; or job.singly is set, because there is no such place."""
    cdef int64_t first
    if job.fill + extent > job.batch << BLOCK_SHIFT:
        batch_flush(job, False)
    if job.fill + extent > job.batch << BLOCK_SHIFT:
        return False
    while job.fill + extent > job.blocks << BLOCK_SHIFT:
        if job.blocks and backing_try_take(job.st.backing, job.first + job.blocks):
            job.blocks += 1
            continue
        if job.fill and job.allowed == 0:
            return False
        first = backing_take_run(job.st.backing, (extent + BLOCK - 1) >> BLOCK_SHIFT)
        if first < 0:
            job.no_run = job.singly = True
            return False
        batch_flush(job, True)
        batch_drop(job)
        job.first, job.blocks = <uint64_t>first, (extent + BLOCK - 1) >> BLOCK_SHIFT
    return not job.full


cdef bint unit_place(writeback_t* job) noexcept nogil:
    """Puts the unit that was taken into the batch, as a whole, or sets job.singly. False if there is no room
    for it at the moment."""
    cdef store_ctx_t* ctx = job.ctx
    cdef uint64_t group = group_of(job.slot)
    cdef unit_head_t head
    cdef uint32_t which = job.which, nbytes = unit_copy(job.st, ctx, group, &which, &head)
    cdef uint32_t size = back_stream_size(nbytes)
    cdef uint8_t* dst
    job.passed += popcount(job.which & ~which)
    job.which = which
    if which == 0:
        return True
    # With half of its pages gone, it takes as much as the rest takes with the primary algorithm (.20 and .36
    # of 4 KiB a page, by zstd 3 and lz4). A block less, because the batch may have begun one.
    if (nbytes == 0 or 2 * popcount(which) <= popcount(head.members) or job.no_run
            or back_extent(size) > (job.batch - 1) << BLOCK_SHIFT):
        job.singly = True
        return True
    if not batch_make_room_for_unit(job, back_extent(size)):
        return job.singly
    dst = batch_place(job, job.slot, which, size, 0)
    job.placed[job.nr_placed - 1].prio = head.prio
    back_unit_make(job.st.backing, group, head.members, ctx.units.stream, nbytes, dst)
    job.which = 0
    return True


cdef bint batch_place_next(writeback_t* job) noexcept nogil:
    """Puts the candidate into the batch, or the next page of it. False if there is no room for it, now or at
    all."""
    if job.which == 0:
        job.taken = not page_place(job, job.slot)
        return not job.taken
    if not job.singly:
        if not unit_place(job):
            return False
    elif page_place(job, job.slot + <uint64_t>popcount((job.which & -job.which) - 1)):
        job.which &= job.which - 1
    else:
        return False
    job.taken = job.which != 0
    return True


cdef void writeback_slice(writeback_t* job, uint64_t ns) noexcept nogil:
    """Until the time is over, or nothing more is allowed, possible or left to do."""
    cdef uint64_t until = now_ns() + ns
    while job.allowed and not job.full and now_ns() < until:
        if not candidate_take(job) or not batch_place_next(job):
            break
    if job.full or not job.taken and job.selected.top < 0:
        batch_flush(job, True)


# ---- Python -----------------------------------------------------------------------------------------

# The collector must not take the store away before __dealloc__ has used it.
@cython.no_gc_clear
@cython.final
cdef class WritebackRun:
    """One run of write-back: select() the pages, write() until nothing is left, and in any case finish(),
    before the store is closed. Each call may be made in another thread than the last one, gives the GIL
    up, and can be the last: what was done is complete.

    batch: blocks of 4 KiB that are handed to the device together, of which at most 256 are.
    Raises ValueError for a store without a backing store, OSError(EBUSY) beside another run or a
    recompression, MemoryError.
    """

    def __cinit__(self, Store store not None, batch=32):
        cdef writeback_t* job = &self.job
        if store.st == NULL or store.st.backing == NULL:
            raise ValueError("expected an open store with a backing store")
        store.begin_post()
        self.store = store
        candidates_init(&job.selected)
        job.st = store.st
        job.batch = max(2, min(batch, MAX_BATCH))
        try:
            job.ctx = store.take_ctx()
            # A version that knows no units on a backing store can't adopt the store from here on.
            store32(&store.st.record.version, RECORD_VERSION)
            job.data = <uint8_t*>aligned_alloc(BLOCK, job.batch << BLOCK_SHIFT)
            job.placed = <placed_t*>malloc((job.batch << BLOCK_SHIFT - UNIT_SHIFT) * sizeof(placed_t))
            if job.data == NULL or job.placed == NULL:
                raise MemoryError(f"no memory for a batch of {job.batch} blocks")
        except BaseException:
            self.finish()
            raise

    def __dealloc__(self):
        self.finish()

    cdef int expect_open(self) except -1:
        if self.store is None:
            raise ValueError("this run of write-back is finished")
        self.store.check_range(0, 0)
        return 0

    def select(self, uint64_t low, uint64_t high, mode=None, uint64_t ns=1_000_000):
        """Adds the pages [low, high) that are as mode says (idle, huge, huge_idle, incompressible, None:
        any), for about ns nanoseconds. The page where the next call goes on; high: it is done.
        MemoryError: 8 bytes a page are needed."""
        cdef writeback_t* job = &self.job
        cdef uint64_t until = now_ns() + ns, page = low, end
        cdef uint32_t want = MODES[mode], size
        cdef bint room = True, in_unit = False
        self.expect_open()
        end = min(high, slot_count(job.st))
        with nogil:
            while page < end and room:
                if load32(&job.st.chunks[page >> CHUNK_SHIFT]) & CHUNK_USED == 0:
                    page = ((page >> CHUNK_SHIFT) + 1) << CHUNK_SHIFT
                else:
                    size = slot_select(job.st, job.ctx, page, want, &in_unit)
                    if size and not candidate_add(job, page, size, in_unit):
                        slot_unselect(job.st, page)
                        room = False
                    page += 1
                if page & (UNIT_PAGES - 1) == 0:
                    room = candidate_add_unit(job) and room
                if page & 63 == 0 and now_ns() > until:
                    break
            room = candidate_add_unit(job) and room
        if not room:
            raise MemoryError("no memory to remember which pages to write back")
        return page if page < end else high

    def write(self, budget=None, uint64_t ns=5_000_000):
        """Goes on for about ns nanoseconds, and writes at most budget blocks, None = as many as it takes.
        The number of blocks written.

        A write that fails is no exception: see `failed` and `error`. Where it was for want of space
        (ENOSPC, EDQUOT, EFBIG), nothing is left to do.
        """
        cdef writeback_t* job = &self.job
        cdef uint64_t allowed
        self.expect_open()
        allowed = min(budget, <uint64_t>1 << 62) if budget is not None else <uint64_t>1 << 62
        job.allowed = allowed
        with nogil:
            writeback_slice(job, ns)
        return allowed - job.allowed

    def finish(self):
        """Ends the run: what is not written stays in memory."""
        cdef writeback_t* job = &self.job
        cdef bint closed
        store, self.store = self.store, None
        if store is None:
            return
        closed = (<Store>store).st == NULL      # with the store went what the run had of it
        with nogil:
            if not closed:
                batch_drop(job)
            while candidate_take(job):
                job.taken = False
                if not closed:
                    pages_unselect(job, job.slot, job.which if job.which else 1)
        if job.ctx != NULL:
            (<Store>store).put_ctx(job.ctx)
        free(job.data)
        free(job.placed)
        (<Store>store).end_post()

    @property
    def left(self):
        """Whether write() has something to do: pages that were selected and not looked at, or that wait
        for their block to become full."""
        return not self.job.full and (self.job.taken or self.job.selected.top >= 0 or self.job.nr_placed > 0)

    @property
    def pages(self):
        """Written back."""
        return self.job.pages

    @property
    def units(self):
        """Of these pages: in how many units that were written as wholes."""
        return self.job.units

    @property
    def passed(self):
        """Pages that were used, or discarded, between selection and writing; they stay in memory."""
        return self.job.passed

    @property
    def failed(self):
        """Pages that stay in memory because a write failed."""
        return self.job.failed

    @property
    def error(self):
        """The errno of the last write that failed; ENOSPC when there is no free block; 0."""
        return -self.job.error
