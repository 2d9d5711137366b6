# SPDX-License-Identifier: Apache-2.0
# Lock order: units.pxd. Functions named _locked are given the word of a group that the caller has locked.
"""Units of several pages; see units.pxd and unit.h."""
from libc.errno cimport EIO
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from allocator.prim cimport *
from allocator.zsmalloc cimport zs_free, zs_malloc_over, zs_map, zs_unmap, zs_write
from allocator.zspage cimport class_for
from zramfs.codecs.codec cimport CODEC_ZSTD
from zramfs.codecs.dictionary cimport dictionary_t
from zramfs.codecs.stream cimport unpacker_begin, unpacker_init, unpacker_memory, unpacker_reach

cdef enum:
    WAY = WORD_WAYS << WORD_WAY_SHIFT
    MARKS = WORD_TRIED | WORD_WORN | WAY


# ---- words --------------------------------------------------------------------------------------

cdef uint64_t word_lock(units_t* u, uint64_t group) noexcept nogil:
    """The word, without the lock bit."""
    cdef unsigned int round = 0
    cdef uint64_t w
    while True:
        w = peek64(&u.words[group])
        if not w & WORD_LOCK and cas64(&u.words[group], w, w | WORD_LOCK):
            return w
        relax(round)
        round += 1


cdef inline void word_unlock(units_t* u, uint64_t group, uint64_t w) noexcept nogil:
    store64(&u.words[group], w)


cdef bint unit_pin(units_t* u, uint64_t tag, uint64_t loc) noexcept nogil:
    cdef uint64_t group = tag & UNIT_TAG_GROUP, w
    # A part takes a page of its own. Such objects are not moved one by one.
    if tag != (UNIT_TAG | group) or group >= u.nr_words:
        return False
    w = peek64(&u.words[group])
    # A head that no word names is about to be published, or freed, by another thread.
    return (not w & WORD_LOCK and w != 0 and word_loc(w) == loc
            and cas64(&u.words[group], w, w | WORD_LOCK))


cdef void unit_moved(units_t* u, uint64_t tag, uint64_t loc) noexcept nogil:
    cdef uint64_t group = tag & UNIT_TAG_GROUP
    cdef uint64_t w = peek64(&u.words[group]) & ((1u << WORD_LOC_SHIFT) - 1) & ~<uint64_t>WORD_LOCK
    word_unlock(u, group, w | loc << WORD_LOC_SHIFT)


# ---- objects ------------------------------------------------------------------------------------

cdef const unit_head_t* head_copy_locked(units_t* u, uint64_t w, uint8_t* to, bint whole) noexcept nogil:
    """The head of a unit in `to`, a page; whole: with the rest of its object. NULL: there is none, or it is
    damaged, which is counted."""
    cdef uint32_t size = 0
    cdef const uint8_t* p
    if w == 0:
        return NULL
    p = zs_map(u.pool, word_loc(w), to, &size)
    if p == NULL:
        return NULL
    if p != to:
        memcpy(to, p, size if whole else min(size, <uint32_t>sizeof(unit_head_t)))
    zs_unmap(u.pool, word_loc(w))
    if not head_is_sound(<const unit_head_t*>to, size):
        add64(&u.pool.corrupt, 1)
        return NULL
    return <const unit_head_t*>to


cdef uint32_t unit_cost(units_t* u, uint32_t size) noexcept nogil:
    cdef uint32_t parts = part_count(size)
    return parts * UNIT_PART + class_for(u.pool, head_bytes(size)).size


cdef void objects_free(units_t* u, uint64_t loc, const unit_head_t* head) noexcept nogil:
    """Those of a unit that no word names any more."""
    cdef uint32_t i
    cdef int size
    for i in range(part_count(head.size)):
        size = zs_free(u.pool, head_parts(head)[i])
        if size > 0:
            sub64(&u.nbytes, <uint64_t>size)
    size = zs_free(u.pool, loc)
    if size > 0:
        sub64(&u.nbytes, <uint64_t>size)


cdef inline void members_count(units_t* u, const unit_head_t* head, int sign) noexcept nogil:
    cdef uint64_t more = <uint64_t>(sign * popcount(head.members))
    add64(&u.members, more)
    if head.prio != 0:
        add64(&u.by_prio[head.prio], more)


cdef int unit_store(units_t* u, unit_cache_t* c, uint64_t group, const unit_head_t* like,
                    const uint8_t* stream, uint32_t over, uint64_t* loc) noexcept nogil:
    """In c.scratch the head comes into being."""
    cdef unit_head_t* head = <unit_head_t*>c.scratch
    cdef uint64_t* parts = <uint64_t*>(head + 1)
    cdef uint32_t size = like.size, count = part_count(size), i, n, done = 0
    cdef int r = 0
    for i in range(count):
        n = min(size - done, <uint32_t>UNIT_PART)
        r = zs_malloc_over(u.pool, n, part_tag(group, i), over, &parts[i])
        if r != 0:
            count = i
            break
        zs_write(u.pool, parts[i], stream + done, n)
        done += n
    if r == 0:
        head[0] = like[0]
        head.magic = UNIT_MAGIC
        head.serial = add64(u.serial, 1)
        memcpy(parts + count, stream + done, size - done)
        r = zs_malloc_over(u.pool, head_bytes(size), UNIT_TAG | group, over, loc)
    if r != 0:
        for i in range(count):
            zs_free(u.pool, parts[i])
        return r
    zs_write(u.pool, loc[0], c.scratch, head_bytes(size))
    add64(&u.nbytes, done + head_bytes(size))
    members_count(u, like, 1)
    add64(&u.units, 1)
    return 0


