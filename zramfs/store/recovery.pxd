# SPDX-License-Identifier: Apache-2.0
# No locks: nothing else is at work on the store yet.
"""C interface of recovery: the store in an adopted memory file becomes whole."""
from libc.stdint cimport uint64_t

from zramfs.store.slots cimport store_t

# On a new store_t with its codecs and its backing store, which another process had. reserve_blocks:
# pageblocks of a reserve that is made next. Returns a RecoveryStats. Needs the GIL, and gives it up.
cdef object store_recover(store_t* st, uint64_t reserve_blocks)
