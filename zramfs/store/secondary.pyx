# SPDX-License-Identifier: Apache-2.0
# Lock order: see secondary.pxd.
"""Secondary algorithms of a store in use, and what cold pages there are to train a dictionary on."""
from libc.errno cimport EBUSY
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from allocator.prim cimport *
from allocator.zspage cimport class_for
from zramfs.codecs.codec cimport (
    CODEC_NONE, Codec, codec_bytes, codec_ctx_bytes, codec_ctx_free, codec_ctx_new, codec_ctx_t, codec_t,
)
from zramfs.store.access_times cimport time_of_age, was_used_before
from zramfs.store.record cimport codecs_packed
from zramfs.store.slots cimport *
from zramfs.store.store cimport Store
from zramfs.store.tables cimport ctx_codec_new

cdef extern from *:
    """
    #define NO_SLOT (~0ull)
    """
    const uint64_t NO_SLOT


# ---- contexts -----------------------------------------------------------------------------------

cdef void codec_remove(store_t* st, uint32_t prio) noexcept nogil:
    cdef store_ctx_t* ctx
    cdef codec_ctx_t* old
    pthread_mutex_lock(&st.contexts_lock)
    memset(&st.codec[prio], 0, sizeof(codec_t))
    ctx = st.contexts
    while ctx != NULL:
        old = ctx.codec[prio]
        ctx.codec[prio] = NULL
        if old != NULL:
            codec_ctx_free(old)
        ctx = ctx.next
    pthread_mutex_unlock(&st.contexts_lock)


cdef int codec_install(store_t* st, uint32_t prio, const codec_t* codec) noexcept nogil:
    cdef store_ctx_t* ctx
    cdef int r = 0
    pthread_mutex_lock(&st.contexts_lock)
    st.codec[prio] = codec[0]
    ctx = st.contexts
    while ctx != NULL and r == 0:
        r = ctx_codec_new(st, ctx, prio)
        ctx = ctx.next
    pthread_mutex_unlock(&st.contexts_lock)
    if r != 0:
        codec_remove(st, prio)
    return r


cdef bint contexts_fetch(store_t* st, uint32_t prio) noexcept nogil:
    cdef store_ctx_t* ctx
    cdef bint found = False
    pthread_mutex_lock(&st.contexts_lock)
    ctx = st.contexts
    while ctx != NULL:
        found = found or load32(&ctx.fetching) == prio or load32(&ctx.units.unpacks) == prio
        ctx = ctx.next
    pthread_mutex_unlock(&st.contexts_lock)
    return found


# ---- slots --------------------------------------------------------------------------------------

cdef void chunk_count_priorities(store_t* st, uint64_t chunk, uint64_t* counts) noexcept nogil:
    cdef uint64_t slot = chunk << CHUNK_SHIFT, end = slot + CHUNK_SLOTS, v
    if end > slot_count(st):
        end = slot_count(st)
    while slot < end:
        v = load64(&st.slots[slot])
        if slot_type(v) == OBJ or slot_type(v) == SHARED or slot_type(v) == WRITTEN_BACK:
            counts[slot_prio(v)] += 1
        slot += 1


cdef void priorities_count(store_t* st, uint64_t* counts) noexcept nogil:
    cdef uint64_t chunk
    memset(counts, 0, NR_PRIO * sizeof(uint64_t))
    for chunk in range(chunk_count(st)):
        if load32(&st.chunks[chunk]) & CHUNK_USED != 0:
            if chunk_pin(st, chunk):
                chunk_count_priorities(st, chunk, counts)
            chunk_unpin(st, chunk)


cdef bint priority_needed(store_t* st, uint32_t prio) noexcept nogil:
    cdef uint64_t counts[NR_PRIO]
    if load64(&st.units.by_prio[prio]) != 0:
        return True
    priorities_count(st, counts)
    # In this order: a slot that has lost the priority since was unlocked by who fetches before that.
    return counts[prio] != 0 or contexts_fetch(st, prio)


cdef inline bint is_cold(uint64_t v, uint64_t wanted, bint in_units) noexcept nogil:
    return ((slot_type(v) == OBJ or slot_type(v) == HUGE or in_units and slot_type(v) == UNIT)
            and v & wanted == wanted and not slot_lost(v))


