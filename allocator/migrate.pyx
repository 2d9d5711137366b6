# SPDX-License-Identifier: Apache-2.0
# Locks: see migrate.pxd.
"""The movable-page core: isolate, migrate, put back, and ranges of frames that are emptied for an owner.

An owner registers three calls (page_owner_t). The page is locked in each of them:
  isolate(frame)        True: nothing new will be put into the page. False: not now.
  migrate(new, old)     Moves the content, redirects every reference from old to new, makes new movable and
                        old not. 0; -EAGAIN when the page is busy, after which it is tried again, in at most
                        10 passes; or another error, which ends it for this run. Both pages are locked.
  putback(frame)        The isolated page was not moved: the owner takes it back.
The core marks a page isolated after isolate(), and unmarks it after migrate() or putback(). A page that
its owner has freed in between has no owner but keeps the movable mark. That counts as success, and the
core frees the page. This is the protocol of the kernel's "Support non-lru page migration" of 2016, which
docs/concurrency.md restates.
"""
from libc.errno cimport EAGAIN, EBUSY, EINVAL, ENOMEM
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memset

from allocator.buddy cimport arena_alloc_block, arena_free_block
from allocator.frames cimport arena_t, page_owner_t
from allocator.isolation cimport (
    arena_alloc_inside, arena_claim_range, arena_isolate_pageblock, arena_unisolate_pageblock,
)
from allocator.layout cimport *
from allocator.prim cimport *

cdef enum:
    PASSES = 10             # over the pages that said -EAGAIN, as in the kernel
    # Frames isolated at a time. A page under migration can't take new objects, so that only few are held at
    # once. 32 of them are copied in about 30 us.
    BATCH = 32
    # Ranges that alloc_contig() tries to empty. Each costs a look at all frames in use, 16 bytes each.
    CONTIG_TRIES = 16


# ---- page locks and marks -----------------------------------------------------------------------

cdef bint page_trylock(arena_t* a, uint32_t frame) noexcept nogil:
    """False if it is locked, or not movable (any more)."""
    cdef uint16_t flags = load16(&a.pages[frame].flags)
    return (flags & PG_MOVABLE and not flags & PG_LOCKED
            and cas16(&a.pages[frame].flags, flags, flags | PG_LOCKED))


cdef void page_lock(arena_t* a, uint32_t frame) noexcept nogil:
    """Waits. The page is movable and stays so, because the caller owns it or has isolated it."""
    cdef unsigned int round = 0
    while not page_trylock(a, frame):
        relax(round)
        round += 1


cdef void page_unlock(arena_t* a, uint32_t frame) noexcept nogil:
    clear_bits16(&a.pages[frame].flags, PG_LOCKED)


cdef void set_page_movable(arena_t* a, uint32_t frame, uint8_t owner, uint32_t ref) noexcept nogil:
    store8(&a.pages[frame].owner, owner)
    a.pages[frame].ref = ref
    set_bits16(&a.pages[frame].flags, PG_MOVABLE)


cdef bint clear_page_movable(arena_t* a, uint32_t frame) noexcept nogil:
    store8(&a.pages[frame].owner, OWNER_NONE)
    if load16(&a.pages[frame].flags) & PG_ISOLATED:
        return False
    clear_bits16(&a.pages[frame].flags, PG_MOVABLE)
    return True


cdef bint owner_register(arena_t* a, uint8_t owner, const page_owner_t* ops) noexcept nogil:
    cdef bint vacant
    pthread_mutex_lock(&a.migrate_lock)
    vacant = a.owners[owner].ctx == NULL
    if vacant:
        a.owners[owner] = ops[0]
    pthread_mutex_unlock(&a.migrate_lock)
    return vacant


cdef void owner_unregister(arena_t* a, uint8_t owner) noexcept nogil:
    pthread_mutex_lock(&a.migrate_lock)
    memset(&a.owners[owner], 0, sizeof(page_owner_t))
    pthread_mutex_unlock(&a.migrate_lock)


# ---- isolate, migrate, put back -------------------------------------------------------------------

cdef bint page_isolate(arena_t* a, migrate_stats_t* stats, uint32_t frame) noexcept nogil:
    """Takes a used frame from its owner for a move. Never waits."""
    cdef page_owner_t* owner
    cdef uint8_t number
    cdef bint taken = False
    # The owner may be freeing it: the lock is only tried, and taking it proves that it is movable.
    if not page_trylock(a, frame):
        return False
    number = a.pages[frame].owner
    if not load16(&a.pages[frame].flags) & PG_ISOLATED and number < NR_OWNERS:
        owner = &a.owners[number]
        taken = owner.ctx != NULL and owner.isolate(owner.ctx, frame)
    if taken:
        set_bits16(&a.pages[frame].flags, PG_ISOLATED)
        stats.isolated += 1
    page_unlock(a, frame)
    return taken


