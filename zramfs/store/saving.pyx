# SPDX-License-Identifier: Apache-2.0
# Lock order: chunk pin, slot lock, saving_t.lock (held for the copy of one object), and inside it only the
# zspage that is read.
# - Store.saving_run, which the GIL guards: one save at a time.
# - used, settled and scanned are atomic. The rest of saving_t belongs to the one thread that drives the save,
#   but for side[active], which lock guards.
"""The pages of a store as they were at one instant, while it is in use.

The instant is one store of store_t.saving. A thread that replaces or frees a page looks at it under the
slot's lock (slot_lock_to_change()). If it sees 0, it changes the page before the instant. If it sees 1, it
changes the page after that, and hands what the slot named to the save first. One thread, or threads that wait
for each other, see no 0 after a 1. So the changes before the instant are a prefix of all. A request that is
under way at the instant may be split, as by a power cut.

Two bits for each slot decide what is still to do:
    used      the slot had a page at the instant
    settled   nothing is left to do: the page has been taken, or the slot was empty at the instant
Three steps: start() is the instant. scan() looks through the table and marks what is used; after that the
list of pages is final. fill() takes the pages, in parts of about 256 KiB.

What is kept of pages that change before their turn lies in two buffers: writers fill one while the save
empties the other. A writer that finds no room waits with nothing locked but its chunk pin, at most PATIENCE.
Then the save has failed: the writer goes on, and no page is kept any more. Recompression, write-back and
compaction move a page and do not change it, so they keep nothing. Of a page that was written back its blocks
are kept from reuse, until the save has read them.
"""
cimport cython
from libc.errno cimport EBUSY, ENOSPC
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from allocator.prim cimport *
from allocator.zsmalloc cimport zs_map, zs_unmap
from zramfs.store.backing cimport back_size, backing_fetch, backing_pin, backing_unpin
from zramfs.store.image_entry cimport *
from zramfs.store.slots cimport *
from zramfs.store.store cimport Store

cdef enum:
    PART_ENTRIES = 16384        # of a part: 128 KiB of directory
    # And of its data, before the page that goes beyond. A bad sector costs a part.
    PART_BYTES = 256 << 10
    CHUNK_WORDS = CHUNK_SLOTS // 64     # of a chunk in used and settled
    LOOK_SLOTS = 2048           # scanned between two looks at the clock, about 4 us
    # Of one side. A disk of 100 MiB/s takes it in 80 ms, so a writer waits no longer than that; the slowest
    # save is one of 8 MiB in PATIENCE.
    SIDE_BYTES = 8 << 20
    PATIENCE_NS = 5000000000    # a disk that spins up answers sooner; the keeper of a lane waits 30 s
    PAUSE_US = 500

cdef extern from "<unistd.h>" nogil:
    int usleep(unsigned int us) noexcept


cdef struct side_t:
    uint8_t* data               # an entry, its bytes, up to a multiple of 8; and so on
    uint64_t fill


cdef struct saving_t:
    # constant
    store_t* st
    store_ctx_t* ctx
    uint64_t nr_slots           # at the instant
    uint64_t* used              # whole chunks
    uint64_t* settled
    uint64_t scanned            # atomic: chunks below this are scanned
    uint32_t failed             # atomic: a writer had to wait too long
    uint32_t over               # atomic: no page is kept any more
    pthread_mutex_t lock
    side_t side[2]
    uint32_t active             # which of them is being filled; guarded by lock
    uint64_t drained            # bytes of the other one
    uint64_t at                 # slot at which the sweep goes on
    uint64_t* directory         # of the part that is being filled
    uint8_t* data
    uint32_t count
    uint64_t bytes
    # results
    uint64_t pages              # at the instant
    uint64_t taken
    uint64_t kept               # of these, handed over by a writer; guarded by lock
    uint64_t lost               # of these, without their bytes


cdef inline bint bit(const uint64_t* bits, uint64_t slot) noexcept nogil:
    return load64(&bits[slot >> 6]) >> (slot & 63) & 1


