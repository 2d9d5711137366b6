# SPDX-License-Identifier: Apache-2.0
# Lock order: slots.pxd. Pages are compressed with a chunk pinned and no lock held.
"""Recompression: pages that the primary algorithm has stored, compressed again by a secondary one.

It works in two stages, as all post-processing does (slots.pxd). select() looks through the slot table and
remembers the pages that may be worth it, by the size of their objects. step() takes them in turn, the
largest first. A page is replaced only if its new object falls into a smaller size class. Within a class
nothing would be won.
"""
cimport cython
from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t

from allocator.prim cimport *
from allocator.zspage cimport class_for, size_class_t
from zramfs.store.access_times cimport time_of_age, was_used_before
from zramfs.store.candidates cimport candidates_add, candidates_init, candidates_t, candidates_take
from zramfs.codecs.codec cimport (
    Codec, codec_compress, codec_ctx_free, codec_ctx_new, codec_ctx_t, codec_that_compresses,
)
from zramfs.store.selection cimport object_size, slot_unselect
from zramfs.store.slots cimport *
from zramfs.store.store cimport Store

from time import thread_time_ns

from zramfs.model.stats import RecompressionStats

cdef enum:
    SELECT_CHUNKS = 4               # between two looks at the clock: 2048 slots, about 40 us
    # Pages beyond the pool's limit, 256 KiB. A pool at its limit has no room for the first zspage of
    # another class, up to 8 pages, and could never become smaller; a hundred classes begin that way
    # before the old objects' zspages are empty. (A guess; with 64 no page was turned away.)
    OVER = 64


cdef struct recompression_t:
    # constant
    store_t* st
    store_ctx_t* ctx
    codec_ctx_t* codec
    uint32_t prio
    bint last                   # no algorithm comes after it: see follows()
    bint source[NR_PRIO]        # pages of these priorities are taken
    bint retires[NR_PRIO]       # and of these even if they become no smaller
    bint again                  # those that count as incompressible too
    uint64_t wanted             # flags of a slot, all of which it must have
    bint huge                   # raw pages only
    uint32_t before             # of was_used_before()
    uint32_t threshold          # bytes; 0 = none
    uint64_t max_pages          # tries
    candidates_t selected
    uint64_t chunk              # where the selection goes on
    # results
    uint64_t tried
    uint64_t won
    uint64_t bytes_saved
    uint64_t kept
    uint64_t incompressible
    uint64_t no_room
    uint64_t busy
    uint64_t cpu_ns


# ---- first stage ------------------------------------------------------------------------------

cdef inline bint eligible(recompression_t* job, uint64_t v) noexcept nogil:
    if slot_type(v) != OBJ and slot_type(v) != HUGE or job.huge and slot_type(v) != HUGE:
        return False
    return (v & job.wanted == job.wanted and (job.again or not v & SLOT_INCOMPRESSIBLE)
            and job.source[slot_prio(v)])


cdef bint select_chunk(recompression_t* job, uint64_t chunk) noexcept nogil:
    cdef store_t* st = job.st
    cdef uint64_t slot = chunk << CHUNK_SHIFT, end = slot + CHUNK_SLOTS, v
    cdef uint32_t size
    cdef bint taken
    if end > slot_count(st):
        end = slot_count(st)
    while slot < end:
        if eligible(job, load64(&st.slots[slot])):
            size = 0
            v = slot_lock(st, slot)
            if eligible(job, v) and was_used_before(st, slot, job.before):
                size = object_size(st, job.ctx, v)
            taken = size != 0 and size >= job.threshold
            slot_unlock(st, slot, v | SLOT_POST if taken else v)
            # Without the lock, because it may wait for memory.
            if taken and not candidates_add(&job.selected, slot, size):
                slot_unlock(st, slot, slot_lock(st, slot) & ~<uint64_t>SLOT_POST)
                return False
        slot += 1
    return True


cdef int select_slice(recompression_t* job, uint64_t until) noexcept nogil:
    """1 = more to look through, 0 = done, -1 = memory is short."""
    cdef uint64_t chunk
    cdef bint room
    while job.chunk < chunk_count(job.st):
        chunk = job.chunk
        if load32(&job.st.chunks[chunk]) & CHUNK_USED != 0:
            room = not chunk_pin(job.st, chunk) or select_chunk(job, chunk)
            chunk_unpin(job.st, chunk)
            if not room:
                return -1
        job.chunk += 1
        if job.chunk % SELECT_CHUNKS == 0 and now_ns() >= until:
            return 1
    return 0