cdef void unit_drop_locked(units_t* u, uint64_t group, uint64_t w, uint64_t next,
                           uint8_t* scratch) noexcept nogil:
    """Frees the unit of the word w, which is 0 where there is none, after it has stored the word `next`. It
    stays locked."""
    cdef const unit_head_t* head = head_copy_locked(u, w, scratch, True)
    store64(&u.words[group], next | WORD_LOCK)
    if w == 0:
        return
    sub64(&u.units, 1)
    if head != NULL:
        members_count(u, head, -1)
        objects_free(u, word_loc(w), head)


cdef void unit_publish(units_t* u, unit_cache_t* c, uint64_t group, uint64_t loc) noexcept nogil:
    cdef uint64_t w = word_lock(u, group)
    cdef uint64_t next = loc << WORD_LOC_SHIFT | w & <uint64_t>WORD_LIVE_MASK << WORD_LIVE_SHIFT | WORD_MAKING
    unit_drop_locked(u, group, w, next, c.scratch)
    word_unlock(u, group, next)


cdef void unit_settle(units_t* u, uint64_t group) noexcept nogil:
    cdef uint8_t scratch[UNIT_PART]
    cdef uint64_t w = word_lock(u, group), next = w & ~<uint64_t>WORD_MAKING
    if word_live(w) == 0:
        next = 0
        unit_drop_locked(u, group, w, next, scratch)
    word_unlock(u, group, next)


cdef void unit_join(units_t* u, uint64_t slot) noexcept nogil:
    cdef uint64_t w = word_lock(u, group_of(slot)) & ~<uint64_t>MARKS
    add64(&u.pages, 1)
    word_unlock(u, group_of(slot), w | <uint64_t>place_bit(slot) << WORD_LIVE_SHIFT)


cdef void unit_leave(units_t* u, uint64_t slot) noexcept nogil:
    cdef uint8_t scratch[UNIT_PART]
    cdef uint64_t w = word_lock(u, group_of(slot))
    cdef uint64_t next = w & ~(<uint64_t>place_bit(slot) << WORD_LIVE_SHIFT | MARKS)
    sub64(&u.pages, 1)
    if word_live(next) == 0 and not w & WORD_MAKING:
        next = 0
        unit_drop_locked(u, group_of(slot), w, next, scratch)
    word_unlock(u, group_of(slot), next)


cdef const unit_head_t* unit_look(units_t* u, unit_cache_t* c, uint64_t group, uint64_t* w) noexcept nogil:
    cdef const unit_head_t* head
    w[0] = word_lock(u, group)
    head = head_copy_locked(u, w[0], c.scratch, False)
    word_unlock(u, group, w[0])
    return head


cdef void unit_mark(units_t* u, uint64_t group, uint32_t live, uint64_t mark) noexcept nogil:
    cdef uint64_t w = word_lock(u, group)
    if w != 0 and word_live(w) == live:
        # A try with less effort says nothing of the last one.
        w = (w & ~<uint64_t>WAY if mark & WAY else w) | mark
    word_unlock(u, group, w)


# ---- reading ------------------------------------------------------------------------------------

cdef unit_cache_t* unit_cache_new(bint ready) noexcept nogil:
    # On whole pages, of which the first has the struct.
    cdef size_t memory = round_up(unpacker_memory(), UNIT_PART)
    cdef size_t nbytes = 2 * UNIT_PART + (UNIT_CACHED + 1) * UNIT_BYTES + memory
    cdef uint8_t* block = <uint8_t*>aligned_alloc(UNIT_PART, nbytes)
    cdef unit_cache_t* c = <unit_cache_t*>block
    cdef int i
    if block == NULL:
        return NULL
    memset(block, 0, UNIT_PART)
    c.scratch = block + UNIT_PART
    c.stream = c.scratch + UNIT_PART
    for i in range(UNIT_CACHED):
        c.entry[i].pages = c.stream + (i + 1) * UNIT_BYTES
    c.memory = c.stream + (UNIT_CACHED + 1) * UNIT_BYTES
    c.unpacking = -1
    if ready:
        make_resident(block, nbytes)
    return c


cdef void unit_cache_free(unit_cache_t* c) noexcept nogil:
    free(c)


