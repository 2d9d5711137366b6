# SPDX-License-Identifier: Apache-2.0
# Lock order: slots.pxd. A slot is locked for the copy of an object, or for the unpacking of a unit; pages are
# compressed, and the table is touched, with a chunk pinned and no lock held.
"""An estimate of what recompression, sharing and units would make of a store, from a sample (sample.pxd).
Nothing changes: no slot, no mark, no access time. A page on the backing store stays there.

The pages of each group in the sample are compressed, one by one and as a unit. What they would take is
compared with what they take, where an object counts as its share of a zspage without holes. The result is the
ratio of two sums over the sample, times what all objects take. Groups that take much become much smaller, so
the ratio is known far better than either sum. Its error is the usual one of a ratio from a sample without
replacement (Cochran, Sampling Techniques, 2.11). What is behind the last object of each size class is added
(zramfs/model/estimate.py).
"""
cimport cython
from libc.math cimport sqrt
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from allocator.prim cimport *
from allocator.zsmalloc cimport zs_map, zs_unmap
from allocator.zspage cimport NR_RAW_CLASSES, class_for, size_class_t
from zramfs.codecs.codec cimport (
    Codec, codec_compress, codec_ctx_free, codec_ctx_new, codec_ctx_t, codec_that_compresses,
)
from zramfs.codecs.stream cimport packer_free, packer_new, packer_run, packer_t
from zramfs.store.sample cimport (
    SAMPLE_TAKEN, may_share, sample_copies, sample_free, sample_init, sample_slice, sample_t, takes_memory,
)
from zramfs.store.shared cimport cell_users, shared_fetch
from zramfs.store.slots cimport *
from zramfs.store.store cimport Store
from zramfs.store.units cimport (
    UNIT_BYTES, UNIT_MOST_STREAM, UNIT_PAGES, UNIT_PART, head_bytes, part_count, popcount, unit_cost,
    unit_head_t, unit_look, unit_read, word_live,
)

from time import thread_time_ns

from zramfs.model.estimate import DEFAULT_SAMPLE as _SAMPLE
from zramfs.model.estimate import LEVEL as _LEVEL
from zramfs.model.estimate import Estimate, room_behind

cdef struct taken_t:            # a page of the group under way
    uint64_t v                  # its slot's value
    uint32_t size               # of its object; 0: it is in a unit, or takes nothing
    uint32_t users              # of the object, if it is shared


cdef struct estimate_t:
    # constant
    store_t* st
    store_ctx_t* ctx
    packer_t* packer            # NULL: the store makes no units
    codec_ctx_t* codec          # NULL: nothing is recompressed
    uint32_t prio
    uint8_t* pages              # UNIT_BYTES: those of the group under way that may be in a unit, in order
    uint8_t* stream             # UNIT_BYTES
    uint8_t* object             # a page
    sample_t sample
    uint64_t turn               # of the group of the sample that is tried next
    # the group under way
    uint32_t members            # pages in `pages`
    uint32_t joining            # of them, those that are in no unit
    uint32_t replaced           # what a unit would replace, in bytes of classes
    uint32_t single[16]         # sizes of the objects of those that join
    double now                  # bytes of the pool
    double after
    # results: sums over the groups of the sample, of what they take (b) and would take (a)
    double a, b, aa, ab, bb
    uint64_t tried
    uint64_t pages_seen
    uint64_t unit_pages
    uint64_t shared_pages
    uint64_t sample_ns
    uint64_t try_ns
    double objects[NR_RAW_CLASSES]  # by size class, that there would be


# ---- the last walk ------------------------------------------------------------------------------

cdef inline double object_now(estimate_t* job, uint32_t size) noexcept nogil:
    """Bytes of the pool that an object takes."""
    cdef size_class_t* c = class_for(job.st.pool, size)
    return <double>c.pages * PAGE / c.objs


cdef inline void object_after(estimate_t* job, uint32_t size, double users) noexcept nogil:
    """Counts one that so many pages would share."""
    job.objects[class_for(job.st.pool, size).index] += 1 / users
    job.after += object_now(job, size) / users