# ---- second stage -----------------------------------------------------------------------------

cdef void result_commit(recompression_t* job, uint64_t slot, uint32_t size, uint32_t fresh) noexcept nogil:
    """size, fresh: bytes of the object and of the one that was made of it, which lies in ctx.comp."""
    cdef store_t* st = job.st
    cdef prepared_t page
    cdef size_class_t* old_class = class_for(st.pool, size)
    cdef size_class_t* new_class = class_for(st.pool, fresh)
    cdef uint64_t v = slot_lock(st, slot)
    cdef bint smaller
    cdef int r
    if not v & SLOT_POST:
        slot_unlock(st, slot, v)
        job.busy += 1
        return
    v &= ~<uint64_t>SLOT_POST
    smaller = (new_class.size < old_class.size
               or new_class.size == old_class.size and job.retires[slot_prio(v)])
    if not smaller or job.threshold != 0 and fresh >= job.threshold:
        job.kept += 1
        if job.last:
            v |= SLOT_INCOMPRESSIBLE
            job.incompressible += 1
        slot_unlock(st, slot, v)
        return
    page.type, page.size, page.data, page.word = OBJ, fresh, job.ctx.comp, 0
    page.bits = <uint64_t>job.prio << PRIO_SHIFT | v & SLOT_IDLE
    page.over = OVER
    r = commit_locked(st, slot, v, &page)
    if r == 0:
        job.won += 1
        # One of the same size class may have some bytes more.
        job.bytes_saved += size - min(size, fresh)
    else:
        job.no_room += 1


cdef void recompress_page(recompression_t* job, uint64_t slot) noexcept nogil:
    cdef store_t* st = job.st
    cdef store_ctx_t* ctx = job.ctx
    cdef uint64_t v = slot_lock(st, slot)
    cdef uint32_t size
    cdef int n
    if not v & SLOT_POST:
        slot_unlock(st, slot, v)
        return
    size = object_size(st, ctx, v)
    if size == 0 or page_load(st, ctx, v, ctx.page) != 0:
        slot_unlock(st, slot, v & ~<uint64_t>SLOT_POST)
        return
    # Touched, so idle no longer, whatever comes of it: that is the kernel's rule for what was selected by its
    # mark. A pass that goes by age leaves the marks to those who made them.
    slot_unlock(st, slot, v if job.before != 0 else v & ~<uint64_t>SLOT_IDLE)
    job.tried += 1
    n = codec_compress(job.codec, ctx.page, PAGE, ctx.comp, <int>st.max_object)
    result_commit(job, slot, size, <uint32_t>n if n > 0 else PAGE)


cdef bint step_slice(recompression_t* job, uint64_t until) noexcept nogil:
    """True if there is more to do."""
    cdef uint64_t slot
    while job.tried < job.max_pages:
        if not candidates_take(&job.selected, &slot):
            return False
        if chunk_pin(job.st, slot >> CHUNK_SHIFT):
            recompress_page(job, slot)
        chunk_unpin(job.st, slot >> CHUNK_SHIFT)
        if now_ns() >= until:
            return True
    return False


cdef void unselect_rest(recompression_t* job, bint closed) noexcept nogil:
    cdef uint64_t slot
    while candidates_take(&job.selected, &slot):
        if not closed:
            slot_unselect(job.st, slot)


# ---- Python -----------------------------------------------------------------------------------

cdef bint follows(Store store, int one, int other) except -1:
    """Whether pages of the priority `other` are recompressed to `one`. The order of priorities is the
    kernel's. After them come the generations, in the order in which they were taken: they take turns at the
    priorities that are free, so their number decides."""
    cdef object a = store.generations[one], b = store.generations[other]
    return (a or 0, one) > (b or 0, other)


