# SPDX-License-Identifier: Apache-2.0
# Locks: see save_pages.pxd.
"""The pages of a store at one instant; see save_pages.pxd."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from allocator.prim cimport *
from allocator.zsmalloc cimport zs_map, zs_unmap
from zramfs.codecs.codec cimport codec_compress
from zramfs.store.backing cimport back_is_unit, back_size, backing_fetch, backing_pin, backing_unpin
from zramfs.store.image_entry cimport *
from zramfs.store.shared cimport shared_fetch
from zramfs.store.slots cimport *
from zramfs.store.units cimport unit_cache_free, unit_cache_new, unit_cache_t, unit_read

cdef extern from "<unistd.h>" nogil:
    int usleep(unsigned int us) noexcept


cdef inline bint bit(const uint64_t* bits, uint64_t slot) noexcept nogil:
    return load64(&bits[slot >> 6]) >> (slot & 63) & 1


cdef inline void set_bit(uint64_t* bits, uint64_t slot) noexcept nogil:
    set_bits64(&bits[slot >> 6], <uint64_t>1 << (slot & 63))


# ---- one page -----------------------------------------------------------------------------------

cdef uint64_t page_take(store_t* st, uint64_t slot, uint64_t v, uint8_t* dst, uint8_t* scratch,
                        unit_cache_t* units) noexcept nogil:
    """The entry of a locked slot, and its bytes to dst, which has room for a page. scratch may be dst. A page
    of a unit is raw; page_pack() is to follow."""
    cdef uint32_t kind = slot_type(v), size = 0
    cdef const uint8_t* p
    cdef uint64_t word
    if kind == SAME:
        word = same_word(v)
        memcpy(dst, &word, sizeof(word))
        return image_entry(slot, IMAGE_SAME, 0, sizeof(word))
    if kind == UNIT:
        if unit_read(&st.units, units, slot, dst) != 0:
            return image_entry(slot, IMAGE_LOST, 0, 0)
        return image_entry(slot, IMAGE_RAW, 0, PAGE)
    if kind == WRITTEN_BACK:
        backing_pin(st.backing, v)
        memcpy(dst, &v, sizeof(v))
        return image_entry(slot, IMAGE_BACK, 0, sizeof(v))
    if kind == SHARED:
        size = shared_fetch(&st.shared, slot_cell(slot, v), dst)
        if size == 0:
            return image_entry(slot, IMAGE_LOST, 0, 0)
        return image_entry(slot, IMAGE_RAW if size == PAGE else IMAGE_OBJECT, slot_prio(v), size)
    p = zs_map(st.pool, v >> LOC_SHIFT, scratch, &size)
    if p == NULL:
        return image_entry(slot, IMAGE_LOST, 0, 0)
    if p != dst and size <= PAGE:
        memcpy(dst, p, size)
    zs_unmap(st.pool, v >> LOC_SHIFT)
    if kind == OBJ and 0 < size < PAGE:
        return image_entry(slot, IMAGE_OBJECT, slot_prio(v), size)
    if kind == HUGE and size == PAGE:
        return image_entry(slot, IMAGE_RAW, 0, size)
    if kind == SAME_OBJ and size == sizeof(word):
        return image_entry(slot, IMAGE_SAME, 0, size)
    return image_entry(slot, IMAGE_LOST, 0, 0)


cdef uint64_t page_pack(saving_t* run, uint64_t entry, uint8_t* data) noexcept nogil:
    """Compresses a raw page in its place, if it can be: pages of units can."""
    cdef int n
    if entry_kind(entry) != IMAGE_RAW:
        return entry
    n = codec_compress(run.ctx.codec[0], data, PAGE, run.ctx.comp, <int>run.st.max_object)
    if n <= 0:
        return entry
    memcpy(data, run.ctx.comp, n)
    return image_entry(entry_slot(entry), IMAGE_OBJECT, 0, <uint32_t>n)


cdef uint64_t back_take(saving_t* run, uint64_t slot, uint64_t v, uint8_t* dst) noexcept nogil:
    """The same for a page on the backing store whose blocks page_take() has pinned."""
    cdef const uint8_t* p
    cdef uint32_t size = back_size(v)
    cdef int r
    if back_is_unit(v):
        r = back_load(run.st, run.ctx, slot, v, dst)
        backing_unpin(run.st.backing, v)
        return page_pack(run, image_entry(slot, IMAGE_RAW, 0, PAGE), dst) if r == 0 else (
            image_entry(slot, IMAGE_LOST, 0, 0))
    p = backing_fetch(run.st.backing, slot, v, run.ctx.io)
    if p != NULL:
        memcpy(dst, p, size)
    backing_unpin(run.st.backing, v)
    if p == NULL:
        return image_entry(slot, IMAGE_LOST, 0, 0)
    if size == PAGE:
        return image_entry(slot, IMAGE_RAW, 0, size)
    return image_entry(slot, IMAGE_OBJECT, slot_prio(v), size)


# ---- the writers' part -------------------------------------------------------------------------------

cdef bint side_add(saving_t* run, uint64_t slot, uint64_t v) noexcept nogil:
    """Keeps the page of a locked slot. False: there is no room."""
    cdef side_t* side
    cdef uint64_t entry
    cdef uint8_t* dst
    cdef bint room
    pthread_mutex_lock(&run.lock)
    side = &run.side[run.active]
    room = side.fill + sizeof(entry) + PAGE <= SIDE_BYTES
    if room:
        dst = side.data + side.fill + sizeof(entry)
        entry = page_take(run.st, slot, v, dst, dst, run.units)
        memcpy(side.data + side.fill, &entry, sizeof(entry))
        store64(&side.fill, side.fill + sizeof(entry) + (entry_size(entry) + 7 & ~<uint64_t>7))
        run.kept += 1
    pthread_mutex_unlock(&run.lock)
    return room


cdef bint has_room(saving_t* run) noexcept nogil:
    cdef bint room
    pthread_mutex_lock(&run.lock)
    room = run.side[run.active].fill + sizeof(uint64_t) + PAGE <= SIDE_BYTES
    pthread_mutex_unlock(&run.lock)
    return room


cdef void wait_for_room(saving_t* run) noexcept nogil:
    """With no slot locked. After PATIENCE the save has failed."""
    cdef uint64_t until = now_ns() + PATIENCE_NS
    while not has_room(run) and load32(&run.over) == 0:
        if now_ns() > until:
            store32(&run.failed, 1)
            store32(&run.over, 1)
        usleep(PAUSE_US)


cdef uint64_t keep_before_change(void* pointer, uint64_t slot, uint64_t v) noexcept nogil:
    cdef saving_t* run = <saving_t*>pointer
    cdef bint scanned
    while load32(&run.over) == 0 and slot < run.nr_slots and not bit(run.settled, slot):
        # In this order: the scan marks what is used before it says that it has been there.
        scanned = slot >> CHUNK_SHIFT < load64(&run.scanned)
        if scanned and not bit(run.used, slot):
            break
        if slot_type(v) == EMPTY:
            set_bit(run.settled, slot)
            break
        if side_add(run, slot, v):
            set_bit(run.used, slot)
            set_bit(run.settled, slot)
            break
        slot_unlock(run.st, slot, v)
        wait_for_room(run)
        v = slot_lock(run.st, slot)
    return v


# ---- the scan -----------------------------------------------------------------------------------------

cdef void chunk_scan(saving_t* run, uint64_t chunk) noexcept nogil:
    cdef store_t* st = run.st
    cdef uint64_t slot = chunk << CHUNK_SHIFT, end = min((chunk + 1) << CHUNK_SHIFT, run.nr_slots), v
    # A chunk that counts no slot is skipped: a write that is under way in there comes after the instant.
    if load32(&st.chunks[chunk]) & CHUNK_USED != 0:
        if not chunk_pin(st, chunk):
            slot = end
        while slot < end:
            v = load64(&st.slots[slot])
            if v & SLOT_LOCK:
                # By a write from before the instant, perhaps.
                v = slot_lock(st, slot)
                slot_unlock(st, slot, v)
            # After the value: a writer settles the slot before it stores another value.
            if slot_type(v) != EMPTY and not bit(run.settled, slot):
                set_bit(run.used, slot)
            slot += 1
        chunk_unpin(st, chunk)
    store64(&run.scanned, chunk + 1)


cdef bint chunk_is_used(saving_t* run, uint64_t chunk) noexcept nogil:
    cdef uint64_t i
    for i in range(chunk * CHUNK_WORDS, (chunk + 1) * CHUNK_WORDS):
        if run.used[i] != 0:
            return True
    return False


cdef uint64_t pages_count(saving_t* run) noexcept nogil:
    cdef uint64_t i, n = 0
    for i in range(chunks_of(run.nr_slots) * CHUNK_WORDS):
        n += <uint64_t>__builtin_popcountll(load64(&run.used[i]))
    return n


cdef extern from *:
    int __builtin_popcountll(unsigned long long x) noexcept nogil
    int __builtin_ctzll(unsigned long long x) noexcept nogil


# ---- a part -------------------------------------------------------------------------------------------

cdef bint part_has_room(saving_t* run) noexcept nogil:
    return run.count < PART_ENTRIES and run.bytes < PART_BYTES


cdef void part_add(saving_t* run, uint64_t entry) noexcept nogil:
    """The bytes lie at the end of the part's data already."""
    run.directory[run.count] = entry
    run.count += 1
    run.bytes += entry_size(entry)
    run.taken += 1
    run.lost += entry_kind(entry) == IMAGE_LOST


