# SPDX-License-Identifier: Apache-2.0
# Locks: see frames.pxd.
"""C interface of isolated pageblocks, which serve no allocation while they are emptied."""
from libc.stdint cimport uint8_t, uint32_t

from allocator.frames cimport arena_t

# An isolated pageblock serves no allocation, and is not given back when it becomes whole. isolate: False
# if it is not in use, or is isolated already. unisolate: True if it had become whole and was given back.
cdef bint arena_isolate_pageblock(arena_t* a, uint32_t pb) noexcept nogil
cdef bint arena_unisolate_pageblock(arena_t* a, uint32_t pb) noexcept nogil
# Frames [first, first + n) of one isolated pageblock, if all are free: handed out to an owner. 0, -EBUSY,
# or -ENOMEM when the OS refuses their memory.
cdef int arena_claim_range(arena_t* a, uint32_t first, uint32_t n, uint8_t owner, uint32_t ref) noexcept nogil
# One frame of that pageblock at or after *cursor, which moves on; NONE32 if it has none there.
cdef uint32_t arena_alloc_inside(arena_t* a, uint32_t pb, uint32_t* cursor) noexcept nogil
