# SPDX-License-Identifier: Apache-2.0
"""Post-processing of single pages: what recompression and write-back do with a slot (slots.pxd)."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from zramfs.store.slots cimport store_ctx_t, store_t
from zramfs.store.units cimport unit_head_t

cdef enum:
    # Bytes: what a page of a unit counts as when write-back looks for the largest objects. By zstd 3 it takes
    # 590 (text), 800 (memory of processes) or 1230 (file systems).
    UNIT_SHARE = 512

# Bytes of the object of a locked slot; 0 if it is damaged.
cdef uint32_t object_size(store_t* st, store_ctx_t* ctx, uint64_t v) noexcept nogil
# Post-processing, in the steps select, copy, commit; each pins the chunk itself. A slot that is read, written
# or freed after it was selected is not selected any more: the later steps then do nothing.
# Bytes of the object if the slot is as wanted, has an object and was not selected before; else 0. in_unit:
# whether it is a page of a unit, for which the bytes are UNIT_SHARE.
cdef uint32_t slot_select(store_t* st, store_ctx_t* ctx, uint64_t slot, uint32_t want,
                          bint* in_unit) noexcept nogil
cdef void slot_unselect(store_t* st, uint64_t slot) noexcept nogil
# The object of a selected slot to dst (a page): its size in bytes, or 0.
cdef uint32_t slot_copy(store_t* st, store_ctx_t* ctx, uint64_t slot, uint8_t* dst) noexcept nogil
# The stream of a group's unit to ctx.units.stream: its bytes, or 0. which (bit k: slot k of the group): the
# slots that were selected; those that still are. head: of the unit.
cdef uint32_t unit_copy(store_t* st, store_ctx_t* ctx, uint64_t group, uint32_t* which,
                        unit_head_t* head) noexcept nogil
# A selected slot's object lies on the backing store now (place: back_place(); prio: of a unit, else 0: that
# of the slot). False: the slot has changed, and the caller must release the blocks.
cdef bint slot_written_back(store_t* st, uint64_t slot, uint64_t place, uint32_t prio) noexcept nogil