cdef void slot_sweep(saving_t* run, uint64_t slot) noexcept nogil:
    cdef store_t* st = run.st
    cdef uint8_t* dst = run.data + run.bytes
    cdef uint64_t v, entry = 0
    chunk_pin(st, slot >> CHUNK_SHIFT)
    v = slot_lock(st, slot)
    if not bit(run.settled, slot):
        entry = page_take(st, slot, v, dst, run.ctx.scratch, run.ctx.units)
        set_bit(run.settled, slot)
    slot_unlock(st, slot, v)
    chunk_unpin(st, slot >> CHUNK_SHIFT)
    if entry == 0:
        return
    if entry_kind(entry) == IMAGE_BACK:
        entry = back_take(run, slot, v, dst)
    elif slot_type(v) == UNIT:
        entry = page_pack(run, entry, dst)
    part_add(run, entry)


cdef bint sweep_some(saving_t* run) noexcept nogil:
    """The next page whose turn it is. False: none is left."""
    cdef uint64_t word
    while run.at < run.nr_slots:
        word = (load64(&run.used[run.at >> 6]) & ~load64(&run.settled[run.at >> 6])) >> (run.at & 63)
        if word == 0:
            run.at = (run.at | 63) + 1
            continue
        run.at += <uint64_t>__builtin_ctzll(word)
        slot_sweep(run, run.at)
        run.at += 1
        return True
    return False


