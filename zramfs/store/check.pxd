# SPDX-License-Identifier: Apache-2.0
"""The sums of allocator/layout.h that hold between the slot table and what its slots name. CheckError says
which does not. At rest only."""
from zramfs.store.backing cimport Backing
from zramfs.store.slots cimport store_ctx_t, store_t

# Level 1: counters and lists of the pool; 2: every slot and its object [S1], and what the slots take of each
# block of the backing store (or None); 3: every page decompresses.
cdef int check_store(store_t* st, store_ctx_t* ctx, Backing backing, int level) except -1
