# SPDX-License-Identifier: Apache-2.0
"""Post-processing of single pages: what recompression and write-back do with a slot (slots.pxd)."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zramfs.store.slots cimport store_ctx_t, store_t

# Bytes of the object of a locked slot; 0 if it is damaged.
cdef uint32_t object_size(store_t* st, store_ctx_t* ctx, uint64_t v) noexcept nogil
# Post-processing, in the steps select, copy, commit; each pins the chunk itself. A slot that is read,
# written or freed after it was selected is not selected any more: the later steps then do nothing.
# Bytes of the object if the slot is as wanted, has an object and was not selected before; else 0.
cdef uint32_t slot_select(store_t* st, store_ctx_t* ctx, uint64_t slot, uint32_t want) noexcept nogil
cdef void slot_unselect(store_t* st, uint64_t slot) noexcept nogil
# The object of a selected slot to dst (a page): its size in bytes, or 0.
cdef uint32_t slot_copy(store_t* st, store_ctx_t* ctx, uint64_t slot, uint8_t* dst) noexcept nogil
# A selected slot's object lies on the backing store now (place: back_place()). False: the slot has changed,
# and the caller must release the blocks.
cdef bint slot_written_back(store_t* st, uint64_t slot, uint64_t place) noexcept nogil
