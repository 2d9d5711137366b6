# SPDX-License-Identifier: Apache-2.0
# Lock order: see migrate.pxd.
"""The movable-page core: isolate, migrate, put back, and the compaction run over the arena.

An owner registers three calls (page_owner_t). The page is locked in each:
  isolate(frame)        True: nothing new will be put into the page. False: not now.
  migrate(new, old)     Move the content, redirect all who point at old, make new movable and old
                        not. 0, -EAGAIN (busy: tried again, at most 10 passes), or another error
                        (given up for this run). Both pages are locked.
  putback(frame)        The isolated page was not moved: take it back.
The core marks a page isolated after isolate(), and unmarks it after migrate() or putback(). A page
whose owner has freed it meanwhile has lost its owner but keeps the movable mark: that counts as
success, and the core frees it. After the "Support non-lru page migration" series of 2016, whose
protocol docs/concurrency.md restates.
"""
from libc.errno cimport EAGAIN, EBUSY, EINVAL, ENOMEM
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from allocator.arena cimport (
    Arena, arena_alloc_block, arena_alloc_inside, arena_claim_range, arena_free_block,
    arena_isolate_pageblock, arena_t, arena_unisolate_pageblock, page_owner_t,
)
from allocator.layout cimport *
from allocator.prim cimport *

from allocator.stats import CompactionStats, PageblockStats

cdef enum:
    PASSES = 10             # over the pages that said -EAGAIN, as in the kernel
    MAX_DEFER = 64          # runs that a failing pageblock is passed by, at most
    # Frames isolated at a time: a page under migration can't take new objects, so few are held at
    # once; 32 of them are copied in about 30 us.
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
    """Waits. The page is movable and stays so: the caller owns it or has isolated it."""
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

cdef bint isolate_page(arena_t* a, migrate_stats_t* stats, uint32_t frame) noexcept nogil:
    """Takes a used frame out of its owner's hands for a move. Never waits."""
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


cdef void drop_locked(arena_t* a, uint32_t frame) noexcept nogil:
    """Ends the isolation of a locked page that nobody owns any more, and frees it."""
    clear_bits16(&a.pages[frame].flags, PG_ISOLATED | PG_MOVABLE)
    page_unlock(a, frame)
    arena_free_block(a, frame, 0)


cdef void put_back(arena_t* a, migrate_stats_t* stats, uint32_t frame) noexcept nogil:
    cdef page_owner_t* owner
    page_lock(a, frame)
    if a.pages[frame].owner == OWNER_NONE:
        stats.owner_gone += 1
        drop_locked(a, frame)
        return
    owner = &a.owners[a.pages[frame].owner]
    owner.putback(owner.ctx, frame)
    clear_bits16(&a.pages[frame].flags, PG_ISOLATED)
    page_unlock(a, frame)
    stats.put_back += 1


cdef int move_page(arena_t* a, migrate_stats_t* stats, uint32_t old, uint32_t* spare) noexcept nogil:
    """0: old is free, and *spare is NONE32 if that frame was used. Else the owner's word, and nothing
    has changed."""
    cdef page_owner_t* owner
    cdef uint32_t new = spare[0]
    cdef int r
    page_lock(a, old)
    if a.pages[old].owner == OWNER_NONE:
        stats.owner_gone += 1
        drop_locked(a, old)
        return 0
    owner = &a.owners[a.pages[old].owner]
    # Nobody else knows the new page: its lock is there so that no second isolator can take it
    # between the owner's set_page_movable() and the end of the move.
    set_bits16(&a.pages[new].flags, PG_LOCKED)
    r = owner.migrate(owner.ctx, new, old)
    if r != 0:
        clear_bits16(&a.pages[new].flags, PG_LOCKED)
        page_unlock(a, old)
        return r
    drop_locked(a, old)
    page_unlock(a, new)
    spare[0] = NONE32
    stats.migrated += 1
    return 0