cdef double unit_now(estimate_t* job, uint32_t size) noexcept nogil:
    """Of a unit with a stream of this size."""
    cdef uint32_t k
    cdef double total = object_now(job, head_bytes(size))
    for k in range(part_count(size)):
        total += object_now(job, min(size - k * UNIT_PART, <uint32_t>UNIT_PART))
    return total


cdef void unit_after(estimate_t* job, uint32_t size) noexcept nogil:
    cdef uint32_t k
    object_after(job, head_bytes(size), 1)
    for k in range(part_count(size)):
        object_after(job, min(size - k * UNIT_PART, <uint32_t>UNIT_PART), 1)


cdef taken_t slot_take(estimate_t* job, uint64_t slot, unit_head_t* head, uint32_t* dead) noexcept nogil:
    """Copies the object of a slot to job.object, or its page of a unit behind the members. head, dead: of the
    unit, if it is the first page of it; head.size is 0 before."""
    cdef store_t* st = job.st
    cdef taken_t t
    cdef const uint8_t* p
    cdef const unit_head_t* found
    cdef uint64_t w
    memset(&t, 0, sizeof(t))
    if st.stays_ready:
        # Before the lock: see "Why swap cannot deadlock" in docs/concurrency.md.
        make_resident(job.object, PAGE)
        make_resident(job.pages + job.members * PAGE, PAGE)
    t.v = slot_lock(st, slot)
    if slot_type(t.v) == UNIT:
        if head.size == 0:
            found = unit_look(&st.units, job.ctx.units, slot >> 4, &w)
            if found != NULL:
                head[0] = found[0]
                dead[0] = popcount(head.members) - popcount(word_live(w))
        if unit_read(&st.units, job.ctx.units, slot, job.pages + job.members * PAGE) == 0:
            job.members += 1
    elif slot_type(t.v) == SHARED:
        t.size = shared_fetch(&st.shared, slot_cell(slot, t.v), job.object)
        t.users = cell_users(load64(&st.shared.cells[t.v >> LOC_SHIFT])) if t.size != 0 else 0
    elif slot_type(t.v) == SAME_OBJ:
        t.size = sizeof(uint64_t)
    elif may_share(t.v):
        p = zs_map(st.pool, t.v >> LOC_SHIFT, job.object, &t.size)
        if p != NULL:
            if p != job.object:
                memcpy(job.object, p, t.size)
            zs_unmap(st.pool, t.v >> LOC_SHIFT)
    # It is unpacked with no lock held: the algorithm stays until group_try() has done that (secondary.pxd).
    store32(&job.ctx.fetching, slot_prio(t.v))
    slot_unlock(st, slot, t.v)
    return t


cdef uint32_t smaller_size(estimate_t* job, const taken_t* t, const uint8_t* page) noexcept nogil:
    """Of the object of a page after recompression."""
    cdef uint32_t fresh
    cdef int n
    if job.codec == NULL or t.v & SLOT_INCOMPRESSIBLE or slot_prio(t.v) >= job.prio:
        return t.size
    n = codec_compress(job.codec, page, PAGE, job.ctx.comp, <int>job.st.max_object)
    fresh = <uint32_t>n if n > 0 else PAGE
    return fresh if class_for(job.st.pool, fresh).size < class_for(job.st.pool, t.size).size else t.size


cdef void page_try(estimate_t* job, const taken_t* t) noexcept nogil:
    """A page with an object."""
    cdef uint8_t* page = job.pages + job.members * PAGE
    cdef uint64_t copies
    cdef uint32_t size
    if slot_type(t.v) == SAME_OBJ:
        job.now += object_now(job, t.size)
        object_after(job, t.size, 1)
        return
    copies = sample_copies(&job.sample, t.v, job.object, t.size)
    if slot_type(t.v) == SHARED:
        job.now += object_now(job, t.size) / max(t.users, 1)
        object_after(job, t.size, max(copies, <uint64_t>max(t.users, 1)))
        job.shared_pages += 1
        return
    job.now += object_now(job, t.size)
    if object_unpack(job.ctx, t.v, job.object, t.size, page) != 0:
        object_after(job, t.size, 1)
        return
    size = smaller_size(job, t, page)
    if copies > 1:
        job.shared_pages += 1
        object_after(job, size, copies)
        return
    job.single[job.joining] = size
    job.members += 1
    job.joining += 1
    job.replaced += class_for(job.st.pool, size).size


