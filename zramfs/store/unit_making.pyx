# SPDX-License-Identifier: Apache-2.0
# Lock order: slots.pxd. Pages are compressed with a chunk pinned and no lock held.
"""The making of units: the pages of a group that nobody uses become one unit (units.pxd).

A step takes one group of 16 slots. It works as all post-processing does (slots.pxd): each page that is to
join is selected and copied under its slot's lock. The pages of the unit that the group may have already are
copied too. All of them are compressed as one, with no lock held. If the result takes less memory than what it
replaces, it becomes the unit of the group by one store; the pages of the unit before are in it. Then each
page that was selected joins it, if nobody has used it meanwhile, by a store into its slot.

So a kill at any point leaves the group as it was, or with a unit in which some pages are dead. A page that
becomes dead while its unit is made anew is dead in the new one.

A unit with dead places is made anew even where no page joins. A unit takes 0.2 to 0.6 ms, so that is
cheap once and dear again and again. A pass that is not thorough leaves out what was tried in vain and has not
changed since (SLOT_ALONE, WORD_TRIED). It takes a unit that is not more than half dead only when no page has
left it since another pass has seen it (WORD_WORN).

Units have the newest dictionary of the device's own, or else a configured one. A unit with another
dictionary, or of a lower level than that of the pass, is made anew, once: the mark of what was tried says
with which effort (units_t.way). So an old dictionary comes to be needed by those units alone that it makes
smaller.
"""
cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free

from allocator.populate cimport arena_populate_user
from allocator.prim cimport *
from allocator.zspage cimport class_for
from zramfs.codecs.codec cimport CODEC_ZSTD, Codec
from zramfs.codecs.stream cimport packer_free, packer_new, packer_run, packer_t
from zramfs.store.access_times cimport time_of_age, was_used_before
from zramfs.store.record cimport RECORD_VERSION
from zramfs.store.selection cimport object_size
from zramfs.store.slots cimport *
from zramfs.store.store cimport Store
from zramfs.store.units cimport (
    UNIT_BYTES, UNIT_MOST_STREAM, UNIT_PAGES, WORD_TRIED, WORD_WAYS, WORD_WAY_SHIFT, WORD_WORN, group_of,
    popcount, unit_cost,
    unit_head_t, unit_join, unit_look, unit_mark, unit_publish, unit_read, unit_settle, unit_store, units_t,
    word_live,
)

from time import thread_time_ns

from zramfs.codecs.spec import LEVELS as _LEVELS
from zramfs.model.stats import UnitMakingStats

cdef enum:
    # As in recompress.pyx: a pool at its limit has no room for the new objects before the old ones are gone.
    OVER = 64
    WAY = WORD_WAYS << WORD_WAY_SHIFT
    STANDARD_LEVEL = 3


cdef struct making_t:
    # constant
    store_t* st
    store_ctx_t* ctx
    packer_t* packer
    bint joins                  # pages may join; False: units are only made anew
    bint thorough
    int level                   # of zstd
    uint32_t prio               # of the dictionary, 0 = none
    uint64_t way                # of units_t, in its place in a word; 0: there was one with more effort
    uint64_t wanted             # flags of a slot that joins, all of which it must have
    uint32_t before             # of was_used_before()
    uint8_t* pages              # UNIT_BYTES: of the group under way, in order
    uint8_t* stream             # UNIT_BYTES
    uint64_t group              # the next one
    # of the group under way
    uint32_t joining            # bit k: slot k was selected
    uint32_t staying            # and was in the unit before
    uint32_t cost               # bytes of the classes that a new unit replaces
    # results
    uint64_t groups
    uint64_t made
    uint64_t pages_joined
    uint64_t pages_tried
    uint64_t pages_packed
    uint64_t bytes_saved
    uint64_t kept
    uint64_t dissolved
    uint64_t no_room
    uint64_t busy
    uint64_t cpu_ns


# ---- which pages --------------------------------------------------------------------------------

cdef inline bint may_join(making_t* job, uint64_t slot, uint64_t v) noexcept nogil:
    return ((slot_type(v) == OBJ or slot_type(v) == HUGE) and job.joins and not slot_lost(v)
            and v & job.wanted == job.wanted and was_used_before(job.st, slot, job.before))


