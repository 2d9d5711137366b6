# SPDX-License-Identifier: Apache-2.0
"""C interface of the checks, for users of the allocator that have sums of their own to add."""
from allocator.frames cimport arena_t
from allocator.zspage cimport pool_t

# Raise CheckError, naming the sum that does not hold. Level 1: counters and lists, O(zspages);
# level 2: every frame and every object as well.
cdef int check_arena(arena_t* a, int level) except -1
cdef int check_pool(pool_t* pool, int level) except -1
