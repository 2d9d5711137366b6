# SPDX-License-Identifier: Apache-2.0
# Locks: see frames.pxd. Every function here takes arena_t.populate_lock or makes a system call, so no
# caller holds arena_t.lock.
"""C interface of memory that is asked for before it is used.

Each function with a result returns 0, or -ENOMEM when the OS refuses; then everything is as it was.
"""
from libc.stdint cimport uint32_t, uint64_t

from allocator.frames cimport arena_t

# The memory of frames [first, first + n) of one pageblock, which the caller has allocated.
cdef int arena_populate_frames(arena_t* a, uint32_t first, uint32_t n) noexcept nogil
# A whole pageblock that stands in no list, and as many zspage descriptors as it has frames.
cdef int arena_populate_pageblock(arena_t* a, uint32_t pb) noexcept nogil
# The descriptors of one pageblock more, if all that have theirs were used already.
cdef int arena_populate_descriptors(arena_t* a) noexcept nogil
# Descriptors [number, number + n) of zspages.
cdef int arena_populate_zspages(arena_t* a, uint32_t number, uint32_t n) noexcept nogil
# Bytes [offset, offset + n) of the user region; -EINVAL outside of it. Its pages are the user's to
# populate before it touches them, also for reading.
cdef int arena_populate_user(arena_t* a, uint64_t offset, uint64_t n) noexcept nogil

# The balloon's frames are holes in the memory file. punch: of a frame whose owner is the balloon. fill: of
# a frame that has left the balloon, and has no owner, before it is freed. With a reserve the frame gets its
# memory at once, otherwise when a frame of its unit is allocated the next time.
cdef void arena_punch_hole(arena_t* a, uint32_t frame) noexcept nogil
cdef void arena_fill_hole(arena_t* a, uint32_t frame) noexcept nogil