cdef bint unit_is_worth(making_t* job, uint64_t group) noexcept nogil:
    """Of a unit that no page joins: whether to make it anew, to get rid of its dead places."""
    cdef units_t* u = &job.st.units
    cdef uint64_t w = peek64(&u.words[group])
    cdef const unit_head_t* head
    cdef int members, live
    if w & WORD_TRIED and not job.thorough and (job.way == 0 or w & WAY == job.way):
        return False
    head = unit_look(u, job.ctx.units, group, &w)
    if head == NULL:
        unit_mark(u, group, word_live(w), WORD_TRIED | job.way)
        return False
    if head.prio != job.prio or head.level < job.level:
        return True
    members, live = popcount(head.members), popcount(word_live(w))
    if live == members:
        return False
    if job.thorough or 2 * live < members or w & WORD_WORN:
        return True
    unit_mark(u, group, word_live(w), WORD_WORN)
    return False


cdef bint group_is_worth(making_t* job, uint64_t first) noexcept nogil:
    """A look without locks, as most groups have nothing to be done."""
    cdef store_t* st = job.st
    cdef uint64_t slot, v
    cdef uint32_t joining = 0, untried = 0, live = 0
    for slot in range(first, min(first + UNIT_PAGES, slot_count(st))):
        v = load64(&st.slots[slot])
        live += slot_type(v) == UNIT
        if may_join(job, slot, v):
            joining += 1
            untried += job.thorough or not v & SLOT_ALONE
    if untried != 0 and joining + live > 1:
        return True
    return live != 0 and unit_is_worth(job, group_of(first))


cdef uint32_t old_cost(making_t* job, uint64_t group) noexcept nogil:
    """Of the unit that the group has, as a locked slot says: other words may have no memory."""
    cdef uint64_t w
    cdef const unit_head_t* head = unit_look(&job.st.units, job.ctx.units, group, &w)
    return unit_cost(&job.st.units, head.size) if head != NULL else 0


cdef bint group_copy(making_t* job, uint64_t first) noexcept nogil:
    """Selects and copies. False, if a page of the unit can't be read: then it is left alone."""
    cdef store_t* st = job.st
    cdef uint64_t slot, v
    cdef uint32_t place = 0, n = 0, size
    cdef bint sound = True
    job.joining = job.staying = job.cost = 0
    for slot in range(first, min(first + UNIT_PAGES, slot_count(st))):
        v = slot_lock(st, slot)
        if slot_type(v) == UNIT:
            if job.staying == 0:
                job.cost += old_cost(job, group_of(slot))
            job.staying |= 1u << place
            if unit_read(&st.units, job.ctx.units, slot, job.pages + n * PAGE) == 0:
                n += 1
            else:
                sound = False
        elif may_join(job, slot, v):
            size = object_size(st, job.ctx, v)
            if size != 0 and page_load(st, job.ctx, v, job.pages + n * PAGE) == 0:
                job.joining |= 1u << place
                job.cost += class_for(st.pool, size).size
                n += 1
                v |= SLOT_POST
        slot_unlock(st, slot, v)
        place += 1
    return sound


cdef void group_unselect(making_t* job, uint64_t first, uint64_t mark) noexcept nogil:
    """mark: for the slots whose pages nobody has used since they were selected."""
    cdef uint64_t slot, v
    cdef uint32_t place
    for place in range(<uint32_t>UNIT_PAGES):
        if job.joining >> place & 1:
            slot = first + place
            v = slot_lock(job.st, slot)
            slot_unlock(job.st, slot, v & ~<uint64_t>SLOT_POST | mark if v & SLOT_POST else v)


cdef void group_keep(making_t* job, uint64_t first) noexcept nogil:
    """Nothing smaller was found."""
    job.kept += 1
    group_unselect(job, first, SLOT_ALONE)
    if job.staying != 0:
        unit_mark(&job.st.units, group_of(first), job.staying, WORD_TRIED | job.way)


# ---- the new unit -------------------------------------------------------------------------------

cdef bint word_has_memory(store_t* st, uint64_t group) noexcept nogil:
    """Asks for the memory of a group's word: a touch that the OS refuses would be a SIGBUS."""
    cdef uint64_t at = units_off(st) + group * sizeof(uint64_t)
    return arena_populate_user(st.arena, at & ~<uint64_t>(PAGE - 1), PAGE) == 0


cdef void slot_join(making_t* job, uint64_t slot) noexcept nogil:
    cdef store_t* st = job.st
    cdef uint64_t v = slot_lock(st, slot)
    if not v & SLOT_POST:
        slot_unlock(st, slot, v)
        job.busy += 1
        return
    unit_join(&st.units, slot)
    # Idle, so that only a second read makes it a single page again.
    slot_replace(st, slot, v, UNIT << TYPE_SHIFT | SLOT_IDLE)
    job.pages_joined += 1