cdef uint64_t cold_in_chunk(store_t* st, uint64_t chunk, uint64_t wanted, bint in_units, uint32_t before,
                            uint64_t* first, uint64_t nth) noexcept nogil:
    """How many cold pages a chunk has; before: of was_used_before(). first: gets the number of the nth of
    them, if there is one."""
    cdef uint64_t slot = chunk << CHUNK_SHIFT, end = slot + CHUNK_SLOTS, found = 0
    if end > slot_count(st):
        end = slot_count(st)
    if chunk_pin(st, chunk):
        while slot < end:
            if is_cold(load64(&st.slots[slot]), wanted, in_units) and was_used_before(st, slot, before):
                if found == nth:
                    first[0] = slot
                found += 1
            slot += 1
    chunk_unpin(st, chunk)
    return found


# ---- Python -------------------------------------------------------------------------------------

cdef int expect_changeable(Store store, priority) except -1:
    store.check_range(0, 0)
    if not 1 <= priority < NR_PRIO:
        raise ValueError(f"a priority of 1 to {NR_PRIO - 1} expected, got {priority}")
    if store.saving_run:
        raise OSError(EBUSY, "a save is under way, whose image names the algorithms as they are")
    return 0


cdef int table_replace(Store store, int prio, Codec codec, int number) except -1:
    """Note 0, and what Python finds; under the GIL, which nothing here gives up. MemoryError: the old ones
    stay."""
    codecs, numbers = list(store.codecs), list(store.generations)
    codecs[prio], numbers[prio] = codec, number
    store.arena.set_note(0, codecs_packed(tuple(codecs), tuple(numbers)))
    store.codecs, store.generations = tuple(codecs), tuple(numbers)
    return 0


def can_change(Store store not None):
    """False: a save or post-processing is under way, which needs the algorithms as they are."""
    store.check_range(0, 0)
    return not store.saving_run and not store.post_processing


cdef Codec codec_of_store(Codec codec):
    """As a store has it: without tables to compress with, which whoever compresses makes for that time."""
    return Codec(codec.algo, codec.level, codec.dictionary, only_decompresses=True)


def set_secondary(Store store not None, priority, Codec codec not None, *, bint generation=True):
    """Gives a store in use another secondary algorithm, at a priority that has none. It counts as a
    generation, newer than all that are there: see Store.generations. generation: False = it stays, as those
    that the store was made with.

    Raises ValueError (the priority, `none`), OSError(EBUSY): the priority is taken, or a save or
    post-processing is under way; MemoryError. The table is the old one then.
    """
    cdef uint32_t prio
    cdef int r
    expect_changeable(store, priority)
    if codec.codec.algo == CODEC_NONE:
        raise ValueError("none makes nothing smaller, and is no secondary algorithm")
    if store.codecs[priority] is not None:
        raise OSError(EBUSY, f"the priority {priority} has an algorithm: {store.codecs[priority]!r}")
    prio = priority
    store.begin_post()
    try:
        codec = codec_of_store(codec)
        with nogil:
            r = codec_install(store.st, prio, &codec.codec)
        if r != 0:
            raise MemoryError(f"no memory for the threads' workspaces of {codec!r}")
        try:
            expect_changeable(store, priority)      # once more: a save may have begun
            table_replace(store, priority, codec, max(store.generations) + 1 if generation else 0)
        except BaseException:
            with nogil:
                codec_remove(store.st, prio)
            raise
    finally:
        store.end_post()


def drop_secondary(Store store not None, priority):
    """Takes a generation away that no page needs. False, and nothing has changed: a page needs it.

    Raises ValueError for a priority without a generation; OSError(EBUSY): a save or post-processing is under
    way; MemoryError.
    """
    cdef uint32_t prio
    cdef bint needed
    expect_changeable(store, priority)
    if not store.generations[priority]:
        raise ValueError(f"the priority {priority} has no algorithm that the store took in use")
    prio = priority
    store.begin_post()
    try:
        with nogil:
            needed = priority_needed(store.st, prio)
        if needed:
            return False
        expect_changeable(store, priority)
        codec = store.codecs[priority]      # keeps the dictionary until the workspaces are gone
        table_replace(store, priority, None, 0)
        with nogil:
            codec_remove(store.st, prio)
        del codec
        return True
    finally:
        store.end_post()


