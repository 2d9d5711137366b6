# SPDX-License-Identifier: Apache-2.0
"""What of a store outlives the process, beside slots and objects: see record.h."""
from libc.stdint cimport uint32_t, uint64_t

from allocator.arena cimport Arena
from allocator.frames cimport arena_t

cdef extern from "record.h" nogil:
    const uint64_t RECORD_MAGIC
    enum:
        RECORD_VERSION, RECORD_OLDEST

    ctypedef struct backing_record_t:
        uint64_t key
        uint64_t high
        uint64_t reads
        uint64_t writes
        uint64_t read_errors
        uint64_t write_errors

    ctypedef struct store_record_t:
        uint64_t magic
        uint32_t version
        uint32_t wipe
        uint64_t size
        uint64_t most_slots
        uint32_t has_backing
        uint32_t atime_on
        uint32_t atime_since
        uint64_t huge_pages_since
        uint64_t failed_reads
        uint64_t failed_writes
        uint64_t notify_free
        uint64_t recoveries
        uint64_t pages_lost
        backing_record_t backing
        uint64_t unit_serial

    uint64_t record_size(const store_record_t* record, uint64_t nr_slots) noexcept
    uint64_t record_slots(const store_record_t* record) noexcept


cdef inline store_record_t* record_of(arena_t* a) noexcept nogil:
    return <store_record_t*>a.sb.user_record


# Note 0: the algorithms that a store has, and their generations (Store.generations), behind a check of them.
cdef bytes codecs_packed(tuple codecs, tuple generations)
# The keyword arguments with which the store in an adopted arena was made. Raises ValueError for one without a
# store, or one of another layout, or one that is damaged, or one whose backing store is None.
cdef dict kept_arguments(Arena arena, object backing)