cdef void unit_make(making_t* job, uint64_t first, uint32_t size) noexcept nogil:
    """size: of the stream, which takes less than what it replaces."""
    cdef store_t* st = job.st
    cdef uint64_t loc = 0
    cdef uint32_t place
    cdef unit_head_t head
    head.members, head.size = <unsigned short>(job.joining | job.staying), <unsigned short>size
    head.prio, head.level = <unsigned char>job.prio, <signed char>job.level
    if (not word_has_memory(st, group_of(first))
            or unit_store(&st.units, job.ctx.units, group_of(first), &head, job.stream, OVER, &loc) != 0):
        job.no_room += 1
        group_unselect(job, first, 0)
        return
    unit_publish(&st.units, job.ctx.units, group_of(first), loc)
    for place in range(<uint32_t>UNIT_PAGES):
        if job.joining >> place & 1:
            slot_join(job, first + place)
    unit_settle(&st.units, group_of(first))
    job.made += 1
    job.pages_packed += popcount(job.joining | job.staying)
    job.bytes_saved += job.cost - unit_cost(&st.units, size)


cdef void last_page_dissolve(making_t* job, uint64_t slot) noexcept nogil:
    """The one page of a unit that is left becomes a page by itself, if that is smaller."""
    cdef store_t* st = job.st
    cdef prepared_t page
    cdef uint64_t v = slot_lock(st, slot)
    if slot_type(v) != UNIT or unit_read(&st.units, job.ctx.units, slot, job.ctx.page) != 0:
        slot_unlock(st, slot, v)
        return
    page_prepare(st, job.ctx, job.ctx.page, &page)
    page.over = OVER
    if class_for(st.pool, page.size).size >= job.cost:
        slot_unlock(st, slot, v)
        group_keep(job, slot & ~<uint64_t>(UNIT_PAGES - 1))
    elif commit_locked(st, slot, v, &page) == 0:
        job.dissolved += 1
        job.pages_packed += 1
        job.bytes_saved += job.cost - class_for(st.pool, page.size).size
    else:
        job.no_room += 1


cdef bint unit_has_dead_places(making_t* job, uint64_t group) noexcept nogil:
    cdef uint64_t w
    cdef const unit_head_t* head = unit_look(&job.st.units, job.ctx.units, group, &w)
    return head != NULL and head.members != word_live(w)


cdef void group_pack_alone(making_t* job, uint64_t first) noexcept nogil:
    """Pages that were to join save nothing in the unit. Without them it may become smaller all the same."""
    cdef bint joins = job.joins
    group_unselect(job, first, SLOT_ALONE)
    job.joins = False
    group_pack(job, first)
    job.joins = joins


cdef void group_pack(making_t* job, uint64_t first) noexcept nogil:
    cdef uint32_t members, size
    if not group_copy(job, first):
        # It can't be read the next time either.
        group_keep(job, first)
        return
    members = job.joining | job.staying
    job.pages_tried += popcount(members)
    if popcount(members) < 2:
        group_unselect(job, first, 0)
        if job.staying != 0:
            last_page_dissolve(job, first + popcount(job.staying - 1))
        return
    size = packer_run(job.packer, job.pages, popcount(members) * PAGE, job.stream, UNIT_MOST_STREAM)
    if size != 0 and unit_cost(&job.st.units, size) < job.cost:
        unit_make(job, first, size)
    elif job.joining != 0 and job.staying != 0 and unit_has_dead_places(job, group_of(first)):
        group_pack_alone(job, first)
    else:
        group_keep(job, first)


cdef bint making_slice(making_t* job, uint64_t until) noexcept nogil:
    """True if there is more to do."""
    cdef store_t* st = job.st
    cdef uint64_t first, chunk
    while job.group << 4 < slot_count(st):
        first = job.group << 4
        chunk = first >> CHUNK_SHIFT
        if load32(&st.chunks[chunk]) & CHUNK_USED == 0:
            job.group = (chunk + 1) << (CHUNK_SHIFT - 4)
        else:
            job.group += 1
            # With the chunk pinned the device may have become smaller: see store_write().
            if chunk_pin(st, chunk) and chunk < chunk_count(st) and group_is_worth(job, first):
                job.groups += 1
                group_pack(job, first)
            chunk_unpin(st, chunk)
        if now_ns() >= until:
            break
    return job.group << 4 < slot_count(st)


# ---- Python -----------------------------------------------------------------------------------

