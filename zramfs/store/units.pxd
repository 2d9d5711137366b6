# SPDX-License-Identifier: Apache-2.0
# Lock order: the lock of a unit's word (bit 0) stands between the slot lock and the locks of the pool. It is
# held for the copy of a stream (at most 60 KiB), or for the freeing of a unit's objects. Object compaction,
# which holds a class lock, only tries it.
"""Units of several pages: their words, their objects, and the unit that a thread has unpacked last.

unit.h draws them. A slot of type UNIT needs nothing else in it: its number says which group it belongs to,
and the word of the group says where the unit lies.

Who changes what:
  - A slot becomes UNIT, or stops being it, under its own lock. The bit in `live` follows under the word's
    lock, before the slot is unlocked.
  - One thread at a time makes units (Store.begin_post). Between unit_publish() and unit_settle() the word has
    WORD_MAKING, and the unit is not freed. Otherwise the thread that clears the last bit of `live` frees it.
  - The same thread sets WORD_TRIED and WORD_WORN (unit_mark()). Whoever changes `live` clears them.
  - A unit's head names the dictionary that it needs, which stays until none does. A thread may unpack a copy
    of a unit that another thread replaces meanwhile. unit_cache_t.unpacks names the dictionary from before
    the word is unlocked, so the drop of a dictionary looks at by_prio first, and then at all caches.
  - The bytes of a unit never change. So a copy of its stream, and what was unpacked of it, stay right for as
    long as a slot of the group is UNIT and the unit has the same serial number.

Sums that hold at rest (zramfs/store/check.pyx):
    [U1] each word that is not 0 <-> one head and its parts, tagged with the group; live is not 0
    [U2] live = the slots of type UNIT in the group; each of them is a member
    [U3] units, pages, members, bytes and members by dictionary of units_t are the sums over all words
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from allocator.zspage cimport pool_t
from zramfs.codecs.codec cimport codec_t
from zramfs.codecs.stream cimport unpacker_t

cdef extern from "unit.h" nogil:
    enum:
        UNIT_SHIFT_PAGES, UNIT_PAGES, UNIT_MAGIC, UNIT_MAGIC_PLAIN, UNIT_TAG_PART
    const uint64_t UNIT_TAG
    const uint64_t UNIT_TAG_GROUP
    ctypedef struct unit_head_t:
        unsigned short magic
        unsigned short members
        unsigned short size
        unsigned char prio
        signed char level
        uint64_t serial
    const unsigned int BACK_UNIT_MAGIC
    ctypedef struct back_unit_t:
        uint64_t sum
        unsigned short magic
        unsigned short members
        uint32_t size
    int popcount "__builtin_popcount" (unsigned int bits) noexcept

cdef enum:
    WORD_LOCK = 1
    WORD_MAKING = 2
    WORD_TRIED = 4
    WORD_WORN = 8
    WORD_WAY_SHIFT = 4          # units_t.way; 0: TRIED, or nothing, with less effort
    WORD_WAYS = 15
    WORD_LIVE_SHIFT = 8
    WORD_LIVE_MASK = 0xffff
    WORD_LOC_SHIFT = 24
    UNIT_BYTES = 65536          # of the pages of a whole unit
    UNIT_MOST_PARTS = 15
    UNIT_MOST_STREAM = 61440    # a longer one saves less than a page
    UNIT_PART = 4096
    UNIT_PRIOS = 4              # NR_PRIO, which slots.pxd has
    UNIT_CACHED = 4             # units that a thread keeps unpacked: 64 KiB each


cdef struct units_t:
    # constant
    pool_t* pool
    uint64_t* words             # one for each group: atomic, each guarded by its lock bit
    uint64_t nr_words           # that there is address space for
    uint64_t* serial            # in the memory file; atomic
    const codec_t* codecs       # by priority: one that a unit names stays as it is (secondary.pxd)
    # of whoever makes units, one at a time: 1 to WORD_WAYS, the way to make a unit that has taken most effort
    # so far. Another number when the dictionary is another one, or the level is higher than ever with it.
    uint32_t way
    int way_level
    uint64_t way_dictionary     # the number of its generation; 0 = one that was configured, or none
    # members of the units with each dictionary; [0] is not used. Atomic, changed under the word's lock
    uint64_t by_prio[UNIT_PRIOS]
    # statistics: atomic, relaxed
    uint64_t units
    uint64_t pages              # slots of type UNIT
    uint64_t members            # pages in the streams, dead ones too
    uint64_t nbytes             # of the objects
    uint64_t unpacked           # streams that were begun, because no thread's cache had them


cdef struct cached_t:
    uint64_t group
    uint64_t serial             # 0: nothing; of a unit on the backing store: where it lies (back_units.pyx)
    uint64_t reuses             # of the backing store, before that was read
    uint32_t members            # of the unit
    uint64_t used               # when, in reads of this cache
    uint64_t filled             # bytes of pages that are whole
    uint8_t* pages              # UNIT_BYTES


cdef struct unit_cache_t:       # one thread's; made with its context
    bint begun                  # the unpacker is
    unpacker_t unpacker
    int unpacking               # the entry whose stream is in `stream`, and the unpacker at it; -1 = none
    uint64_t reads
    uint32_t unpacks            # atomic: priority of the dictionary with which unit_read() unpacks, 0 = none
    cached_t entry[UNIT_CACHED]
    uint8_t* stream             # UNIT_BYTES
    uint8_t* scratch            # a page
    uint8_t* memory             # of the unpacker


cdef inline uint64_t word_loc(uint64_t w) noexcept nogil:
    return w >> WORD_LOC_SHIFT

cdef inline uint32_t word_live(uint64_t w) noexcept nogil:
    return <uint32_t>(w >> WORD_LIVE_SHIFT) & WORD_LIVE_MASK

cdef inline uint64_t group_of(uint64_t slot) noexcept nogil:
    return slot >> UNIT_SHIFT_PAGES

cdef inline uint32_t place_bit(uint64_t slot) noexcept nogil:
    return 1u << <uint32_t>(slot & (UNIT_PAGES - 1))

# Whole pages of a stream, which are parts, and a last one that the head has no room for.
cdef inline uint32_t part_count(uint32_t size) noexcept nogil:
    cdef uint32_t whole = size // UNIT_PART
    if sizeof(unit_head_t) + 8 * whole + size % UNIT_PART > UNIT_PART:
        whole += 1
    return whole

cdef inline uint32_t head_bytes(uint32_t size) noexcept nogil:
    """Of the object, with the rest of the stream."""
    cdef uint32_t parts = part_count(size)
    cdef uint32_t rest = size - UNIT_PART * parts if size > UNIT_PART * parts else 0
    return <uint32_t>sizeof(unit_head_t) + 8 * parts + rest

cdef inline bint head_is_sound(const unit_head_t* head, uint32_t size) noexcept nogil:
    """size: of the object."""
    return (size >= sizeof(unit_head_t) and (head.magic == UNIT_MAGIC or head.magic == UNIT_MAGIC_PLAIN)
            and head.size <= UNIT_MOST_STREAM and head.prio < UNIT_PRIOS and head_bytes(head.size) == size)

cdef inline const uint64_t* head_parts(const unit_head_t* head) noexcept nogil:
    """Their locations."""
    return <const uint64_t*>(head + 1)

cdef inline uint64_t part_tag(uint64_t group, uint32_t part) noexcept nogil:
    return UNIT_TAG | group | <uint64_t>(part + 1) << UNIT_TAG_PART

# NULL when memory is short. Without a touch of most of it, unless it is to be ready.
cdef unit_cache_t* unit_cache_new(bint ready) noexcept nogil
cdef void unit_cache_free(unit_cache_t* c) noexcept nogil

# The caller holds the slot, whose type is UNIT. 0 or -EIO.
cdef int unit_read(units_t* u, unit_cache_t* c, uint64_t slot, uint8_t* dst) noexcept nogil
# The caller holds the slot, and has just stored another value than UNIT in it, with the lock bit; or is about
# to store UNIT.
cdef void unit_leave(units_t* u, uint64_t slot) noexcept nogil
cdef void unit_join(units_t* u, uint64_t slot) noexcept nogil

# The steps of reading, for units that lie elsewhere (back_units.pyx). The entry of a unit; -1: none.
cdef int entry_find(unit_cache_t* c, uint64_t group, uint64_t serial) noexcept nogil
# Forgets what entry i has (-1: the oldest one), and what is in c.stream. The entry.
cdef int entry_clear(unit_cache_t* c, int i) noexcept nogil
# Begins to unpack a stream in c.stream, which has the priority of head. The entry, or -EIO.
cdef int entry_begin(units_t* u, unit_cache_t* c, int i, uint64_t group, const unit_head_t* head,
                     const uint8_t* stream) noexcept nogil
# Whether the page at the byte `at` of the plain text can be read without a new beginning.
cdef bint entry_reaches(const unit_cache_t* c, int i, uint32_t at) noexcept nogil
# That page: 0 or -EIO.
cdef int entry_read(unit_cache_t* c, int i, uint32_t at, uint8_t* dst) noexcept nogil

# The stream of a unit to c.stream, and its head: its bytes. 0: it is damaged. The caller holds a slot of the
# unit.
cdef uint32_t unit_stream(units_t* u, unit_cache_t* c, uint64_t group, unit_head_t* found) noexcept nogil

# For whoever makes units. The size of the objects' classes, which is what a unit of this stream takes.
cdef uint32_t unit_cost(units_t* u, uint32_t size) noexcept nogil
# The head of a group's unit, in c.scratch; NULL: there is none, or it is damaged. w: the word.
cdef const unit_head_t* unit_look(units_t* u, unit_cache_t* c, uint64_t group, uint64_t* w) noexcept nogil
# Sets WORD_TRIED, with a way or without, or WORD_WORN, if the pages in the unit are still those of `live`.
cdef void unit_mark(units_t* u, uint64_t group, uint32_t live, uint64_t mark) noexcept nogil
# Objects for a stream, which nothing names yet: 0 and *loc of the head, or -ENOSPC, -ENOMEM. like: its
# members, size, priority and level.
cdef int unit_store(units_t* u, unit_cache_t* c, uint64_t group, const unit_head_t* like,
                    const uint8_t* stream, uint32_t over, uint64_t* loc) noexcept nogil
# Makes them the unit of the group. Frees those of the unit before.
cdef void unit_publish(units_t* u, unit_cache_t* c, uint64_t group, uint64_t loc) noexcept nogil
# After all slots have joined. A unit that nobody is in goes.
cdef void unit_settle(units_t* u, uint64_t group) noexcept nogil

# Object compaction's hooks for the head of a unit, as those of slots.pxd.
cdef bint unit_pin(units_t* u, uint64_t tag, uint64_t loc) noexcept nogil
cdef void unit_moved(units_t* u, uint64_t tag, uint64_t loc) noexcept nogil