cdef uint32_t target_frame(arena_t* a, compact_run_t* run) noexcept nogil:
    """A free frame to move to: with a run, from the fullest pageblocks that the scanners have left
    between them; without, any."""
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
    """Moves isolated pages; those that can't be moved are put back, and the first cause returned:
    -ENOMEM without a target, -EBUSY where the owner would not."""
    # A target that was not used serves the next page: given back, it would be behind the free scanner.
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
                put_back(a, stats, pages[i])
                continue
            r = move_page(a, stats, pages[i], &spare)
            if r == -EAGAIN:
                pages[left] = pages[i]
                left += 1
            elif r != 0:
                stats.refused += 1
                first = first if first != 0 else -EBUSY
                put_back(a, stats, pages[i])
        n = left
        if n == 0:
            break
        relax(<unsigned int>current_pass + 64)
    for i in range(n):
        stats.again += 1
        first = first if first != 0 else -EBUSY
        put_back(a, stats, pages[i])
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
            if not isolate_page(a, stats, frame):
                if not load16(&a.pages[frame].flags) & PG_USED:
                    continue    # freed since the look
                stats.busy += 1
                # One that can't be moved decides for all: what was isolated goes back unmoved.
                while nr > 0:
                    nr -= 1
                    put_back(a, stats, batch[nr])
                return -EBUSY
            batch[nr] = frame
            nr += 1
        if nr == BATCH:
            r = migrate_pages(a, stats, batch, nr, run)
            nr = 0
            if r != 0:
                return r
    return migrate_pages(a, stats, batch, nr, run) if nr != 0 else 0


# ---- contiguous allocation --------------------------------------------------------------------------

cdef bint range_is_movable(arena_t* a, uint32_t first, uint32_t n) noexcept nogil:
    """A cheap look without locks, so that a range that can't win is not begun."""
    cdef uint32_t frame
    cdef uint16_t flags
    for frame in range(first, first + n):
        flags = load16(&a.pages[frame].flags)
        if flags & PG_USED and not flags & PG_MOVABLE:
            return False
    return True


