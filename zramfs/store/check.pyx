# SPDX-License-Identifier: Apache-2.0
# No locks: for a store at rest only.
"""Invariants of a store, executable; see check.pxd."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from allocator.check cimport check_arena, check_pool
from allocator.pool cimport pool_stats
from allocator.prim cimport *
from allocator.zsmalloc cimport zs_map, zs_unmap
from allocator.zspage cimport header_ptr, loc_idx, loc_zspage
from zramfs.store.backing cimport (
    BACK_HUGE, Backing, back_extent, back_offset, back_share, back_size,
)
from zramfs.store.shared cimport *
from zramfs.store.slots cimport *
from zramfs.store.units cimport *

from allocator.check import CheckError

cdef enum:
    OF_PRIO = 5                 # in the sums of check_unit()


cdef int fail_slots(str text) except -1:
    raise CheckError(f"[S1] {text}")


cdef int check_object(store_t* st, uint64_t slot, uint64_t v, uint64_t* bytes) except -1:
    """The object of a slot exists, is allocated and names the slot."""
    cdef uint32_t number = loc_zspage(v >> LOC_SHIFT), idx = loc_idx(v >> LOC_SHIFT)
    cdef uint8_t scratch[PAGE]
    cdef uint32_t size = 0
    cdef uint64_t header
    if zs_map(st.pool, v >> LOC_SHIFT, scratch, &size) == NULL:
        fail_slots(f"slot {slot} names object {idx} of zspage {number}, which does not exist")
    header = header_ptr(
        st.pool, &st.arena.zspages[number], st.pool.by_index[st.arena.zspages[number].class_idx], idx)[0]
    zs_unmap(st.pool, v >> LOC_SHIFT)
    if header >> 16 != slot:
        fail_slots(f"slot {slot} names an object that names slot {header >> 16}")
    if slot_type(v) == HUGE and size != PAGE:
        fail_slots(f"the huge object of slot {slot} has {size} bytes")
    if slot_type(v) != SAME_OBJ:
        bytes[0] += size
    return 0


cdef int fail_units(str text) except -1:
    raise CheckError(text)


cdef uint32_t head_fetch(store_t* st, uint64_t loc, uint8_t* to) noexcept nogil:
    """Its length in bytes; 0: it does not exist."""
    cdef uint32_t size = 0
    cdef const uint8_t* p = zs_map(st.pool, loc, to, &size)
    if p == NULL:
        return 0
    if p != to:
        memcpy(to, p, size)
    zs_unmap(st.pool, loc)
    return size


cdef int check_unit(store_t* st, uint64_t group, uint64_t* sums) except -1:
    """The unit of a group, if it has one. sums: units, pages, members, bytes and objects, and members by
    dictionary, to be added to."""
    cdef uint64_t w = 0, slot, loc, tag
    cdef uint32_t live = 0, k, size = 0
    cdef uint8_t scratch[PAGE]
    cdef uint8_t part[PAGE]
    cdef const unit_head_t* head = <const unit_head_t*>scratch
    for slot in range(group << UNIT_SHIFT_PAGES, min((group + 1) << UNIT_SHIFT_PAGES, slot_count(st))):
        if slot_type(load64(&st.slots[slot])) == UNIT:
            live |= place_bit(slot)
    # A word that was never written has no memory, and gets it by a look.
    if live != 0 or st.record.unit_serial != 0:
        w = load64(&st.units.words[group])
    if live != word_live(w) or w & (WORD_LOCK | WORD_MAKING) or (w != 0) != (live != 0):
        fail_units(f"[U2] the slots {live:#x} of group {group} are in a unit, and its word is {w:#x}")
    if w == 0:
        return 0
    size = head_fetch(st, word_loc(w), scratch)
    if not head_is_sound(head, size) or live & ~<uint32_t>head.members:
        fail_units(f"[U2] group {group} has a unit of {size} bytes with members {head.members:#x}, not "
                   f"{live:#x}")
    sums[0] += 1
    sums[1] += popcount(live)
    sums[2] += popcount(head.members)
    sums[3] += size
    sums[4] += 1 + part_count(head.size)
    sums[OF_PRIO + head.prio] += popcount(head.members)
    if head.prio and st.codec[head.prio].dictionary == NULL:
        fail_units(f"[U2] the unit of group {group} has no dictionary at priority {head.prio}")
    for k in range(1 + part_count(head.size)):
        loc = word_loc(w) if k == 0 else head_parts(head)[k - 1]
        tag = UNIT_TAG | group if k == 0 else part_tag(group, k - 1)
        if zs_map(st.pool, loc, part, &size) == NULL:
            fail_units(f"[U1] part {k} of the unit of group {group} does not exist")
        zs_unmap(st.pool, loc)
        sums[3] += size if k else 0
        if object_tag(st, loc) != tag:
            fail_units(f"[U1] object {k} of the unit of group {group} names {object_tag(st, loc):#x}")
    return 0


cdef uint64_t object_tag(store_t* st, uint64_t loc) noexcept nogil:
    cdef uint32_t number = loc_zspage(loc)
    cdef uint32_t kind = st.arena.zspages[number].class_idx
    return header_ptr(st.pool, &st.arena.zspages[number], st.pool.by_index[kind], loc_idx(loc))[0] >> 16


cdef uint64_t check_units(store_t* st) except? 0:
    """The objects of all units."""
    cdef uint64_t sums[OF_PRIO + UNIT_PRIOS]
    cdef uint64_t chunk, group, groups = CHUNK_SLOTS // UNIT_PAGES
    memset(sums, 0, sizeof(sums))
    for chunk in range(chunk_count(st)):
        if load32(&st.chunks[chunk]) != 0:
            for group in range(chunk * groups, (chunk + 1) * groups):
                check_unit(st, group, sums)
    for name, found, counted in (
        ("units", sums[0], st.units.units), ("pages in units", sums[1], st.units.pages),
        ("places in units", sums[2], st.units.members), ("bytes in units", sums[3], st.units.nbytes),
        *[(f"members by dictionary {i}", sums[OF_PRIO + i], st.units.by_prio[i])
          for i in range(1, UNIT_PRIOS)],
    ):
        if found != counted:
            fail_units(f"[U3] {found} {name} found, {counted} counted")
    return sums[4]


cdef int check_cell(store_t* st, uint64_t cell, uint32_t users, uint64_t* sums) except -1:
    """sums: objects, pages and bytes, to be added to."""
    cdef uint64_t w = load64(&st.shared.cells[cell])
    cdef uint8_t scratch[PAGE]
    cdef uint32_t size = 0
    if w == 0 and users == 0:
        return 0
    if cell_users(w) != users or users == 0 or w & CELL_LOCK or not w & CELL_USED:
        fail_units(f"[H2] {users} slots share cell {cell}, whose word is {w:#x}")
    if zs_map(st.pool, cell_loc(w), scratch, &size) == NULL:
        fail_units(f"[H1] the object of cell {cell} does not exist")
    zs_unmap(st.pool, cell_loc(w))
    if object_tag(st, cell_loc(w)) != SHARED_TAG | cell:
        fail_units(f"[H1] cell {cell} names an object that names {object_tag(st, cell_loc(w)):#x}")
    sums[0] += 1
    sums[1] += users
    sums[2] += size
    return 0


cdef void users_count(store_t* st, uint32_t* users) noexcept nogil:
    """Of the cells that were ever used."""
    cdef uint64_t chunk, slot, v
    for chunk in range(chunk_count(st)):
        if load32(&st.chunks[chunk]) == 0:
            continue
        for slot in range(chunk << CHUNK_SHIFT, min((chunk + 1) << CHUNK_SHIFT, slot_count(st))):
            v = load64(&st.slots[slot])
            if slot_type(v) == SHARED and v >> LOC_SHIFT < st.shared.high:
                users[v >> LOC_SHIFT] += 1


cdef uint64_t check_shared(store_t* st) except? 0:
    """The objects of all cells. A slot that names another cell is missed in the sum of pages."""
    cdef uint64_t nbytes = st.shared.high * sizeof(uint32_t), cell
    cdef uint64_t sums[3]
    cdef uint32_t* users = NULL
    memset(sums, 0, sizeof(sums))
    if nbytes != 0:
        users = <uint32_t*>map_sparse(nbytes, -1)
        if users == NULL:
            raise MemoryError(f"no memory to count the users of {st.shared.high} cells")
        try:
            users_count(st, users)
            # Not the rest: a cell that was never used has no memory, and gets it by a look.
            for cell in range(st.shared.high):
                check_cell(st, cell, users[cell], sums)
        finally:
            munmap(users, nbytes)
    for name, found, counted in (
        ("shared objects", sums[0], st.shared.objects), ("pages that share", sums[1], st.shared.pages),
        ("bytes of shared objects", sums[2], st.shared.nbytes),
    ):
        if found != counted:
            fail_units(f"[H3] {found} {name} found, {counted} counted")
    return sums[0]


cdef int check_slots(store_t* st, store_ctx_t* ctx, int level) except -1:
    """Long: one walk over the slots, for sums that belong together."""
    cdef uint64_t chunk, slot, v, flags, before, stored = 0, same = 0, huge = 0, nbytes = 0, objects = 0
    cdef uint64_t recompressed = 0, recompressed_bytes = 0
    cdef uint32_t used
    for chunk in range(chunk_count(st)):
        if load32(&st.chunks[chunk]) == 0:
            continue
        used = 0
        for slot in range(chunk << CHUNK_SHIFT, min((chunk + 1) << CHUNK_SHIFT, slot_count(st))):
            v = load64(&st.slots[slot])
            if v & SLOT_LOCK:
                fail_slots(f"slot {slot} is locked in a store at rest")
            if slot_type(v) == EMPTY:
                if v != 0:
                    fail_slots(f"slot {slot} is empty and holds {v:#x}")
                continue
            used += 1
            same += slot_type(v) == SAME or slot_type(v) == SAME_OBJ
            huge += slot_type(v) == HUGE
            if slot_lost(v):
                continue
            if has_object(v):
                objects += 1
                before = nbytes
                check_object(st, slot, v, &nbytes)
                if slot_prio(v) != 0:
                    recompressed += 1
                    recompressed_bytes += nbytes - before
            if slot_type(v) == SHARED and (slot_cell(slot, v) == NO_CELL or v & SLOT_POST):
                fail_slots(f"slot {slot} shares an object and holds {v:#x}")
            flags = v & (<uint64_t>PRIO_MASK << PRIO_SHIFT | SLOT_IDLE | SLOT_INCOMPRESSIBLE | SLOT_POST)
            if slot_type(v) == UNIT and v & ~<uint64_t>SLOT_IDLE != UNIT << TYPE_SHIFT:
                fail_slots(f"slot {slot} of a unit holds {v:#x}")
            if (flags & SLOT_POST or flags and (slot_type(v) == SAME or slot_type(v) == SAME_OBJ)
                    or flags & SLOT_IDLE and slot_type(v) == WRITTEN_BACK):
                fail_slots(f"slot {slot} of type {slot_type(v)} has the flags {flags:#x}")
            compressed = (slot_type(v) == OBJ or slot_type(v) == SHARED
                          or slot_type(v) == WRITTEN_BACK and not v & BACK_HUGE)
            if ctx.codec[slot_prio(v)] == NULL or slot_prio(v) and not compressed:
                fail_slots(f"slot {slot} of type {slot_type(v)} has the priority {slot_prio(v)}")
            if level >= 3 and slot_type(v) != WRITTEN_BACK and slot_load(st, ctx, slot, v, ctx.page) != 0:
                fail_slots(f"the page of slot {slot} can't be decompressed")
            if level >= 3 and slot_type(v) == WRITTEN_BACK and back_load(st, ctx, slot, v, ctx.page) != 0:
                fail_slots(f"the page of slot {slot} can't be read from the backing store")
        if used != load32(&st.chunks[chunk]):
            fail_slots(f"chunk {chunk} has {used} slots in use and says {load32(&st.chunks[chunk]):#x}")
        stored += used
    objects += check_units(st) + check_shared(st)
    for name, found, counted in (
        ("pages stored", stored, st.pages_stored), ("same-filled pages", same, st.same_pages),
        ("huge pages", huge, st.huge_pages), ("compressed bytes", nbytes, st.compr_bytes),
        ("recompressed pages", recompressed, st.recompressed_pages),
        ("bytes of recompressed pages", recompressed_bytes, st.recompressed_bytes),
        ("objects", objects, pool_stats(st.pool).objects),
    ):
        if found != counted:
            fail_slots(f"{found} {name} in the slot table, {counted} counted")
    return 0


cdef int check_store(store_t* st, store_ctx_t* ctx, Backing backing, int level) except -1:
    check_arena(st.arena, level)
    check_pool(st.pool, level)
    if level >= 2:
        check_slots(st, ctx, level)
        if backing is not None:
            check_backing(st, backing)
    return 0


cdef int check_backing(store_t* st, Backing backing) except -1:
    cdef uint64_t nbytes = st.backing.nr_blocks * sizeof(uint32_t), slot, v, found = 0, offset, block, last
    cdef uint32_t* live = <uint32_t*>map_sparse(nbytes, -1)
    if live == NULL:
        raise MemoryError(f"no memory to count {st.backing.nr_blocks} blocks")
    try:
        for slot in range(slot_count(st)):
            if load32(&st.chunks[slot >> CHUNK_SHIFT]) == 0:
                continue
            v = load64(&st.slots[slot])
            if slot_type(v) != WRITTEN_BACK:
                continue
            found += 1
            offset = back_offset(v)
            block, last = offset >> PAGE_SHIFT, (offset + back_extent(back_size(v)) - 1) >> PAGE_SHIFT
            if last >= st.backing.nr_blocks:
                fail_slots(f"slot {slot} lies at {offset} of the backing store, which is shorter")
            while block <= last:
                live[block] += back_share(offset, back_size(v), block)
                block += 1
        if found != st.written_back:
            fail_slots(f"{found} pages written back in the slot table, {st.written_back} counted")
        backing.check(live)
    finally:
        munmap(live, nbytes)
    return 0