# The collector must not take the store away before __dealloc__ has used it.
@cython.no_gc_clear
cdef class Recompression:
    """One recompression of a store, with the algorithm of a priority (1 to 3).

    idle, huge: only pages that are idle, stored raw, or both. age: only pages that were not used for more
    than so many seconds, None = any; their idle marks stay. threshold: leaves objects of fewer bytes alone,
    and takes results of fewer bytes only; 0 = any. max_pages: how many pages are tried at most; None = no
    limit. again: also pages that count as incompressible.

    To be driven so: select() until it answers False, step() until it answers False, then finish(),
    which must be called whatever happened, and before the store is closed. Each gives the GIL up, holds
    no lock for longer than a page takes, and can be the last: what was done is complete.
    Raises ValueError (priority not configured, threshold, age without access times), OSError(EBUSY) beside
    another one, MemoryError.
    """
    cdef recompression_t job
    cdef Store store                # None once finished
    cdef Codec codec                # of job.codec

    def __cinit__(self, Store store not None, priority, *, bint idle=False, bint huge=False,
                  threshold=0, max_pages=None, age=None, bint again=False):
        candidates_init(&self.job.selected)
        if not 1 <= priority < NR_PRIO or store.codecs[priority] is None:
            raise ValueError(f"no secondary algorithm has the priority {priority}")
        store.check_range(0, 0)
        if not 0 <= threshold <= store.st.max_object:
            raise ValueError(
                f"a threshold of at most {store.st.max_object} bytes expected, got {threshold}: larger "
                "objects are stored raw")
        self.job.st = store.st
        self.job.before = time_of_age(store.st, age)
        self.job.prio = priority
        self.job.last = True
        for other, each in enumerate(store.codecs):
            self.job.source[other] = follows(store, priority, other)
            # The bytes are no loss, and the older dictionary can go when none of its pages is left.
            self.job.retires[other] = self.job.source[other] and store.generations[other] != 0
            if each is not None and follows(store, other, priority) and not store.generations[other]:
                self.job.last = False
        self.job.again = again
        self.job.wanted = SLOT_IDLE if idle else 0
        self.job.huge = huge
        self.job.threshold = threshold
        self.job.max_pages = UINT64_MAX if max_pages is None else min(max_pages, UINT64_MAX)
        store.begin_post()
        self.store = store
        try:
            self.job.ctx = store.take_ctx()
            self.codec = codec_that_compresses(store.codecs[priority])
            self.job.codec = codec_ctx_new(&self.codec.codec, True)
            if self.job.codec == NULL:
                raise MemoryError(f"no memory for a context of {store.codecs[priority]!r}")
        except BaseException:
            self.finish()
            raise

    def __dealloc__(self):
        if self.store is not None:
            self.finish()

    cdef int expect_open(self) except -1:
        if self.store is None:
            raise ValueError("this recompression is finished")
        self.store.check_range(0, 0)
        return 0

    def select(self, uint64_t ns):
        """First stage, for about ns nanoseconds. True if there are pages left to look at.
        MemoryError: 8 bytes a page that is worth it are needed."""
        cdef int r
        self.expect_open()
        began = thread_time_ns()
        with nogil:
            r = select_slice(&self.job, now_ns() + ns)
        self.job.cpu_ns += thread_time_ns() - began
        if r < 0:
            raise MemoryError("no memory to remember which pages to recompress")
        return r == 1

    def step(self, uint64_t ns):
        """Second stage, for about ns nanoseconds, but at least one page. True if there is more to do."""
        cdef bint more
        self.expect_open()
        began = thread_time_ns()
        with nogil:
            more = step_slice(&self.job, now_ns() + ns)
        self.job.cpu_ns += thread_time_ns() - began
        return more

    def finish(self):
        """Leaves alone what was selected and not yet done. Returns stats()."""
        cdef store_ctx_t* ctx = self.job.ctx
        cdef bint closed
        store, self.store = self.store, None
        if store is not None:
            closed = (<Store>store).st == NULL
            with nogil:
                unselect_rest(&self.job, closed)
            self.job.ctx = NULL
            if ctx != NULL:
                (<Store>store).put_ctx(ctx)
            codec_ctx_free(self.job.codec)
            self.job.codec = NULL
            self.codec = None
            (<Store>store).end_post()
        return self.stats()

    def stats(self):
        cdef recompression_t* job = &self.job
        return RecompressionStats(
            tried=job.tried, won=job.won, bytes_saved=job.bytes_saved, kept=job.kept,
            incompressible=job.incompressible, no_room=job.no_room, busy=job.busy,
            cpu_ns=job.cpu_ns)