cdef int isolate_range(arena_t* a, migrate_stats_t* stats, uint32_t first, uint32_t n) noexcept nogil:
    """Isolates the pageblock around a range that could win: 0 or -EBUSY."""
    if not range_is_movable(a, first, n):
        stats.unmovable += 1
        return -EBUSY
    return 0 if arena_isolate_pageblock(a, first // PAGEBLOCK_FRAMES) else -EBUSY


cdef int alloc_contig_range(arena_t* a, migrate_stats_t* stats, uint32_t first, uint32_t n,
                            uint8_t owner, uint32_t ref) noexcept nogil:
    """Frames [first, first + n) of one pageblock in use. -EINVAL for another range; -EBUSY if
    something in the way can't be moved; -ENOMEM if there is nowhere to move it. Then every page is
    whole at its old or a new place, outside or inside the range."""
    cdef int r
    if n == 0 or first >= a.nr_frames or first // PAGEBLOCK_FRAMES != (first + n - 1) // PAGEBLOCK_FRAMES:
        return -EINVAL
    pthread_mutex_lock(&a.migrate_lock)
    r = isolate_range(a, stats, first, n)
    if r == 0:
        r = migrate_range(a, stats, first, n, NULL)
        if r == 0 and not arena_claim_range(a, first, n, owner, ref):
            r = -EBUSY
        # Of a whole pageblock that was claimed nothing is free: it stays in use.
        arena_unisolate_pageblock(a, first // PAGEBLOCK_FRAMES)
    pthread_mutex_unlock(&a.migrate_lock)
    return r


cdef uint32_t next_range(arena_t* a, uint32_t n, uint32_t last, uint32_t* used) noexcept nogil:
    """Of the aligned ranges of n frames that can be emptied the next one after last, which has *used
    frames in use, in the order of frames in use (at least one), then of place. NONE32: no more."""
    cdef uint32_t best = NONE32, least = n + 1, found, frame = 0, i, end
    pthread_mutex_lock(&a.lock)
    end = a.fresh * PAGEBLOCK_FRAMES
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
    """A block of 2^order frames: a free one, or one that is emptied for it, the aligned range with
    the fewest frames in use first. NONE32 if none can be had."""
    cdef uint32_t n = 1u << order, frame = arena_alloc_block(a, order, owner, ref), used = 0
    cdef int attempt
    if frame != NONE32:
        return frame
    for attempt in range(CONTIG_TRIES):
        frame = next_range(a, n, frame, &used)
        if frame == NONE32 or alloc_contig_range(a, stats, frame, n, owner, ref) == 0:
            return frame
    return NONE32


# ---- compaction ------------------------------------------------------------------------------------

cdef inline uint32_t used_in(arena_t* a, uint32_t pb) noexcept nogil:
    return PAGEBLOCK_FRAMES - a.pageblocks[pb].nr_free


cdef inline bint has_both_locked(arena_t* a, uint32_t pb) noexcept nogil:
    """In use, with frames to move and free ones to move to."""
    return a.pageblocks[pb].flags == PB_IN_USE and a.pageblocks[pb].nr_free != 0


cdef void list_blocks_locked(arena_t* a, compact_run_t* run, uint32_t fresh, bint all_blocks) noexcept nogil:
    """Sorts the first fresh pageblocks by their frames in use. Full ones are neither source nor target."""
    cdef uint32_t start[PAGEBLOCK_FRAMES + 1]
    cdef uint32_t pb, used
    memset(start, 0, sizeof(start))
    for pb in range(fresh):
        if has_both_locked(a, pb):
            start[used_in(a, pb) + 1] += 1
    for used in range(1, PAGEBLOCK_FRAMES + 1):
        start[used] += start[used - 1]
    for pb in range(fresh):
        if has_both_locked(a, pb):
            used = used_in(a, pb)
            run.blocks[start[used]] = pb
            start[used] += 1
            run.nr_blocks += 1
            if all_blocks:
                a.pageblocks[pb].skip = 0
    if run.nr_blocks != 0:
        run.free_pos = run.nr_blocks - 1
        run.cursor = run.blocks[run.free_pos] * PAGEBLOCK_FRAMES


cdef int compact_begin(arena_t* a, compact_run_t* run, migrate_stats_t* stats, bint all_blocks) noexcept nogil:
    """Lists the pageblocks in use, sparsest first; without all_blocks those that failed lately are
    passed by, each failure doubling for how many runs. -ENOMEM."""
    cdef uint32_t fresh
    cdef int r = -ENOMEM
    pthread_mutex_lock(&a.migrate_lock)
    free(run.blocks)
    memset(run, 0, sizeof(compact_run_t))
    pthread_mutex_lock(&a.lock)
    fresh = a.fresh
    pthread_mutex_unlock(&a.lock)
    # malloc() of 4 bytes a pageblock: 2 KiB for each GiB of the pool, on the compactor's thread.
    run.blocks = <uint32_t*>malloc((fresh + 1) * sizeof(uint32_t))
    if run.blocks != NULL:
        # Resident before the lock: who waits for memory under it keeps everybody waiting.
        make_resident(run.blocks, (fresh + 1) * sizeof(uint32_t))
        pthread_mutex_lock(&a.lock)
        list_blocks_locked(a, run, fresh, all_blocks)
        pthread_mutex_unlock(&a.lock)
        stats.runs += 1
        r = 0
    pthread_mutex_unlock(&a.migrate_lock)
    return r


cdef bint worth_emptying_locked(arena_t* a, compact_run_t* run) noexcept nogil:
    """The pageblocks between the scanners have room for what the next one holds."""
    cdef uint32_t need = used_in(a, run.blocks[run.migrate_pos]), i
    cdef uint64_t room = 0
    for i in range(run.free_pos, run.migrate_pos, -1):
        # A pageblock that was given back since the run began is no target.
        if a.pageblocks[run.blocks[i]].flags == PB_IN_USE:
            room += a.pageblocks[run.blocks[i]].nr_free
        if room >= need:
            return True
    return False


cdef bint pass_by_locked(arena_t* a, migrate_stats_t* stats, uint32_t pb) noexcept nogil:
    """Given back since the run began, or deferred for a failure."""
    if a.pageblocks[pb].flags != PB_IN_USE:
        return True
    if a.pageblocks[pb].skip == 0:
        return False
    a.pageblocks[pb].skip -= 1
    stats.deferred += 1
    return True


cdef bint empty_block(arena_t* a, compact_run_t* run, migrate_stats_t* stats, uint32_t pb) noexcept nogil:
    """False if the run is over, because the free scanner has come down to this pageblock."""
    cdef pageblock_desc_t* desc = &a.pageblocks[pb]
    cdef int r = isolate_range(a, stats, pb * PAGEBLOCK_FRAMES, PAGEBLOCK_FRAMES)
    if r == 0:
        r = migrate_range(a, stats, pb * PAGEBLOCK_FRAMES, PAGEBLOCK_FRAMES, run)
        if arena_unisolate_pageblock(a, pb):
            run.freed += 1
            stats.blocks_freed += 1
    if r == -EBUSY:
        pthread_mutex_lock(&a.lock)
        desc.defer = min(<uint32_t>MAX_DEFER, desc.defer * 2 if desc.defer else 1u)
        desc.skip = <uint16_t>desc.defer
        pthread_mutex_unlock(&a.lock)
    return r != -ENOMEM


cdef bint compact_step(arena_t* a, compact_run_t* run, migrate_stats_t* stats) noexcept nogil:
    """Empties one pageblock, which goes back to the OS. At 2 us a frame, 3 us where its target was never
    touched and 4 us where the balloon has it, a half-full one takes 0.5 to 1.1 ms. False when the
    scanners have met and the run is over."""
    cdef uint64_t began = now_ns()
    cdef bint go_on, pass_by = False
    cdef uint32_t pb
    pthread_mutex_lock(&a.migrate_lock)
    go_on = run.migrate_pos < run.free_pos
    if go_on:
        pb = run.blocks[run.migrate_pos]
        pthread_mutex_lock(&a.lock)
        go_on = worth_emptying_locked(a, run)
        pass_by = go_on and pass_by_locked(a, stats, pb)
        pthread_mutex_unlock(&a.lock)
    if go_on:
        run.migrate_pos += 1
        if not pass_by:
            go_on = empty_block(a, run, stats, pb)
        stats.ns += now_ns() - began
    if not go_on:
        free(run.blocks)
        run.blocks = NULL
        run.migrate_pos = run.free_pos = 0
    pthread_mutex_unlock(&a.migrate_lock)
    return go_on


cdef class Migration:
    """Page migration on an arena: compaction runs and contiguous allocation.

    There is one run at a time, which any thread may drive; the pages' users go on meanwhile. step()
    empties one pageblock, in about a millisecond, for which a call from another thread waits.
    """

    def __cinit__(self, Arena arena not None):
        self.arena = arena

    def __dealloc__(self):
        # Nobody can be at work on it any more; the arena may be closed.
        free(self.run_.blocks)

    def begin(self, bint all_blocks=False):
        """Starts a run over the pageblocks in use, sparsest first. all_blocks: also those that are
        passed by for a while because they failed. Raises MemoryError."""
        cdef arena_t* a = self.arena.open()
        cdef int r
        with nogil:
            r = compact_begin(a, &self.run_, &self.stats_, all_blocks)
        if r != 0:
            raise MemoryError("no memory for the list of pageblocks (4 bytes each)")

    def step(self):
        """Empties the next pageblock. False when the scanners have met and the run is over."""
        cdef arena_t* a = self.arena.open()
        cdef bint more
        with nogil:
            more = compact_step(a, &self.run_, &self.stats_)
        return more

    def run(self):
        """A whole run over all pageblocks: how many were emptied and given back."""
        self.begin(True)
        while self.step():
            pass
        return self.run_.freed

    def alloc_contig(self, order):
        """First frame of 2^order neighbouring frames, which are emptied for it where need be.
        Raises MemoryError; then no page is lost, though some may have moved."""
        cdef arena_t* a = self.arena.open()
        cdef int k = order
        cdef uint32_t frame
        if not 0 <= k <= PAGEBLOCK_ORDER:
            raise ValueError(f"order 0 to {PAGEBLOCK_ORDER} expected, got {order}")
        with nogil:
            frame = alloc_contig(a, &self.stats_, k, OWNER_NONE, 0)
        if frame == NONE32:
            raise MemoryError(f"no range of {1 << k} frames could be emptied")
        return frame

    def alloc_contig_range(self, first, n):
        """Takes frames [first, first + n) of one pageblock in use. Raises ValueError for another range,
        OSError(EBUSY) if something in it can't be moved, MemoryError if there is nowhere to move it."""
        cdef arena_t* a = self.arena.open()
        cdef uint32_t frame, count
        cdef int r
        if not 0 <= first < a.nr_frames or not 1 <= n <= PAGEBLOCK_FRAMES:
            raise ValueError(f"1 to {PAGEBLOCK_FRAMES} frames of one pageblock expected, got {n} at {first}")
        frame, count = first, n
        with nogil:
            r = alloc_contig_range(a, &self.stats_, frame, count, OWNER_NONE, 0)
        if r == -EINVAL:
            raise ValueError(f"{n} frames at {first} are not inside one pageblock")
        if r == -ENOMEM:
            raise MemoryError(f"there is nowhere to move the pages of {n} frames at {first}")
        if r != 0:
            raise OSError(-r, f"some of {n} frames at {first} can't be moved now, or are not in use")

    def stats(self):
        """CompactionStats since creation."""
        cdef arena_t* a = self.arena.open()
        cdef migrate_stats_t now
        with nogil:
            pthread_mutex_lock(&a.migrate_lock)
            now = self.stats_
            pthread_mutex_unlock(&a.migrate_lock)
        return CompactionStats(**now)

    def pageblocks(self):
        """PageblockStats of every pageblock that was ever used, in order: 16 bytes are read for each,
        and 512 flags for those in use."""
        return pageblock_stats(self.arena.open())


cdef list pageblock_stats(arena_t* a):
    cdef uint32_t pb, frame, movable, isolated, balloon, fresh, nr_free
    cdef uint16_t flags
    cdef bint in_use
    result = []
    pthread_mutex_lock(&a.lock)
    fresh = a.fresh
    pthread_mutex_unlock(&a.lock)
    for pb in range(fresh):
        movable = isolated = balloon = 0
        pthread_mutex_lock(&a.lock)
        in_use = a.pageblocks[pb].flags & PB_IN_USE
        nr_free = a.pageblocks[pb].nr_free
        if in_use:
            for frame in range(pb * PAGEBLOCK_FRAMES, (pb + 1) * PAGEBLOCK_FRAMES):
                flags = load16(&a.pages[frame].flags)
                movable += (flags & PG_MOVABLE) != 0
                isolated += (flags & PG_ISOLATED) != 0
                balloon += load8(&a.pages[frame].owner) == OWNER_BALLOON and (flags & PG_USED) != 0
        pthread_mutex_unlock(&a.lock)
        if not in_use:
            nr_free = PAGEBLOCK_FRAMES
        result.append(PageblockStats(nr_free, PAGEBLOCK_FRAMES - nr_free, movable, isolated, balloon, in_use))
    return result
