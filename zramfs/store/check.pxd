# SPDX-License-Identifier: Apache-2.0
"""The sums of allocator/layout.h that hold between the slot table and what its slots name. CheckError says
which does not. At rest only."""
from zramfs.store.backing cimport Backing
from zramfs.store.slots cimport store_ctx_t, store_t

# [S1]: every slot and its object; level 3: every page decompresses.
cdef int check_slots(store_t* st, store_ctx_t* ctx, int level) except -1
# What the slots take of each block is what the backing store counts.
cdef int check_backing(store_t* st, Backing backing) except -1
