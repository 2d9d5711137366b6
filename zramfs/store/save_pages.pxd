# SPDX-License-Identifier: Apache-2.0
# Lock order: chunk pin, slot lock, saving_t.lock (held for the copy of one object, or for the unpacking of
# one unit), and inside it only the word of the unit, or the cell, and the zspage that is read.
# - used, settled and scanned are atomic. The rest of saving_t belongs to the one thread that drives the save,
#   but for side[active] and units, which lock guards.
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
Then the save has failed: the writer goes on, and no page is kept any more. Recompression, the making of
units, sharing, write-back and compaction move a page and do not change it, so they keep nothing. A page of a
unit is saved as a single page, compressed by the primary algorithm, and a page that shares its object with
that one. Of a page that was written back its blocks are kept from reuse, until the save has read them.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from allocator.prim cimport pthread_mutex_t
from zramfs.store.slots cimport CHUNK_SLOTS, store_ctx_t, store_t
from zramfs.store.units cimport unit_cache_t

cdef enum:
    PART_ENTRIES = 16384        # of a part: 128 KiB of directory
    # And of its data, before the page that goes beyond. A bad sector costs a part.
    PART_BYTES = 256 << 10
    CHUNK_WORDS = CHUNK_SLOTS // 64     # of a chunk in used and settled
    # Of one side. A disk of 100 MiB/s takes it in 80 ms, so a writer waits no longer than that; the slowest
    # save is one of 8 MiB in PATIENCE.
    SIDE_BYTES = 8 << 20
    PATIENCE_NS = 5000000000    # a disk that spins up answers sooner; the keeper of a lane waits 30 s
    PAUSE_US = 500


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
    unit_cache_t* units         # that of the writers
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


# All of its memory is there afterwards, so that no writer waits for a page fault; NULL without memory.
cdef saving_t* saving_new(store_t* st) noexcept nogil
cdef void saving_free(saving_t* run) noexcept nogil
cdef void saving_start(saving_t* run) noexcept nogil
# No thread is in store_t.save.keep() afterwards, and no block of the backing store is pinned.
cdef void saving_end(saving_t* run) noexcept nogil
# For one chunk; the one that was scanned last + 1 is run.scanned.
cdef void chunk_scan(saving_t* run, uint64_t chunk) noexcept nogil
cdef bint chunk_is_used(saving_t* run, uint64_t chunk) noexcept nogil
cdef uint64_t pages_count(saving_t* run) noexcept nogil
# Takes pages until the time is over. True: the part is full, or it is the last one.
cdef bint fill_slice(saving_t* run, uint64_t until) noexcept nogil
cdef bint part_has_room(saving_t* run) noexcept nogil
