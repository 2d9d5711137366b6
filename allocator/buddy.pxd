# SPDX-License-Identifier: Apache-2.0
# Locks: see frames.pxd.
"""C interface of the buddy allocator: blocks of page frames."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from allocator.frames cimport arena_t


# Fills out[0..n) with frames for an owner, or hands out none and returns -ENOMEM. Frames handed out
# have their memory. With a reserve that is empty both functions wait for its thread, up to 0.1 s.
cdef int arena_alloc_frames(arena_t* a, int n, uint8_t owner, uint32_t ref, uint32_t* out) noexcept nogil
cdef void arena_free_frames(arena_t* a, int n, const uint32_t* frames) noexcept nogil
# One block of 2^order neighbouring frames: its first frame, or NONE32.
cdef uint32_t arena_alloc_block(arena_t* a, int order, uint8_t owner, uint32_t ref) noexcept nogil
cdef void arena_free_block(arena_t* a, uint32_t frame, int order) noexcept nogil

# For the thread of the reserve. take: a whole free pageblock that is in no list afterwards, or NONE32;
# from_ready = 1 takes one of the reserve. add_ready puts a resident one into the reserve.
cdef uint32_t arena_take_whole(arena_t* a, bint from_ready) noexcept nogil
cdef void arena_add_ready(arena_t* a, uint32_t pb) noexcept nogil
# Punches a whole free pageblock, which stands in no list, out of the memory file. held: as many bytes
# are counted as returned to the OS.
cdef void arena_punch(arena_t* a, uint32_t pb, uint64_t held) noexcept nogil
# The same of one that has just become free: with a reserve it goes there.
cdef void arena_return_pageblock(arena_t* a, uint32_t pb) noexcept nogil
# For recovery: puts a free block that is in no list into one, merged with its free buddies. NONE32, or the
# number of its pageblock if that is whole and free now, and in no list.
cdef uint32_t block_merge_locked(arena_t* a, uint32_t frame, int order) noexcept nogil