cdef inline void set_bit(uint64_t* bits, uint64_t slot) noexcept nogil:
    set_bits64(&bits[slot >> 6], <uint64_t>1 << (slot & 63))


# ---- one page -----------------------------------------------------------------------------------

cdef uint64_t page_take(store_t* st, uint64_t slot, uint64_t v, uint8_t* dst,
                        uint8_t* scratch) noexcept nogil:
    """The entry of a locked slot, and its bytes to dst, which has room for a page. scratch may be dst."""
    cdef uint32_t kind = slot_type(v), size = 0
    cdef const uint8_t* p
    cdef uint64_t word
    if kind == SAME:
        word = same_word(v)
        memcpy(dst, &word, sizeof(word))
        return image_entry(slot, IMAGE_SAME, 0, sizeof(word))
    if kind == WRITTEN_BACK:
        backing_pin(st.backing, v)
        memcpy(dst, &v, sizeof(v))
        return image_entry(slot, IMAGE_BACK, 0, sizeof(v))
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


cdef uint64_t back_take(saving_t* run, uint64_t slot, uint64_t v, uint8_t* dst) noexcept nogil:
    """The same for a page on the backing store whose blocks page_take() has pinned."""
    cdef const uint8_t* p = backing_fetch(run.st.backing, slot, v, run.ctx.io)
    cdef uint32_t size = back_size(v)
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
        entry = page_take(run.st, slot, v, dst, dst)
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

cdef inline bint part_has_room(saving_t* run) noexcept nogil:
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
        entry = page_take(st, slot, v, dst, run.ctx.scratch)
        set_bit(run.settled, slot)
    slot_unlock(st, slot, v)
    chunk_unpin(st, slot >> CHUNK_SHIFT)
    if entry != 0:
        part_add(run, back_take(run, slot, v, dst) if entry_kind(entry) == IMAGE_BACK else entry)


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
    """True: the part is full, or it is the last one."""
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
            part_add(run, entry)
        elif not sweep_some(run) and not kept_next_is_there(run):
            return True
        if run.count & 15 == 0 and now_ns() >= until:
            return not part_has_room(run)
    return True


cdef bint kept_next_is_there(saving_t* run) noexcept nogil:
    """When the sweep has ended, all slots are settled: nothing is added after this look."""
    return load64(&run.side[run.active].fill) != 0


# ---- Python -------------------------------------------------------------------------------------------

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
    free(run.directory)
    free(run.data)
    pthread_mutex_destroy(&run.lock)
    free(run)


cdef saving_t* saving_new(store_t* st) noexcept nogil:
    """All of its memory is there afterwards: no writer waits for a page fault."""
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
    for i in range(2):
        run.side[i].data = <uint8_t*>map_sparse(SIDE_BYTES, -1)
    if (run.used == NULL or run.settled == NULL or run.directory == NULL or run.data == NULL
            or run.side[0].data == NULL or run.side[1].data == NULL
            or try_populate(run.used, bits) != 0 or try_populate(run.settled, bits) != 0
            or try_populate(run.side[0].data, SIDE_BYTES) != 0
            or try_populate(run.side[1].data, SIDE_BYTES) != 0):
        saving_free(run)
        return NULL
    return run


cdef void saving_end(saving_t* run) noexcept nogil:
    """No thread is in keep_before_change() afterwards, and no block is pinned."""
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


