# SPDX-License-Identifier: Apache-2.0
# Lock order, outermost first: chunk pin (store_t.chunks), slot lock (bit 0 of a slot), the word of a unit
# (units.pxd) or a cell (shared.pxd), then the locks of the pool (allocator/zspage.pxd). A thread holds one
# slot at a time.
"""The slot table: one 64-bit word for each 4 KiB page of the device.

    63                                   24 23  12 11 10 9  8  7   6   5  4 3    1  0
    +---------------------------------------+-----+--+--+--+--+---+---+----+------+----+
    | location (zspage, object index), or   | 0   |A |0 |S |P |inc|idl|prio| type |lock|
    | the word of a same-filled page        |     |  |  |  |  |   |   |    |      |    |
    +---------------------------------------+-----+--+--+--+--+---+---+----+------+----+
    type  EMPTY, SAME (word in the slot), SAME_OBJ (word in an 8-byte object), OBJ (compressed),
          HUGE (raw, one page), WRITTEN_BACK (bits 10 to 63: zramfs/store/backing.pxd), UNIT (compressed
          together with its neighbours, zramfs/store/units.pxd: bits 24 to 63 are 0, since the number of the
          slot says where it is), SHARED (bits 24 to 63: the cell of an object that several slots share, and
          bits 10 to 23 a check of it, zramfs/store/shared.pxd)
    prio  priority of the algorithm that compressed it, 0 = primary. Secondary ones come and go while the
          store is in use, in an order in which each thread can read what a slot names: see
          zramfs/store/secondary.pxd
    idl   idle: not used since it was marked       inc  incompressible by every algorithm
    P     selected for post-processing             S    SAME: the word is two equal 32-bit halves
    A     alone: an OBJ or HUGE page that would save nothing in a unit with its neighbours, as far as was
          tried; recovery forgets it
    EMPTY is all zeros; SAME and SAME_OBJ have neither prio nor idl, inc, P; UNIT has no prio and no inc,
    SHARED no inc.
    A page that is lost, by recovery or with an image, is an OBJ at LOC_NONE without flags: reading it is EIO,
    until it is written or discarded.

Post-processing (recompression, units, sharing, write-back) has two stages. The first selects a page: under
the slot lock it sets P. Every read, write and free of the page clears P. The second does its slow work with
no lock held, takes the slot lock again, and commits only if P is still set, which it clears: then
the page still has the bytes that it had and nobody has asked for them. Its location may be another
one by then, since object compaction moves objects and keeps P; so the location to free is that of
the second look. One post-processing runs at a time in a store (whoever starts it sees to that), and
leaves no P behind.

A write commits with one store into its slot, which also drops the lock: at every instant a slot
names a whole object. The old object is freed after that.

Chunks: 512 slots, one page of the table, 2 MiB of the device. A chunk's word counts the slots in
use (low half) and the threads inside (high half). The slots of a chunk that counts none are never
touched, so an unwritten device costs nothing, and its page of the table goes back to the OS. A write
asks for that page first (chunk_open()), because the OS may refuse it: a touch would be a SIGBUS then.

The number of slots may change while all this goes on (resize.pyx). The tables have address space for
most_slots from the beginning, so nothing moves. A slot beyond the end is EMPTY, and nobody fills it: a write
looks at the size once more after it has pinned the chunk.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from allocator.frames cimport arena_t
from allocator.layout cimport LOC_NONE
from allocator.prim cimport load64, pthread_mutex_t
from allocator.zspage cimport pool_t
from zramfs.store.backing cimport backing_t
from zramfs.codecs.codec cimport codec_ctx_t, codec_t
from zramfs.store.record cimport store_record_t
from zramfs.store.shared cimport NO_CELL, SHARED_TAG, shared_check, shared_t
from zramfs.store.units cimport unit_cache_t, unit_read, units_t

cdef enum:
    PAGE = 4096                 # for the store and the lane; allocator/prim.h has it as PAGE_BYTES
    PAGE_SHIFT = 12
    CHUNK_SHIFT = 9             # slots a chunk, as a power of two
    CHUNK_SLOTS = 512

    SLOT_LOCK = 1
    TYPE_SHIFT = 1
    TYPE_MASK = 7
    EMPTY = 0
    SAME = 1
    SAME_OBJ = 2
    OBJ = 3
    HUGE = 4
    WRITTEN_BACK = 5
    UNIT = 6
    SHARED = 7

    PRIO_SHIFT = 4
    PRIO_MASK = 3
    SLOT_IDLE = 1 << 6
    SLOT_INCOMPRESSIBLE = 1 << 7
    SLOT_POST = 1 << 8
    SLOT_HALVES = 1 << 9
    CHECK_SHIFT = 10            # of a SHARED slot
    SLOT_ALONE = 1 << 11
    LOC_SHIFT = 24
    ATIME_CHUNK = CHUNK_SLOTS * 4   # bytes of access times of a chunk
    UNITS_CHUNK = CHUNK_SLOTS // 16 * 8     # bytes of the words of its units
    CELLS_CHUNK = CHUNK_SLOTS * 8           # and of the cells of shared objects, one for each slot

    NR_PRIO = 4

    # What a slot has to be to be selected for post-processing: all that is named. 0: an object.
    WANT_IDLE = 1
    WANT_HUGE = 2
    WANT_INCOMPRESSIBLE = 4

    CHUNK_USED = 0xffff         # mask of the slots in use, 0 to 512
    CHUNK_PIN = 1 << 16         # one thread inside; up to 2^15 - 1
cdef extern from *:
    """
    #define CHUNK_CLOSING 0x80000000u /* its page of the table is being given back */
    """
    const uint32_t CHUNK_CLOSING


cdef struct save_hook_t:        # of a save under way (save_pages.pxd)
    void* run
    # Called before a locked slot with the value v is replaced or freed. Returns the slot's value at the end,
    # when the slot is locked too: it may have been unlocked, to wait until there is room for what is kept.
    uint64_t (*keep)(void* run, uint64_t slot, uint64_t v) noexcept nogil


cdef struct store_ctx_t         # below

cdef struct store_t:
    # constant
    arena_t* arena
    pool_t* pool
    uint64_t* slots             # slot words: atomic, each guarded by its lock bit
    uint32_t* chunks            # chunk words: atomic
    uint64_t most_slots         # that the device can ever have: the tables have address space for them
    uint32_t max_object         # largest compressed size that is kept; larger pages are huge
    bint stays_ready            # the slot table is resident and stays so, and contexts are made resident
    backing_t* backing          # NULL = none
    units_t units
    shared_t shared
    store_record_t* record      # in the memory file: what outlives the process
    # the algorithms: constant, but for secondary ones that come and go (secondary.pxd)
    codec_t codec[NR_PRIO]      # what new contexts are made for: guarded by contexts_lock
    store_ctx_t* contexts       # all that there are, guarded by contexts_lock
    pthread_mutex_t contexts_lock
    # the size of the device: atomic, changed by one resize at a time (resize.pyx), as record.size is
    uint64_t nr_slots
    # access times (access_times.pxd): seconds since boot, one for each slot, written without a lock
    uint32_t* atime             # atomic: in the memory file, without memory until tracking is switched on
    uint32_t atime_on           # atomic: 0 or 1; record.atime_on says the same
    uint32_t atime_wanted       # atomic: 1 while times are kept or are about to be, so that who opens a chunk
                                # asks for their memory too
    # a save under way (save_pages.pxd)
    uint32_t saving             # atomic: 1 while there is one
    uint32_t keepers            # atomic: threads that may be inside save.keep()
    save_hook_t save            # constant while saving is 1 or a thread is inside
    # statistics: atomic, relaxed
    uint64_t pages_stored
    uint64_t compr_bytes
    uint64_t same_pages
    uint64_t huge_pages
    uint64_t recompressed_pages  # single pages whose priority is not 0
    uint64_t recompressed_bytes  # of their objects, a part of compr_bytes
    uint64_t written_back       # pages on the backing store
    # for the governor of a file system (device/governor.py): set by it, read by every write; atomic, relaxed
    uint32_t overdraft          # pool pages beyond the limit that a compressed page may take
    uint32_t raw_overdraft      # and one that does not compress: less, so that it leaves the others room
    uint32_t slow_overdraft     # beyond which writes are slow, so that the governor comes in time
    uint32_t slow_step          # and twice as slow with so many pages more; 0 = writes are never slow
    uint32_t watched            # 1 while changes are counted
    uint64_t changed            # bytes written and discarded while they are
    uint64_t change_at          # changed at which change_fd is written to, once; 0 = never
    int change_fd               # an eventfd, a duplicate of Store's; -1 = none; constant once it is set


cdef struct store_ctx_t:        # one thread's workspace
    store_t* st
    # Those of the secondary algorithms only decompress; NULL: no slot has that priority (secondary.pxd).
    codec_ctx_t* codec[NR_PRIO]
    uint32_t fetching           # atomic: priority of what it unpacks without its slot's lock, 0 = none
    store_ctx_t* next           # store_t.contexts, guarded by contexts_lock
    store_ctx_t* prev
    uint8_t* page               # a whole page in read-modify-write
    uint8_t* comp               # a compressed page
    uint8_t* scratch            # an object that straddles two frames
    uint8_t* io                 # FETCH_BYTES: blocks of the backing store
    unit_cache_t* units         # what it has unpacked of units
    bint may_wait               # for the backing store; else its pages are -EAGAIN
    uint64_t* steps             # moves on while a long discard does, for who takes it for stuck; NULL: nobody


cdef struct prepared_t:         # how a page is to be stored
    uint32_t type
    uint32_t size               # bytes of the object, 0 = none
    const uint8_t* data         # the object's bytes
    uint64_t word               # of a same-filled page
    uint64_t bits               # what the slot holds besides type and location: a priority
    uint32_t over               # pages that the pool may take beyond its limit for it


# A pinned chunk keeps its page of the table, until chunk_unpin(). True: a slot of it is in use, so that the
# page has its memory and the slots may be touched. False: none is, and all slots count as EMPTY. The last
# thread that leaves a chunk without a slot in use gives its page of the table back to the OS.
cdef bint chunk_pin(store_t* st, uint64_t chunk) noexcept nogil
cdef void chunk_unpin(store_t* st, uint64_t chunk) noexcept nogil
# Asks for the memory of a chunk's access times: 0 or -ENOMEM.
cdef int chunk_populate_times(store_t* st, uint64_t chunk) noexcept nogil
# Pins a chunk whose slots may be touched in any case: 0. -ENOSPC when the OS refuses the page of the table;
# the chunk is not pinned then.
cdef int chunk_open(store_t* st, uint64_t chunk) noexcept nogil

# Whole pages; the caller may touch the chunk's slots. 0 or a negative errno; on an error the slot keeps
# what it held. -EAGAIN, from all but write and free: the page is on the backing store, and the context
# may not wait for that.
cdef int page_read(store_t* st, store_ctx_t* ctx, uint64_t slot, uint8_t* dst) noexcept nogil
cdef int page_write(store_t* st, store_ctx_t* ctx, uint64_t slot, const uint8_t* src) noexcept nogil
# Bytes [start, start + n) of a page: src, or zeros where src is NULL.
cdef int page_update(store_t* st, store_ctx_t* ctx, uint64_t slot, uint32_t start, const uint8_t* src,
                     uint32_t n) noexcept nogil
cdef void page_free(store_t* st, uint64_t slot) noexcept nogil

# For post-processing, and for looks at a page. slot_lock: the value of the slot, without the lock bit.
# slot_unlock: stores a value, which unlocks the slot. Held for a decompression or the copy of one object.
cdef uint64_t slot_lock(store_t* st, uint64_t slot) noexcept nogil
cdef void slot_unlock(store_t* st, uint64_t slot, uint64_t v) noexcept nogil
# The page that the value of a locked slot names, but for UNIT, SHARED and WRITTEN_BACK; no access: flags and
# access time stay. 0 or -EIO.
cdef int page_load(store_t* st, store_ctx_t* ctx, uint64_t v, uint8_t* dst) noexcept nogil
# The page of a slot, in a chunk that is not pinned, and the slot's value; no access. Not that of a page that
# is written back. 0 or -EIO.
cdef int page_peek(store_t* st, store_ctx_t* ctx, uint64_t slot, uint8_t* dst, uint64_t* v) noexcept nogil
# The same for a page on the backing store. The caller has pinned its blocks, or no other thread is at work.
cdef int back_load(store_t* st, store_ctx_t* ctx, uint64_t slot, uint64_t v, uint8_t* dst) noexcept nogil
# The page of a locked slot of type SHARED; the value: see page_load().
cdef int shared_page_load(store_t* st, store_ctx_t* ctx, uint64_t slot, uint64_t v,
                          uint8_t* dst) noexcept nogil
# The page whose object, compressed or raw, lies at p; v: a value with its priority. 0 or -EIO.
cdef int object_unpack(store_ctx_t* ctx, uint64_t v, const uint8_t* p, uint32_t size,
                       uint8_t* dst) noexcept nogil
# Decides how a page is to be stored, and compresses it into ctx.comp. Touches nothing shared. What p.data
# points to is valid as long as page, ctx.comp and p are.
cdef void page_prepare(store_t* st, store_ctx_t* ctx, const uint8_t* page, prepared_t* p) noexcept nogil
# Stores the value new in a locked slot, which unlocks it, and frees what its value old names.
cdef void slot_replace(store_t* st, uint64_t slot, uint64_t old, uint64_t new) noexcept nogil
# Stores a page in a locked slot, frees what its value old names, and unlocks it. On an error (-ENOSPC,
# -EIO) the slot gets the value old.
cdef int commit_locked(store_t* st, uint64_t slot, uint64_t old, const prepared_t* page) noexcept nogil
# Object compaction's hooks, see pool_ops_t. ctx is the store.
cdef bint slot_pin(void* st, uint64_t slot, uint64_t loc) noexcept nogil
cdef void slot_moved(void* st, uint64_t slot, uint64_t loc) noexcept nogil

cdef inline uint64_t slot_count(store_t* st) noexcept nogil:
    """Slots of the device at this moment. A function that goes through them takes the number once."""
    return load64(&st.nr_slots)

cdef inline uint64_t chunks_of(uint64_t nr_slots) noexcept nogil:
    return (nr_slots + CHUNK_SLOTS - 1) >> CHUNK_SHIFT

cdef inline uint64_t chunk_count(store_t* st) noexcept nogil:
    return chunks_of(slot_count(st))

cdef inline uint64_t user_bytes(uint64_t most_slots) noexcept nogil:
    """Slots, access times, words of units, and cells, of a store that grows to so many slots."""
    return chunks_of(most_slots) * (PAGE + ATIME_CHUNK + UNITS_CHUNK + CELLS_CHUNK) + 2 * PAGE

cdef inline uint64_t times_off(store_t* st) noexcept nogil:
    """Where the access times begin in the user region, in bytes."""
    return chunks_of(st.most_slots) << PAGE_SHIFT

cdef inline uint64_t units_off(store_t* st) noexcept nogil:
    """And the words of the units."""
    return (chunks_of(st.most_slots) * (PAGE + ATIME_CHUNK) + PAGE - 1) & ~<uint64_t>(PAGE - 1)

cdef inline uint64_t cells_off(store_t* st) noexcept nogil:
    """And the cells of shared objects."""
    return (units_off(st) + chunks_of(st.most_slots) * UNITS_CHUNK + PAGE - 1) & ~<uint64_t>(PAGE - 1)

cdef inline uint32_t slot_type(uint64_t v) noexcept nogil:
    return <uint32_t>(v >> TYPE_SHIFT) & TYPE_MASK

cdef inline uint32_t slot_prio(uint64_t v) noexcept nogil:
    return <uint32_t>(v >> PRIO_SHIFT) & PRIO_MASK

cdef inline bint slot_lost(uint64_t v) noexcept nogil:
    return v >> LOC_SHIFT == LOC_NONE and slot_type(v) == OBJ

cdef inline bint has_object(uint64_t v) noexcept nogil:
    return slot_type(v) == OBJ or slot_type(v) == HUGE or slot_type(v) == SAME_OBJ

cdef inline uint64_t same_word(uint64_t v) noexcept nogil:
    """Of a SAME slot."""
    cdef uint64_t word = v >> LOC_SHIFT
    return word << 32 | word if v & SLOT_HALVES else word

cdef inline uint64_t shared_slot(uint64_t slot, uint64_t cell, uint32_t prio) noexcept nogil:
    return (cell << LOC_SHIFT | shared_check(slot, cell, prio) << CHECK_SHIFT | prio << PRIO_SHIFT
            | SHARED << TYPE_SHIFT)

cdef inline uint64_t slot_cell(uint64_t slot, uint64_t v) noexcept nogil:
    """Of a SHARED slot; NO_CELL: the value is damaged."""
    cdef uint64_t flags = SLOT_LOCK | SLOT_IDLE | SLOT_POST
    return v >> LOC_SHIFT if v & ~flags == shared_slot(slot, v >> LOC_SHIFT, slot_prio(v)) else NO_CELL

# page_load() for a slot whose page may be in a unit, or shared.
cdef inline int slot_load(store_t* st, store_ctx_t* ctx, uint64_t slot, uint64_t v,
                          uint8_t* dst) noexcept nogil:
    if slot_type(v) == UNIT:
        return unit_read(&st.units, ctx.units, slot, dst)
    if slot_type(v) == SHARED:
        return shared_page_load(st, ctx, slot, v, dst)
    return page_load(st, ctx, v, dst)

cdef inline bint slot_can_idle(uint64_t v) noexcept nogil:
    return (slot_type(v) == OBJ or slot_type(v) == HUGE or slot_type(v) == UNIT or slot_type(v) == SHARED)