def count_priorities(Store store not None):
    """Pages by the priority of what compressed them, shared and written-back ones too, but for those in
    units. At 512 pages a microsecond."""
    cdef uint64_t counts[NR_PRIO]
    store.check_range(0, 0)
    with nogil:
        priorities_count(store.st, counts)
    return tuple([counts[i] for i in range(NR_PRIO)])


def count_in_units(Store store not None):
    """Pages in units, dead places too, by the priority of their dictionary; [0] is 0."""
    store.check_range(0, 0)
    return (0, *[load64(&store.st.units.by_prio[i]) for i in range(1, NR_PRIO)])


def cost_of(Store store not None, Codec codec not None):
    """Bytes of memory that an algorithm with a dictionary costs a store: its tables to decompress, a
    workspace in each context, and the dictionary in both halves of note 0."""
    cdef Codec like = codec_of_store(codec)
    cdef codec_ctx_t* ctx
    cdef store_ctx_t* each
    cdef uint64_t count = 0, size
    store.check_range(0, 0)
    ctx = codec_ctx_new(&like.codec, False)
    if ctx == NULL:
        raise MemoryError(f"no memory for a workspace of {codec!r}")
    size = codec_ctx_bytes(ctx)
    codec_ctx_free(ctx)
    with nogil:
        pthread_mutex_lock(&store.st.contexts_lock)
        each = store.st.contexts
        while each != NULL:
            count += 1
            each = each.next
        pthread_mutex_unlock(&store.st.contexts_lock)
    return codec_bytes(&like.codec) + count * size + 2 * len(codec.dictionary or b"")


def class_bytes(Store store not None, size):
    """Bytes of memory that an object of 1 to 4096 bytes takes: those of its size class."""
    store.check_range(0, 0)
    if not 1 <= size <= PAGE:
        raise ValueError(f"an object of 1 to {PAGE} bytes expected, got {size}")
    return class_for(store.st.pool, <uint32_t>size).size


def count_cold(Store store not None, bint marked, age=None, bint in_units=False):
    """Single pages with data of their own. marked: those that are marked idle; age: those that were not used
    for more than so many seconds, None = any. in_units: those in units, too."""
    cdef uint64_t chunk, found = 0, wanted = SLOT_IDLE if marked else 0, none = 0
    cdef uint32_t before
    store.check_range(0, 0)
    before = time_of_age(store.st, age)
    with nogil:
        for chunk in range(chunk_count(store.st)):
            if load32(&store.st.chunks[chunk]) & CHUNK_USED != 0:
                found += cold_in_chunk(
                    store.st, chunk, wanted, in_units, before, &none, CHUNK_SLOTS)
    return found


def find_cold(Store store not None, bint marked, places, age=None, bint in_units=False):
    """Numbers of some of the pages that count_cold() counts: those at these places of the list of all,
    ascending. Where others have changed meanwhile, as many as there are."""
    cdef uint64_t chunk, before = 0, here, slot, nth, wanted = SLOT_IDLE if marked else 0
    cdef store_t* st = store.st
    cdef uint32_t since
    store.check_range(0, 0)
    since = time_of_age(st, age)
    found = []
    left = iter(sorted(places))
    place = next(left, None)
    for chunk in range(chunk_count(st)):
        if place is None:
            break
        if load32(&st.chunks[chunk]) & CHUNK_USED == 0:
            continue
        slot = 0
        with nogil:
            here = cold_in_chunk(st, chunk, wanted, in_units, since, &slot, CHUNK_SLOTS)
        while place is not None and place < before + here:
            nth, slot = place - before, NO_SLOT
            cold_in_chunk(st, chunk, wanted, in_units, since, &slot, nth)
            if slot != NO_SLOT:
                found.append(slot)
            place = next(left, None)
        before += here
    return found
