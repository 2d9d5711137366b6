# SPDX-License-Identifier: Apache-2.0
# No locks: nothing else is at work on the store yet.
"""Recovery of a store: what a killed process has left in its memory file is made whole.

A slot says what its page is ([R1] in allocator/layout.h), so that nothing has to be undone or completed. The
passes:
  1. The slot table, where it has memory: locks and marks of post-processing go. Chunks, and the blocks of the
     backing store, are counted.
  2. The pool (allocator/recovery.pyx). It keeps the objects that their slot names, and frees the others.
  3. Only if more slots name an object than there are objects: the slots that name none.
Between the first and the second, unit_recovery.pyx and shared_recovery.pyx rebuild the words of the units and
the cells of shared objects from the slots.
A slot that can't be right costs its page: it is lost, so that reading it is EIO until it is written again.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset

from allocator.layout cimport LOC_NONE
from allocator.prim cimport *
from allocator.recovery cimport pool_recover, pool_recovery_t
from zramfs.store.backing cimport (
    BACK_HUGE, BLOCK, BLOCK_SHIFT, COUNTS, GROUP_SHIFT, GROUP_STALE, STALE, back_extent, back_is_unit,
    back_offset, back_size, backing_add, backing_t,
)
from zramfs.store.shared cimport NO_CELL, SHARED_TAG
from zramfs.store.shared_recovery cimport (
    cell_claim, cell_is_whole, cell_named, cell_unclaim, cells_clear, cells_count, cells_sum,
)
from zramfs.store.slots cimport *
from zramfs.store.unit_recovery cimport (
    object_at, unit_named, units_clear, units_count, units_sum, word_claim,
)
from zramfs.store.units cimport UNIT_TAG

from zramfs.model.stats import RecoveryStats

cdef enum:
    FLAGS = PRIO_MASK << PRIO_SHIFT | SLOT_IDLE | SLOT_INCOMPRESSIBLE
    UNUSED = (1 << LOC_SHIFT) - (SLOT_HALVES << 1)  # bits of a slot in memory


cdef struct recovery_t:
    store_t* st
    uint64_t locks              # slots that were locked
    uint64_t objects            # slots that name an object
    uint64_t lost               # pages


# ---- slots --------------------------------------------------------------------------------------

cdef inline uint64_t lost_slot() noexcept nogil:
    return OBJ << TYPE_SHIFT | LOC_NONE << LOC_SHIFT


cdef bint back_sound(store_t* st, uint64_t v) noexcept nogil:
    """The object of a page that was written back can lie where the slot says."""
    cdef uint32_t size = back_size(v)
    return (st.backing != NULL and size != 0 and (v & BACK_HUGE or size != BLOCK)
            and back_offset(v) + back_extent(size) <= st.backing.nr_blocks << BLOCK_SHIFT)


cdef inline bint priority_sound(store_t* st, uint32_t prio, bint of_unit) noexcept nogil:
    return st.codec[prio].algo != 0 and (not of_unit or st.codec[prio].dictionary != NULL)


cdef bint slot_sound(store_t* st, uint64_t slot, uint64_t v) noexcept nogil:
    """As far as the slot alone tells, without its lock and its mark of post-processing."""
    cdef uint32_t kind = slot_type(v), prio = slot_prio(v)
    if kind == EMPTY:
        return v == 0
    if kind == SAME or kind == SAME_OBJ:
        return v & FLAGS == 0
    if kind == UNIT:
        return v & ~<uint64_t>SLOT_IDLE == UNIT << TYPE_SHIFT
    if kind == SHARED:
        return slot_cell(slot, v) != NO_CELL and st.codec[prio].algo != 0
    if kind == WRITTEN_BACK:
        return (back_sound(st, v) and not v & SLOT_IDLE
                and (prio == 0 or not v & BACK_HUGE and priority_sound(st, prio, back_is_unit(v))))
    return kind == HUGE and prio == 0 or kind == OBJ and (prio == 0 or st.codec[prio].algo != 0)


cdef void slot_recover(recovery_t* job, uint64_t slot) noexcept nogil:
    cdef store_t* st = job.st
    cdef uint64_t v = st.slots[slot], was = v
    cdef uint32_t kind
    job.locks += v & SLOT_LOCK
    v &= ~<uint64_t>(SLOT_LOCK | SLOT_POST)
    kind = slot_type(v)
    if kind != WRITTEN_BACK and kind != SHARED:
        v &= ~<uint64_t>(UNUSED if kind == SAME else UNUSED | SLOT_HALVES)
    if (not slot_sound(st, slot, v) or kind == UNIT and not word_claim(st, slot)
            or kind == SHARED and not cell_claim(st, v >> LOC_SHIFT)):
        v = lost_slot()
        job.lost += 1
    if v != was:
        store64(&st.slots[slot], v)
    kind = slot_type(v)
    if kind == EMPTY:
        return
    st.chunks[slot >> CHUNK_SHIFT] += 1
    st.pages_stored += 1
    st.same_pages += kind == SAME or kind == SAME_OBJ
    st.huge_pages += kind == HUGE
    if kind == WRITTEN_BACK:
        st.written_back += 1
        # Below it lies every object, and a write-back takes new blocks from there on.
        max64(&st.backing.record.high,
              (back_offset(v) + back_extent(back_size(v)) + BLOCK - 1) >> BLOCK_SHIFT)
        backing_add(st.backing, back_offset(v), back_size(v))
    job.objects += has_object(v) and not slot_lost(v)


cdef void chunk_recover(recovery_t* job, uint64_t chunk) noexcept nogil:
    """What lies behind the device's end is nobody's: it is emptied."""
    cdef store_t* st = job.st
    cdef uint64_t slot
    for slot in range(chunk << CHUNK_SHIFT, (chunk + 1) << CHUNK_SHIFT):
        if slot < st.nr_slots:
            slot_recover(job, slot)
        elif st.slots[slot] != 0:
            store64(&st.slots[slot], 0)
    if chunk >= chunk_count(st) or st.chunks[chunk] == 0 and not st.stays_ready:
        fallocate(st.arena.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  <int64_t>(st.arena.sb.user_off + chunk * PAGE), PAGE)


cdef void slots_recover(recovery_t* job) noexcept nogil:
    """A touch of the rest of the table would give it memory."""
    cdef store_t* st = job.st
    cdef int64_t start = <int64_t>st.arena.sb.user_off, end = start + <int64_t>times_off(st)
    cdef int64_t at = start, hole
    while at < end:
        at = lseek(st.arena.fd, at, SEEK_DATA)
        if at < 0 or at >= end:
            break
        hole = min(lseek(st.arena.fd, at, SEEK_HOLE), end)
        if hole <= at:
            break
        while at < hole:
            chunk_recover(job, <uint64_t>(at - start) >> PAGE_SHIFT)
            at += PAGE


# ---- objects ------------------------------------------------------------------------------------

cdef bint object_named(void* ctx, uint64_t tag, uint64_t loc, uint32_t size) noexcept nogil:
    cdef store_t* st = (<recovery_t*>ctx).st
    cdef uint64_t v
    cdef uint32_t kind
    if tag & UNIT_TAG:
        return unit_named(st, tag, loc)
    if tag & SHARED_TAG:
        return cell_named(st, tag, loc, size)
    if tag >= st.nr_slots or st.chunks[tag >> CHUNK_SHIFT] == 0:
        return False
    v = st.slots[tag]
    kind = slot_type(v)
    if not has_object(v) or v >> LOC_SHIFT != loc:
        return False
    if kind == SAME_OBJ:
        return size == sizeof(uint64_t)
    if (size != PAGE) if kind == HUGE else (size == 0 or size > st.max_object):
        return False
    st.compr_bytes += size
    if slot_prio(v) != 0:
        st.recompressed_pages += 1
        st.recompressed_bytes += size
    return True


cdef void lost_mark(recovery_t* job) noexcept nogil:
    """Finds the slots whose object is not there."""
    cdef store_t* st = job.st
    cdef uint64_t chunk, slot, v
    for chunk in range(chunk_count(st)):
        if st.chunks[chunk] == 0:
            continue
        for slot in range(chunk << CHUNK_SHIFT, min((chunk + 1) << CHUNK_SHIFT, st.nr_slots)):
            v = st.slots[slot]
            if has_object(v) and not slot_lost(v) and object_at(st, slot, v >> LOC_SHIFT) == NULL:
                st.same_pages -= slot_type(v) == SAME_OBJ
                st.huge_pages -= slot_type(v) == HUGE
                store64(&st.slots[slot], lost_slot())
                job.lost += 1
            elif slot_type(v) == SHARED and not cell_is_whole(st, v >> LOC_SHIFT):
                store64(&st.slots[slot], lost_slot())
                cell_unclaim(st, v >> LOC_SHIFT)
                job.lost += 1


# ---- the backing store --------------------------------------------------------------------------

cdef void backing_settle(backing_t* b) noexcept nogil:
    """After the slots have counted their objects. A block that was taken and counts nothing may hold data of
    a page that is gone."""
    cdef uint64_t block, group
    cdef uint64_t high = min(b.record.high, b.nr_blocks)
    b.record.high = high
    for block in range(high):
        group = block >> GROUP_SHIFT
        if b.blocks[block] & COUNTS:
            b.groups[group] += 1
            b.used += 1
        else:
            b.groups[group] += GROUP_STALE
            b.stale += 1
        b.blocks[block] |= STALE
    b.cursor = high


# ---- all of it ----------------------------------------------------------------------------------

cdef void recover(recovery_t* job, uint64_t reserve_blocks, pool_recovery_t* pool) noexcept nogil:
    units_clear(job.st)
    cells_clear(job.st)
    slots_recover(job)
    job.objects += units_count(job.st, &job.lost) + cells_count(job.st)
    pool_recover(job.st.pool, object_named, job, reserve_blocks, pool)
    if pool.objects != job.objects:
        lost_mark(job)
    units_sum(job.st, &job.lost)
    cells_sum(job.st)
    if job.st.backing != NULL:
        backing_settle(job.st.backing)
    add64(&job.st.record.recoveries, 1)
    add64(&job.st.record.pages_lost, job.lost)


cdef object store_recover(store_t* st, uint64_t reserve_blocks):
    cdef uint64_t began = now_ns()
    cdef recovery_t job
    cdef pool_recovery_t pool
    memset(&job, 0, sizeof(job))
    job.st = st
    if st.backing != NULL:
        st.backing.record = &st.record.backing
    with nogil:
        recover(&job, reserve_blocks, &pool)
    return RecoveryStats(
        ns=now_ns() - began, pages=st.pages_stored, objects=pool.objects, locks=job.locks, lost=job.lost,
        objects_freed=pool.objects_freed, zspages_freed=pool.zspages_freed,
        zspages_damaged=pool.zspages_damaged, frames_freed=pool.frames_freed,
        pageblocks_freed=pool.pageblocks_freed,
    )