cdef void page_drop_locked(arena_t* a, uint32_t frame) noexcept nogil:
    """Ends the isolation of a locked page that has no owner any more, and frees it."""
    clear_bits16(&a.pages[frame].flags, PG_ISOLATED | PG_MOVABLE)
    page_unlock(a, frame)
    arena_free_block(a, frame, 0)


cdef void page_put_back(arena_t* a, migrate_stats_t* stats, uint32_t frame) noexcept nogil:
    cdef page_owner_t* owner
    page_lock(a, frame)
    if a.pages[frame].owner == OWNER_NONE:
        stats.owner_gone += 1
        page_drop_locked(a, frame)
        return
    owner = &a.owners[a.pages[frame].owner]
    owner.putback(owner.ctx, frame)
    clear_bits16(&a.pages[frame].flags, PG_ISOLATED)
    page_unlock(a, frame)
    stats.put_back += 1


cdef int page_move(arena_t* a, migrate_stats_t* stats, uint32_t old, uint32_t* spare) noexcept nogil:
    """0: old is free, and *spare is NONE32 if that frame was used. Otherwise the owner's error, and nothing
    has changed."""
    cdef page_owner_t* owner
    cdef uint32_t new = spare[0]
    cdef int r
    page_lock(a, old)
    if a.pages[old].owner == OWNER_NONE:
        stats.owner_gone += 1
        page_drop_locked(a, old)
        return 0
    owner = &a.owners[a.pages[old].owner]
    # No other thread knows the new page. Its lock keeps a second isolator from taking it between the owner's
    # set_page_movable() and the end of the move.
    set_bits16(&a.pages[new].flags, PG_LOCKED)
    r = owner.migrate(owner.ctx, new, old)
    if r != 0:
        clear_bits16(&a.pages[new].flags, PG_LOCKED)
        page_unlock(a, old)
        return r
    page_drop_locked(a, old)
    page_unlock(a, new)
    spare[0] = NONE32
    stats.migrated += 1
    return 0


cdef uint32_t target_frame(arena_t* a, compact_run_t* run) noexcept nogil:
    """A free frame to move to. With a run it comes from the fullest pageblocks between the scanners, without
    one from anywhere."""
    cdef uint32_t frame
    if run == NULL:
        return arena_alloc_block(a, 0, OWNER_NONE, 0)
    # migrate_pos has moved on past the pageblock that is being emptied.
    while run.free_pos >= run.migrate_pos:
        frame = arena_alloc_inside(a, run.blocks[run.free_pos], &run.cursor)
        if frame != NONE32:
            return frame
        run.free_pos -= 1
        run.cursor = run.blocks[run.free_pos] * PAGEBLOCK_FRAMES
    return NONE32


cdef int migrate_pages(arena_t* a, migrate_stats_t* stats, uint32_t* pages, int n,
                       compact_run_t* run) noexcept nogil:
    """Moves isolated pages, and puts back those that can't be moved. 0, or the cause of the first that
    stayed: -ENOMEM where there was no target, -EBUSY where the owner refused."""
    # A target that was not used serves the next page. If it were given back, it would lie behind the free
    # scanner.
    cdef uint32_t spare = NONE32
    cdef int first = 0, r, i, left, current_pass
    for current_pass in range(PASSES):
        left = 0
        for i in range(n):
            if spare == NONE32:
                spare = target_frame(a, run)
            if spare == NONE32:
                stats.no_target += 1
                first = first if first != 0 else -ENOMEM
                page_put_back(a, stats, pages[i])
                continue
            r = page_move(a, stats, pages[i], &spare)
            if r == -EAGAIN:
                pages[left] = pages[i]
                left += 1
            elif r != 0:
                stats.refused += 1
                first = first if first != 0 else -EBUSY
                page_put_back(a, stats, pages[i])
        n = left
        if n == 0:
            break
        relax(<unsigned int>current_pass + 64)
    for i in range(n):
        stats.again += 1
        first = first if first != 0 else -EBUSY
        page_put_back(a, stats, pages[i])
    if spare != NONE32:
        arena_free_block(a, spare, 0)
    return first


