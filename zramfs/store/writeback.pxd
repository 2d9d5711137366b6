# SPDX-License-Identifier: Apache-2.0
# Lock order: a slot's lock, taken inside the calls of slots.pxd, and never held while the device works.
# A run belongs to one thread at a time, and a store has one at a time.
"""Write-back: from pages in memory to pages on the backing store, in batches.

    selected, largest object first             buffer of the batch            backing store
    +------+------+------+------+     copy     +-------+-------+--- -+ write  +-------+-------+
    | slot | slot | slot | ...  |  --------->  | block | block | par.| -----> | block | block |
    +------+------+------+------+              +-------+-------+-----+        +-------+-------+
                                                 whole blocks only; the part that is begun stays for
                                                 the next batch, and is written at the end

A unit (units.pxd) goes as a whole, as it is, if more than half of the pages in it were selected: its stream
becomes an object, and its pages change their slots one after the other. The blocks lie behind each other.
Where the device has no such place, or the batch is too small, the pages go as single ones, each compressed by
itself.

A page stays in memory until its last byte is written. Only then does its slot change, if no thread has
used the page since it was selected. A write that fails leaves all its pages where they were.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zramfs.store.backing cimport backing_t
from zramfs.store.candidates cimport candidates_t
from zramfs.store.slots cimport store_ctx_t, store_t
from zramfs.store.store cimport Store

cdef struct placed_t:
    uint64_t slot               # or the first one of the group of a unit
    uint32_t which              # of a unit: bit k: the page of slot k goes; else 1
    uint64_t offset             # in bytes, on the backing store
    uint32_t size               # of the object, see back_size()
    uint32_t prio               # of a unit; of a page 0, as its slot has it
    uint64_t sum                # of a page

cdef struct writeback_t:
    store_t* st
    store_ctx_t* ctx
    candidates_t selected       # numbers of slots; of a unit: of its group's first one, with `which` above it
    uint64_t slot               # taken from there, and not yet looked at
    uint32_t which              # pages of a unit that are left; 0: it is a page by itself
    bint singly                 # they go as single pages
    bint taken                  # slot is valid
    uint64_t unit               # select() has seen pages of this group's unit,
    uint32_t seen               # and selected these of them
    bint no_run                 # the device has no room for a unit as a whole
    # the batch: blocks that lie behind each other, pinned
    uint8_t* data               # batch blocks
    uint32_t batch              # at least 2: an object may straddle two
    uint32_t blocks             # taken
    uint32_t fill               # bytes used in them
    uint64_t first              # the number of the first
    placed_t* placed            # objects in the batch, not yet committed
    uint32_t nr_placed
    uint64_t allowed            # blocks that may still be written
    # results
    uint64_t pages              # written back
    uint64_t units              # as wholes
    uint64_t passed             # touched meanwhile
    uint64_t failed             # that stayed in memory because a write failed
    int error                   # of the last write that failed; negative errno
    bint full                   # there is no room on the device

cdef class WritebackRun:
    cdef Store store            # None once closed
    cdef writeback_t job

    cdef int expect_open(self) except -1
