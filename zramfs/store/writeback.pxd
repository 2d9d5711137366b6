# SPDX-License-Identifier: Apache-2.0
# Lock order: a slot's lock, taken inside the calls of slots.pxd, and never held while the device works.
# A job belongs to one thread at a time, and a store has one at a time.
"""Write-back: from pages in memory to pages on the backing store, in batches.

    selected, largest object first             buffer of the batch            backing store
    +------+------+------+------+     copy     +-------+-------+--- -+ write  +-------+-------+
    | slot | slot | slot | ...  |  --------->  | block | block | par.| -----> | block | block |
    +------+------+------+------+              +-------+-------+-----+        +-------+-------+
                                                 whole blocks only; the part that is begun stays for
                                                 the next batch, and is written at the end

A page is in memory until its last byte is written; only then its slot changes, if nobody has touched it
since it was selected. A write that fails leaves all its pages where they were.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zramfs.store.backing cimport backing_t
from zramfs.store.candidates cimport candidates_t
from zramfs.store.slots cimport store_ctx_t, store_t
from zramfs.store.store cimport Store

cdef struct placed_t:
    uint64_t slot
    uint64_t offset             # in bytes, on the backing store
    uint32_t size               # of the object
    uint64_t sum

cdef struct writeback_t:
    store_t* st
    store_ctx_t* ctx
    candidates_t selected
    uint64_t slot               # taken from there, and not yet looked at
    bint taken                  # slot is valid
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
    uint64_t passed             # touched meanwhile
    uint64_t failed             # that stayed in memory because a write failed
    int error                   # of the last write that failed; negative errno
    bint full                   # there is no room on the device

cdef class WritebackRun:
    cdef Store store            # None once closed
    cdef writeback_t job

    cdef int expect_open(self) except -1