cdef int stream_copy_locked(units_t* u, unit_cache_t* c, const unit_head_t* head) noexcept nogil:
    """The stream of a unit to c.stream; head is in c.scratch. 0 or -EIO."""
    cdef uint32_t count = part_count(head.size), i, n, done = 0, size = 0
    cdef const uint8_t* p
    for i in range(count):
        n = min(head.size - done, <uint32_t>UNIT_PART)
        # A part is one frame, so it needs no scratch.
        p = zs_map(u.pool, head_parts(head)[i], c.stream + done, &size)
        if p == NULL:
            return -EIO
        if size == n:
            memcpy(c.stream + done, p, n)
        zs_unmap(u.pool, head_parts(head)[i])
        if size != n:
            add64(&u.pool.corrupt, 1)
            return -EIO
        done += n
    memcpy(c.stream + done, head_parts(head) + count, head.size - done)
    return 0


cdef int entry_find(unit_cache_t* c, uint64_t group, uint64_t serial) noexcept nogil:
    cdef int i
    for i in range(UNIT_CACHED):
        if c.entry[i].serial == serial and c.entry[i].group == group:
            return i
    return -1


cdef int entry_clear(unit_cache_t* c, int i) noexcept nogil:
    cdef int k
    if i < 0:
        i = 0
        for k in range(1, UNIT_CACHED):
            if c.entry[k].used < c.entry[i].used:
                i = k
    c.entry[i].serial = 0
    c.unpacking = -1
    return i


cdef int entry_begin(units_t* u, unit_cache_t* c, int i, uint64_t group, const unit_head_t* head,
                     const uint8_t* stream) noexcept nogil:
    cdef const dictionary_t* dictionary = NULL
    if head.prio != 0:
        if u.codecs[head.prio].algo == CODEC_ZSTD:
            dictionary = u.codecs[head.prio].dictionary
        if dictionary == NULL:
            return -EIO
    if not c.begun:
        c.begun = unpacker_init(&c.unpacker, c.memory, unpacker_memory()) == 0
    if not c.begun:
        return -EIO
    c.entry[i].group, c.entry[i].serial, c.entry[i].filled = group, head.serial, 0
    c.entry[i].members = head.members
    unpacker_begin(&c.unpacker, stream, head.size, c.entry[i].pages, popcount(head.members) * UNIT_PART,
                   dictionary)
    c.unpacking = i
    add64(&u.unpacked, 1)
    return i


cdef bint entry_reaches(const unit_cache_t* c, int i, uint32_t at) noexcept nogil:
    return c.entry[i].filled >= at + UNIT_PART or i == c.unpacking


cdef int entry_read(unit_cache_t* c, int i, uint32_t at, uint8_t* dst) noexcept nogil:
    cdef int r
    if c.entry[i].filled < at + UNIT_PART:
        r = unpacker_reach(&c.unpacker, at + UNIT_PART)
        c.entry[i].filled = c.unpacker.filled
        if r != 0:
            c.entry[i].serial = 0
            c.unpacking = -1
            return r
    c.reads += 1
    c.entry[i].used = c.reads
    memcpy(dst, c.entry[i].pages + at, UNIT_PART)
    return 0


cdef int stream_begin_locked(units_t* u, unit_cache_t* c, uint64_t group, uint64_t w, int i) noexcept nogil:
    """Begins a unit anew: in entry i, or in the oldest if that is -1. The entry, or -EIO."""
    cdef const unit_head_t* head = head_copy_locked(u, w, c.scratch, True)
    i = entry_clear(c, i)
    if head == NULL or stream_copy_locked(u, c, head) != 0:
        return -EIO
    return entry_begin(u, c, i, group, head, c.stream)


cdef uint32_t unit_stream(units_t* u, unit_cache_t* c, uint64_t group, unit_head_t* found) noexcept nogil:
    cdef uint64_t w = word_lock(u, group)
    cdef const unit_head_t* head = head_copy_locked(u, w, c.scratch, True)
    cdef uint32_t size = 0
    c.unpacking = -1
    if head != NULL and stream_copy_locked(u, c, head) == 0:
        size = head.size
        found[0] = head[0]
    word_unlock(u, group, w)
    return size


cdef int unit_read(units_t* u, unit_cache_t* c, uint64_t slot, uint8_t* dst) noexcept nogil:
    cdef uint64_t group = group_of(slot)
    cdef uint32_t at = 0
    cdef int i = -1, r = -EIO
    cdef uint64_t w = word_lock(u, group)
    cdef const unit_head_t* head = head_copy_locked(u, w, c.scratch, False)
    if head != NULL and head.members & place_bit(slot):
        at = <uint32_t>popcount(head.members & (place_bit(slot) - 1)) * UNIT_PART
        i = entry_find(c, group, head.serial)
        if i < 0 or not entry_reaches(c, i, at):
            i = stream_begin_locked(u, c, group, w, i)
        r = 0 if i >= 0 else -EIO
        # Before another thread can replace the unit.
        store32(&c.unpacks, head.prio)
    # What follows is done with the copy of the stream.
    word_unlock(u, group, w)
    if r == 0:
        r = entry_read(c, i, at, dst)
    store32(&c.unpacks, 0)
    return r
