# SPDX-License-Identifier: Apache-2.0
# Locks: see migrate.pxd.
"""Compaction: pageblocks that hold little are emptied into those that hold much, and go back to the OS.

A run lists the pageblocks in use, the sparsest first. Two scanners work on that list from its ends: one
finds frames to move, the other free frames to move them to. The run is over when they meet
(compact_run_t). The class Migration drives a run from Python, a step at a time.
"""
from libc.errno cimport EBUSY, EINVAL, ENOMEM
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from allocator.arena cimport Arena
from allocator.frames cimport arena_t
from allocator.isolation cimport arena_unisolate_pageblock
from allocator.layout cimport *
from allocator.migrate cimport (
    alloc_contig, alloc_contig_range, compact_run_t, isolate_range, migrate_range,
)
from allocator.prim cimport *

from allocator.stats import CompactionStats, PageblockStats

cdef enum:
    MAX_DEFER = 64          # runs that a failing pageblock is passed by, at most


cdef inline uint32_t used_in(arena_t* a, uint32_t pb) noexcept nogil:
    return PAGEBLOCK_FRAMES - a.pageblocks[pb].nr_free


cdef inline bint has_both_locked(arena_t* a, uint32_t pb) noexcept nogil:
    """It is in use, and has free frames: it can be emptied, or filled."""
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


cdef int compact_begin(arena_t* a, compact_run_t* run, migrate_stats_t* stats,
                       bint all_blocks) noexcept nogil:
    """Lists the pageblocks in use, the sparsest first. Without all_blocks those that failed lately are passed
    by; each failure doubles the number of runs that do so. 0 or -ENOMEM."""
    cdef uint32_t fresh
    cdef int r = -ENOMEM
    pthread_mutex_lock(&a.migrate_lock)
    free(run.blocks)
    memset(run, 0, sizeof(compact_run_t))
    pthread_mutex_lock(&a.lock)
    fresh = a.sb.fresh
    pthread_mutex_unlock(&a.lock)
    # 4 bytes a pageblock, so 2 KiB for each GiB of the pool; on the compactor's thread.
    run.blocks = <uint32_t*>malloc((fresh + 1) * sizeof(uint32_t))
    if run.blocks != NULL:
        # Resident before the lock: a page fault under it would stall every other thread.
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


cdef bint block_pass_by_locked(arena_t* a, migrate_stats_t* stats, uint32_t pb) noexcept nogil:
    """True if it was given back since the run began, or is deferred for a failure."""
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
        desc.defer = <uint16_t>min(<uint32_t>MAX_DEFER, desc.defer * 2u if desc.defer else 1u)
        desc.skip = desc.defer
        pthread_mutex_unlock(&a.lock)
    return r != -ENOMEM