cdef int migrate_range(arena_t* a, migrate_stats_t* stats, uint32_t first, uint32_t n,
                       compact_run_t* run) noexcept nogil:
    cdef uint32_t batch[BATCH]
    cdef uint32_t frame
    cdef uint16_t flags
    cdef int nr = 0, r
    for frame in range(first, first + n):
        stats.scanned += 1
        flags = load16(&a.pages[frame].flags)
        if flags & PG_USED:
            if not page_isolate(a, stats, frame):
                if not load16(&a.pages[frame].flags) & PG_USED:
                    continue    # freed since the look
                stats.busy += 1
                # One page that can't be moved decides for the range: what was isolated goes back unmoved.
                while nr > 0:
                    nr -= 1
                    page_put_back(a, stats, batch[nr])
                return -EBUSY
            batch[nr] = frame
            nr += 1
        if nr == BATCH:
            r = migrate_pages(a, stats, batch, nr, run)
            nr = 0
            if r != 0:
                return r
    return migrate_pages(a, stats, batch, nr, run) if nr != 0 else 0


cdef bint range_is_movable(arena_t* a, uint32_t first, uint32_t n) noexcept nogil:
    """A cheap look without locks, so that no range is begun that can't be emptied."""
    cdef uint32_t frame
    cdef uint16_t flags
    for frame in range(first, first + n):
        flags = load16(&a.pages[frame].flags)
        if flags & PG_USED and not flags & PG_MOVABLE:
            return False
    return True


cdef int isolate_range(arena_t* a, migrate_stats_t* stats, uint32_t first, uint32_t n) noexcept nogil:
    """Isolates the pageblock around a range that may be emptied: 0 or -EBUSY."""
    if not range_is_movable(a, first, n):
        stats.unmovable += 1
        return -EBUSY
    return 0 if arena_isolate_pageblock(a, first // PAGEBLOCK_FRAMES) else -EBUSY


# ---- contiguous allocation --------------------------------------------------------------------------

cdef int alloc_contig_range(arena_t* a, migrate_stats_t* stats, uint32_t first, uint32_t n,
                            uint8_t owner, uint32_t ref) noexcept nogil:
    """Frames [first, first + n) of one pageblock in use. -EINVAL: another range. -EBUSY: something in the
    way can't be moved. -ENOMEM: there is nowhere to move it, or the OS refuses memory. After an error every
    page is whole, at its old or at a new place, outside or inside the range."""
    cdef int r
    if n == 0 or first >= a.nr_frames or first // PAGEBLOCK_FRAMES != (first + n - 1) // PAGEBLOCK_FRAMES:
        return -EINVAL
    pthread_mutex_lock(&a.migrate_lock)
    r = isolate_range(a, stats, first, n)
    if r == 0:
        r = migrate_range(a, stats, first, n, NULL)
        if r == 0:
            r = arena_claim_range(a, first, n, owner, ref)
        # Of a whole pageblock that was claimed nothing is free: it stays in use.
        arena_unisolate_pageblock(a, first // PAGEBLOCK_FRAMES)
    pthread_mutex_unlock(&a.migrate_lock)
    return r


cdef uint32_t next_range(arena_t* a, uint32_t n, uint32_t last, uint32_t* used) noexcept nogil:
    """The aligned range of n frames to try next, or NONE32. Ranges that may be emptied are tried in the order
    of their frames in use (at least one), then of their place; last is the previous one, with *used frames
    in use."""
    cdef uint32_t best = NONE32, least = n + 1, found, frame = 0, i, end
    pthread_mutex_lock(&a.lock)
    end = a.sb.fresh * PAGEBLOCK_FRAMES
    pthread_mutex_unlock(&a.lock)
    while frame < end:
        found = 0
        for i in range(frame, frame + n):
            found += (load16(&a.pages[i].flags) & PG_USED) != 0
        if (found < least and (found > used[0] or (found == used[0] and last < frame))
                and range_is_movable(a, frame, n)):
            least = found
            best = frame
        frame += n
    used[0] = least
    return best


cdef uint32_t alloc_contig(arena_t* a, migrate_stats_t* stats, int order, uint8_t owner,
                           uint32_t ref) noexcept nogil:
    """A block of 2^order frames: a free one, or else one that is emptied for it, beginning with the range
    that has the fewest frames in use. NONE32 if none can be had."""
    cdef uint32_t n = 1u << order, frame = arena_alloc_block(a, order, owner, ref), used = 0
    cdef int _attempt
    if frame != NONE32:
        return frame
    for _attempt in range(CONTIG_TRIES):
        frame = next_range(a, n, frame, &used)
        if frame == NONE32 or alloc_contig_range(a, stats, frame, n, owner, ref) == 0:
            return frame
    return NONE32