# The collector must not take the store away before __dealloc__ has used it.
@cython.no_gc_clear
cdef class UnitMaking:
    """One pass over a store, which makes units.

    idle, age: only pages join that are idle, that were not used for more than so many seconds (None = any),
    or both. joins: False = no page joins, units are only made anew. thorough: looks also at what was tried
    before in vain, and at each unit with a dead place. level: of zstd; None = that of the first secondary
    zstd, or of the primary one, or 3.

    To be driven so: step() until it answers False, then finish(), which must be called whatever happened, and
    before the store is closed. Each gives the GIL up, holds no lock for longer than a unit takes to be
    unpacked, and can be the last: what was done is complete.
    Raises ValueError (level; age without access times; a store that wipes, as a unit keeps what was discarded
    until it is made anew), OSError(EBUSY) beside a recompression or write-back, MemoryError.
    """
    cdef making_t job
    cdef Store store                # None once finished

    def __cinit__(self, Store store not None, *, bint idle=False, bint joins=True, bint thorough=True,
                  level=None, age=None):
        cdef making_t* job = &self.job
        store.check_range(0, 0)
        lowest, highest = _LEVELS["zstd"]
        if level is None:
            level = standard_level(store)
        if level == 0 or not lowest <= level <= highest:
            raise ValueError(f"a level of {lowest} to {highest} but 0 expected for units, got {level}")
        if store.st.pool.wipe:
            raise ValueError("this device wipes what is discarded at once, and a unit would keep it until "
                             "it is made anew")
        job.st = store.st
        job.wanted = SLOT_IDLE if idle else 0
        job.before = time_of_age(store.st, age)
        job.joins, job.thorough = joins, thorough
        store.begin_post()
        self.store = store
        try:
            job.ctx = store.take_ctx()
            # A version that knows no dictionaries of units can't adopt the store from here on.
            store32(&store.st.record.version, RECORD_VERSION)
            # No algorithm comes or goes before finish().
            job.level, job.prio = level, unit_dictionary(store)
            job.way = way_of(store, job.level, job.prio)
            job.packer = packer_new(job.level, store.st.codec[job.prio].dictionary if job.prio else NULL)
            job.pages = <uint8_t*>aligned_alloc(PAGE, 2 * UNIT_BYTES)
            if job.packer == NULL or job.pages == NULL:
                raise MemoryError("no memory for the making of units")
            job.stream = job.pages + UNIT_BYTES
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
            raise ValueError("this making of units is finished")
        self.store.check_range(0, 0)
        began = thread_time_ns()
        with nogil:
            more = making_slice(&self.job, now_ns() + ns)
        self.job.cpu_ns += thread_time_ns() - began
        return more

    def finish(self):
        """Returns stats()."""
        cdef making_t* job = &self.job
        cdef store_ctx_t* ctx = job.ctx
        store, self.store = self.store, None
        if store is not None:
            job.ctx = NULL
            if ctx != NULL:
                (<Store>store).put_ctx(ctx)
            packer_free(job.packer)
            free(job.pages)
            job.packer = NULL
            job.pages = NULL
            (<Store>store).end_post()
        return self.stats()

    def stats(self):
        cdef making_t* job = &self.job
        return UnitMakingStats(
            groups=job.groups, made=job.made, pages=job.pages_joined, bytes_saved=job.bytes_saved,
            kept=job.kept, dissolved=job.dissolved, no_room=job.no_room, busy=job.busy,
            tried=job.pages_tried, packed=job.pages_packed, cpu_ns=job.cpu_ns)


cdef object standard_level(Store store):
    for codec in (*store.codecs[1:], store.codecs[0]):
        if codec is not None and codec.algo == "zstd":
            return codec.level
    return STANDARD_LEVEL


cdef uint32_t unit_dictionary(Store store) except? 99:
    """The priority of the dictionary that units get: that of the newest generation, or else the last one that
    was configured; 0 = there is none for zstd."""
    cdef int prio, found = 0
    cdef Codec codec
    for prio in range(1, NR_PRIO):
        codec = store.codecs[prio]
        if (codec is not None and codec.codec.algo == CODEC_ZSTD and codec.codec.dictionary != NULL
                and store.generations[prio] >= (store.generations[found] if found else 0)):
            found = prio
    return <uint32_t>found


cdef uint64_t way_of(Store store, int level, uint32_t prio) except? 99:
    """See units_t.way."""
    cdef units_t* u = &store.st.units
    cdef uint64_t number = store.generations[prio] if prio else 0
    if u.way == 0 or number != u.way_dictionary or level > u.way_level:
        u.way = u.way % WORD_WAYS + 1
        u.way_level, u.way_dictionary = level, number
    return <uint64_t>u.way << WORD_WAY_SHIFT if level >= u.way_level else 0