cdef bint kept_next(saving_t* run, uint64_t* entry, uint8_t** data) noexcept nogil:
    """The next page that a writer handed over. False: there is none at the moment."""
    cdef side_t* side = &run.side[1 - run.active]
    if run.drained == side.fill:
        run.drained = 0
        pthread_mutex_lock(&run.lock)
        side.fill = 0
        if run.side[run.active].fill != 0:
            run.active = 1 - run.active
        pthread_mutex_unlock(&run.lock)
        side = &run.side[1 - run.active]
        if side.fill == 0:
            return False
    memcpy(entry, side.data + run.drained, sizeof(uint64_t))
    data[0] = side.data + run.drained + sizeof(uint64_t)
    run.drained += sizeof(uint64_t) + (entry_size(entry[0]) + 7 & ~<uint64_t>7)
    return True


cdef bint fill_slice(saving_t* run, uint64_t until) noexcept nogil:
    cdef uint64_t entry, v
    cdef uint8_t* data
    cdef uint8_t* dst
    while part_has_room(run):
        if kept_next(run, &entry, &data):
            dst = run.data + run.bytes
            if entry_kind(entry) == IMAGE_BACK:
                memcpy(&v, data, sizeof(v))
                entry = back_take(run, entry_slot(entry), v, dst)
            else:
                memcpy(dst, data, entry_size(entry))
                entry = page_pack(run, entry, dst)
            part_add(run, entry)
        elif not sweep_some(run) and not kept_next_is_there(run):
            return True
        if run.count & 15 == 0 and now_ns() >= until:
            return not part_has_room(run)
    return True