cdef bint compact_step(arena_t* a, compact_run_t* run, migrate_stats_t* stats) noexcept nogil:
    """Empties one pageblock, which goes back to the OS. False when the scanners have met and the run is over.
    A frame takes 2 us, 3 us if its target has no memory yet, and 4 us if the balloon has it. So a half-full
    pageblock takes 0.5 to 1.1 ms."""
    cdef uint64_t began = now_ns()
    cdef bint go_on, pass_by = False
    cdef uint32_t pb
    pthread_mutex_lock(&a.migrate_lock)
    go_on = run.migrate_pos < run.free_pos
    if go_on:
        pb = run.blocks[run.migrate_pos]
        pthread_mutex_lock(&a.lock)
        go_on = worth_emptying_locked(a, run)
        pass_by = go_on and block_pass_by_locked(a, stats, pb)
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

    A Migration has one run at a time, which any thread may drive; the pages' users go on meanwhile. step()
    empties one pageblock in about a millisecond, and a call from another thread waits for that. Every
    method raises ValueError once the arena is closed.
    """

    def __cinit__(self, Arena arena not None):
        self.arena = arena
        self.stats_ = &arena.open().sb.migration

    def __dealloc__(self):
        # No call can be under way; the arena may be closed.
        free(self.run_.blocks)

    def __repr__(self):
        if self.arena.a == NULL:
            return "<Migration, its arena is closed>"
        now = self.stats()
        return (f"<Migration: {now.runs} runs, {now.migrated} frames moved, {now.blocks_freed} pageblocks "
                f"emptied>")

    def begin(self, bint all_blocks=False):
        """Starts a run over the pageblocks in use, the sparsest first, and drops a run that was not finished.
        all_blocks: also those that are passed by for a while because they failed. Raises MemoryError."""
        cdef arena_t* a = self.arena.open()
        cdef int r
        with nogil:
            r = compact_begin(a, &self.run_, self.stats_, all_blocks)
        if r != 0:
            raise MemoryError("no memory for the list of pageblocks (4 bytes each)")

    def step(self):
        """Empties the next pageblock. False when the scanners have met and the run is over."""
        cdef arena_t* a = self.arena.open()
        cdef bint more
        with nogil:
            more = compact_step(a, &self.run_, self.stats_)
        return more

    def run(self):
        """A whole run over all pageblocks. The number of pageblocks that were emptied and given back."""
        self.begin(True)
        while self.step():
            pass
        return self.run_.freed

    def alloc_contig(self, order):
        """The first of 2^order neighbouring frames, order 0 to 9, which are emptied where need be.
        Arena.free() takes them back. Raises MemoryError; then no page is lost, though some may have moved."""
        cdef arena_t* a = self.arena.open()
        cdef int k = order
        cdef uint32_t frame
        if not 0 <= k <= PAGEBLOCK_ORDER:
            raise ValueError(f"order 0 to {PAGEBLOCK_ORDER} expected, got {order}")
        with nogil:
            frame = alloc_contig(a, self.stats_, k, OWNER_NONE, 0)
        if frame == NONE32:
            raise MemoryError(f"no range of {1 << k} frames could be emptied")
        return frame

    def alloc_contig_range(self, first, n):
        """Takes frames [first, first + n), which have to lie in one pageblock in use. Raises ValueError for
        another range, OSError(EBUSY) if something in it can't be moved, MemoryError if there is nowhere to
        move it."""
        cdef arena_t* a = self.arena.open()
        cdef uint32_t frame, count
        cdef int r
        if not 0 <= first < a.nr_frames or not 1 <= n <= PAGEBLOCK_FRAMES:
            raise ValueError(f"1 to {PAGEBLOCK_FRAMES} frames of one pageblock expected, got {n} at {first}")
        frame, count = first, n
        with nogil:
            r = alloc_contig_range(a, self.stats_, frame, count, OWNER_NONE, 0)
        if r == -EINVAL:
            raise ValueError(f"{n} frames at {first} are not inside one pageblock")
        if r == -ENOMEM:
            raise MemoryError(f"there is nowhere to move the pages of {n} frames at {first}")
        if r != 0:
            raise OSError(-r, f"some of {n} frames at {first} can't be moved now, or are not in use")

    def stats(self):
        """CompactionStats since the arena was made."""
        cdef arena_t* a = self.arena.open()
        cdef migrate_stats_t now
        with nogil:
            pthread_mutex_lock(&a.migrate_lock)
            now = self.stats_[0]
            pthread_mutex_unlock(&a.migrate_lock)
        return CompactionStats(**now)

    def pageblocks(self):
        """PageblockStats of every pageblock that was ever used, in order. 16 bytes are read for each, and 512
        flags for each that is in use."""
        return pageblock_stats(self.arena.open())


cdef list pageblock_stats(arena_t* a):
    cdef uint32_t pb, frame, movable, isolated, balloon, fresh, nr_free
    cdef uint16_t flags
    cdef bint in_use
    result = []
    pthread_mutex_lock(&a.lock)
    fresh = a.sb.fresh
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