# The collector must not take the store away before __dealloc__ has used it.
@cython.no_gc_clear
@cython.final
cdef class SaveRun:
    """One save of a store, in this order: start(), scan() until it answers False, chunks(), then fill() and
    take() until `done`, and in any case finish(), before the store is closed. Each gives the GIL up and may
    be called in another thread than the last one. It takes 2 bits for each page of the device's size and
    17 MiB.

    Raises ValueError for a store with a reserve (swap), OSError(EBUSY) beside another save, MemoryError.
    """
    cdef saving_t* run
    cdef Store store            # None once finished
    cdef bint complete

    def __cinit__(self, Store store not None):
        store.check_range(0, 0)
        if store.st.stays_ready:
            raise ValueError("a device for swap is not saved: its pages belong to programs of this boot")
        if store.saving_run:
            raise OSError(EBUSY, "another save is under way on this device")
        with nogil:
            self.run = saving_new(store.st)
        if self.run == NULL:
            raise MemoryError("no memory for a save: 2 bits for each page of the device and 17 MiB are needed")
        store.saving_run = True
        self.store = store
        self.run.ctx = store.take_ctx()

    def __dealloc__(self):
        self.finish()

    cdef int expect_open(self) except -1:
        if self.store is None:
            raise ValueError("this save is finished")
        self.store.check_range(0, 0)
        if load32(&self.run.failed):
            raise OSError(
                ENOSPC, "pages were overwritten faster than they could be saved, and there was no more room "
                "to keep what they held: save to a faster disk, or while less is written")
        return 0

    def start(self):
        """The instant."""
        cdef store_t* st
        self.expect_open()
        st = self.run.st
        st.save.run = self.run
        st.save.keep = keep_before_change
        store32(&st.saving, 1)

    def scan(self, uint64_t ns):
        """Finds the pages, for about ns nanoseconds. True if there is more to look at."""
        cdef saving_t* run = self.run
        cdef uint64_t until = now_ns() + ns, chunks, chunk
        self.expect_open()
        chunks = chunks_of(run.nr_slots)
        with nogil:
            chunk = run.scanned
            while chunk < chunks:
                chunk_scan(run, chunk)
                chunk += 1
                if chunk % (LOOK_SLOTS // CHUNK_SLOTS) == 0 and now_ns() >= until:
                    break
            if chunk == chunks:
                run.pages = pages_count(run)
        return chunk < chunks

    def chunks(self):
        """Which pages there are, for the image: for each chunk of 512 pages with any, its number and a bit
        for each page."""
        cdef saving_t* run = self.run
        cdef uint64_t chunk
        self.expect_open()
        found = []
        for chunk in range(chunks_of(run.nr_slots)):
            if chunk_is_used(run, chunk):
                found.append((<char*>&chunk)[:8] + (<char*>&run.used[chunk * CHUNK_WORDS])[:8 * CHUNK_WORDS])
        return b"".join(found)

    def fill(self, uint64_t ns):
        """Takes pages for about ns nanoseconds. True: take() has a part, which is the last one if `done`."""
        cdef bint full
        self.expect_open()
        with nogil:
            full = fill_slice(self.run, now_ns() + ns)
        self.expect_open()
        self.complete = full and part_has_room(self.run)
        return full

    def take(self):
        """The part: its directory of 8 bytes a page, and their data."""
        cdef saving_t* run = self.run
        self.expect_open()
        part = (<char*>run.directory)[:run.count * 8], (<char*>run.data)[:run.bytes]
        run.count = 0
        run.bytes = 0
        return part

    def finish(self):
        """Ends it, whatever has happened."""
        store, self.store = self.store, None
        if store is None:
            return
        with nogil:
            saving_end(self.run)
        (<Store>store).put_ctx(self.run.ctx)
        (<Store>store).saving_run = False
        with nogil:
            saving_free(self.run)
        self.run = NULL

    @property
    def done(self):
        return bool(self.complete)

    @property
    def pages(self):
        """There were at the instant; known after scan()."""
        return self.run.pages if self.run != NULL else 0

    @property
    def taken(self):
        return self.run.taken if self.run != NULL else 0

    @property
    def waiting(self):
        """Bytes that writers have handed over, and that are not taken yet."""
        cdef saving_t* run = self.run
        if run == NULL:
            return 0
        return peek64(&run.side[0].fill) + peek64(&run.side[1].fill) - run.drained

    @property
    def kept(self):
        """Of those taken: handed over by writers."""
        return self.run.kept if self.run != NULL else 0

    @property
    def lost(self):
        """Of those taken: could not be read."""
        return self.run.lost if self.run != NULL else 0

    @property
    def disksize(self):
        """Bytes, at the instant."""
        return self.run.nr_slots << PAGE_SHIFT if self.run != NULL else 0