cdef void group_try(estimate_t* job, uint64_t first) noexcept nogil:
    cdef unit_head_t head
    cdef taken_t t
    cdef uint64_t slot
    cdef uint32_t dead = 0, size = 0, k
    job.members = job.joining = job.replaced = 0
    job.now = job.after = 0
    head.size = 0
    for slot in range(first, min(first + UNIT_PAGES, slot_count(job.st))):
        if not takes_memory(load64(&job.st.slots[slot])):
            continue
        t = slot_take(job, slot, &head, &dead)
        job.pages_seen += 1
        if t.size != 0:
            page_try(job, &t)
        store32(&job.ctx.fetching, 0)
    if head.size != 0:
        job.now += unit_now(job, head.size)
        job.replaced += unit_cost(&job.st.units, head.size)
    # As UnitMaking decides.
    if job.packer != NULL and job.members > 1 and (job.joining != 0 or dead != 0):
        size = packer_run(job.packer, job.pages, job.members * PAGE, job.stream, UNIT_MOST_STREAM)
    if size != 0 and unit_cost(&job.st.units, size) < job.replaced:
        job.unit_pages += job.members
        unit_after(job, size)
    else:
        job.unit_pages += job.members - job.joining
        for k in range(job.joining):
            object_after(job, job.single[k], 1)
        if head.size != 0:
            unit_after(job, head.size)
    sample_add(job)


cdef void sample_add(estimate_t* job) noexcept nogil:
    job.tried += 1
    job.a += job.after
    job.b += job.now
    job.aa += job.after * job.after
    job.ab += job.after * job.now
    job.bb += job.now * job.now


# ---- all of it ----------------------------------------------------------------------------------

cdef bint try_slice(estimate_t* job, uint64_t until) noexcept nogil:
    """True if there is more to do."""
    cdef uint64_t chunk
    while job.turn < job.sample.nr_chosen:
        chunk = job.sample.chosen[job.turn] >> CHUNK_SHIFT
        if chunk_pin(job.st, chunk) and chunk < chunk_count(job.st):
            group_try(job, job.sample.chosen[job.turn])
        chunk_unpin(job.st, chunk)
        job.turn += 1
        if now_ns() >= until:
            break
    return job.turn < job.sample.nr_chosen


# ---- Python -------------------------------------------------------------------------------------