cdef bint kept_next_is_there(saving_t* run) noexcept nogil:
    """When the sweep has ended, all slots are settled: nothing is added after this look."""
    return load64(&run.side[run.active].fill) != 0


# ---- its life ---------------------------------------------------------------------------------------

cdef void saving_free(saving_t* run) noexcept nogil:
    cdef uint64_t bits = chunks_of(run.nr_slots) * CHUNK_WORDS * 8
    cdef int i
    for i in range(2):
        if run.side[i].data != NULL:
            munmap(run.side[i].data, SIDE_BYTES)
    if run.used != NULL:
        munmap(run.used, bits)
    if run.settled != NULL:
        munmap(run.settled, bits)
    if run.units != NULL:
        unit_cache_free(run.units)
    free(run.directory)
    free(run.data)
    pthread_mutex_destroy(&run.lock)
    free(run)


cdef saving_t* saving_new(store_t* st) noexcept nogil:
    cdef saving_t* run = <saving_t*>calloc(1, sizeof(saving_t))
    cdef uint64_t bits
    cdef int i
    if run == NULL:
        return NULL
    run.st = st
    run.nr_slots = slot_count(st)
    bits = chunks_of(run.nr_slots) * CHUNK_WORDS * 8
    short_mutex_init(&run.lock)
    run.used = <uint64_t*>map_sparse(bits, -1)
    run.settled = <uint64_t*>map_sparse(bits, -1)
    run.directory = <uint64_t*>calloc(PART_ENTRIES, sizeof(uint64_t))
    run.data = <uint8_t*>calloc(1, PART_BYTES + PAGE)
    run.units = unit_cache_new(True)
    for i in range(2):
        run.side[i].data = <uint8_t*>map_sparse(SIDE_BYTES, -1)
    if (run.units == NULL or run.used == NULL or run.settled == NULL or run.directory == NULL
            or run.data == NULL
            or run.side[0].data == NULL or run.side[1].data == NULL
            or try_populate(run.used, bits) != 0 or try_populate(run.settled, bits) != 0
            or try_populate(run.side[0].data, SIDE_BYTES) != 0
            or try_populate(run.side[1].data, SIDE_BYTES) != 0):
        saving_free(run)
        return NULL
    return run


cdef void saving_start(saving_t* run) noexcept nogil:
    run.st.save.run = run
    run.st.save.keep = keep_before_change
    store32(&run.st.saving, 1)


cdef void saving_end(saving_t* run) noexcept nogil:
    cdef unsigned int round = 0
    cdef uint64_t entry, v
    cdef uint8_t* data
    store32(&run.over, 1)
    cas32(&run.st.saving, 1, 0)
    # A change of the word and not only a look: who counts himself after it sees that saving is 0.
    while add32(&run.st.keepers, 0) != 0:
        relax(round)
        round += 1
    while kept_next(run, &entry, &data):
        if entry_kind(entry) == IMAGE_BACK:
            memcpy(&v, data, sizeof(v))
            backing_unpin(run.st.backing, v)