# The collector must not take the store away before __dealloc__ has used it.
@cython.no_gc_clear
cdef class Estimating:
    """One estimate of a store.

    priority: of the algorithm that recompresses; None = pages by themselves stay as they are. level: of zstd,
    for the units; a store that wipes makes none. sample: bytes of pages that are compressed, at most; each
    seed chooses others, None = by chance.

    To be driven so: step() until it answers False, then result(), and whatever happened finish(), before the
    store is closed. Each step gives the GIL up. It goes beside anything else that works on the store.
    Raises ValueError (priority not configured), MemoryError: 32 bytes a page of the sample are needed.
    """
    cdef estimate_t job
    cdef Store store                # None once finished
    cdef Codec codec                # of job.codec, and not the store's, which may be dropped meanwhile

    def __cinit__(self, Store store not None, *, priority=None, int level=_LEVEL, sample=_SAMPLE,
                  seed=None):
        cdef estimate_t* job = &self.job
        store.check_range(0, 0)
        if priority is not None and (not 1 <= priority < NR_PRIO or store.codecs[priority] is None):
            raise ValueError(f"no secondary algorithm has the priority {priority}")
        job.st = store.st
        self.store = store
        try:
            job.ctx = store.take_ctx()
            job.pages = <uint8_t*>aligned_alloc(PAGE, 2 * UNIT_BYTES + PAGE)
            if not job.st.pool.wipe:
                job.packer = packer_new(level, NULL)
            if priority is not None:
                job.prio = priority
                self.codec = codec_that_compresses(store.codecs[priority])
                job.codec = codec_ctx_new(&self.codec.codec, True)
            if (job.pages == NULL or job.packer == NULL and not job.st.pool.wipe
                    or job.codec == NULL and priority is not None):
                raise MemoryError("no memory for an estimate")
            job.stream = job.pages + UNIT_BYTES
            job.object = job.stream + UNIT_BYTES
            sample_init(&job.sample, job.st, job.object, max(1, sample // UNIT_BYTES),
                        now_ns() if seed is None else seed)
        except BaseException:
            self.finish()
            raise

    def __dealloc__(self):
        self.finish()

    def step(self, uint64_t ns):
        """Goes on for about ns nanoseconds. True if there is more to do."""
        cdef estimate_t* job = &self.job
        cdef bint is_taken = job.sample.walk == SAMPLE_TAKEN
        cdef int r
        if self.store is None:
            raise ValueError("this estimate is finished")
        self.store.check_range(0, 0)
        began = thread_time_ns()
        with nogil:
            if is_taken:
                r = try_slice(job, now_ns() + ns)
            else:
                r = sample_slice(&job.sample, now_ns() + ns)
        if r < 0:
            raise MemoryError("no memory for the sample of an estimate")
        took = thread_time_ns() - began
        if is_taken:
            job.try_ns += took
        else:
            job.sample_ns += took
        return r == 1 or not is_taken

    def finish(self):
        """Gives the memory back."""
        cdef estimate_t* job = &self.job
        store, self.store = self.store, None
        if store is not None and job.ctx != NULL:
            (<Store>store).put_ctx(job.ctx)
        job.ctx = NULL
        packer_free(job.packer)
        codec_ctx_free(job.codec)
        self.codec = None
        free(job.pages)
        sample_free(&job.sample)
        job.packer, job.codec, job.pages = NULL, NULL, NULL

    def result(self):
        """An Estimate. ValueError before step() has answered False, or after finish()."""
        cdef estimate_t* job = &self.job
        if self.store is None or job.sample.walk != SAMPLE_TAKEN or job.turn < job.sample.nr_chosen:
            raise ValueError("this estimate is finished, or not yet at its end")
        stats, classes = self.store.stats(), self.store.classes()
        dense = sum([c.obj_used * c.pages_per_zspage * PAGE / c.objs_per_zspage for c in classes])
        share = job.sample.groups / job.tried if job.tried else 0.0
        rest = room_behind(classes, [share * job.objects[c.index] for c in classes], share == 1)
        ratio = job.a / job.b if job.b > 0 else 1.0
        after = min(<uint64_t>(ratio * dense + rest), stats.mem_used_total)
        return Estimate(
            data=stats.orig_data_size, memory=stats.mem_used_total, after=after,
            error=<uint64_t>(dense * ratio_error(job)), cpu_ns=<uint64_t>(job.try_ns * share) + job.sample_ns,
            groups=job.sample.groups, sampled_groups=job.tried, sampled_pages=job.pages_seen,
            saved=<uint64_t>max((1 - ratio) * dense, 0.0), unit_pages=job.unit_pages,
            shared_pages=job.shared_pages, own_ns=job.sample_ns + job.try_ns)


cdef double ratio_error(estimate_t* job) noexcept nogil:
    """Standard error of a / b."""
    cdef double n = <double>job.tried, ratio, square
    if job.tried < 2 or job.tried >= job.sample.groups or job.b <= 0:
        return 0
    ratio = job.a / job.b
    square = max(job.aa - 2 * ratio * job.ab + ratio * ratio * job.bb, 0.0) / (n - 1)
    return sqrt((1 - n / job.sample.groups) / n * square) / (job.b / n)
