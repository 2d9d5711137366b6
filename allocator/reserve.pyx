# SPDX-License-Identifier: Apache-2.0
# Locks: the reserve's thread holds none while it waits for memory or makes a system call. It takes
# arena_t.lock for the moments in between, and arena_t.populate_lock for the descriptors of a pageblock.
"""The reserve: whole free pageblocks that are resident, with every descriptor that using them takes.

Under memory pressure a server of swap must store a page without waiting for one. So an allocation takes
a pageblock of the reserve and of nowhere else. A thread of its own, which may wait for memory as long as
it takes, makes others resident. An allocation that finds the reserve empty waits for that thread, but not
for long, and then fails: the kernel keeps its page. Pageblocks that become free go to the reserve first,
and the thread gives back to the OS what is more than one and a half times the target.

What makes a pageblock ready: its 512 frames, its descriptor, those of its pages, and as many zspage
descriptors as it has frames. Zspages are numbered from 0 and a number that is free is used before a
new one, so numbers in use stay below the frames of all pageblocks that were ever taken or made ready.
"""
cimport cython
from libc.errno cimport ENOMEM
from libc.stdint cimport uint32_t, uint64_t

from allocator.arena cimport Arena
from allocator.background cimport background_enter, background_join, background_sleep, background_start
from allocator.buddy cimport arena_add_ready, arena_punch, arena_take_whole
from allocator.frames cimport arena_t
from allocator.layout cimport NONE32, PAGEBLOCK_SIZE
from allocator.populate cimport arena_populate_pageblock
from allocator.prim cimport load64, round_up, sem_post, sem_wait, store64, swap64

import os

cdef enum:
    # After the OS has refused memory the thread tries again by itself: soon, because an allocation waits
    # 0.1 s at most, and then ever less often.
    FIRST_PAUSE_MS = 10
    LAST_PAUSE_MS = 640


cdef int reserve_fill_one(arena_t* a) noexcept nogil:
    """1: it has one pageblock more. 0: it has enough, or the arena no more. -ENOMEM: the OS refuses."""
    cdef uint64_t refused = load64(&a.sb.refused)
    cdef uint32_t pb
    if load64(&a.nr_ready) >= load64(&a.ready_target):
        return 0
    pb = arena_take_whole(a, False)
    if pb == NONE32:
        return 0 if load64(&a.sb.refused) == refused else -ENOMEM
    if arena_populate_pageblock(a, pb) != 0:
        # What it came to have by then is no pageblock that was in use.
        arena_punch(a, pb, 0)
        return -ENOMEM
    arena_add_ready(a, pb)
    return 1


cdef int reserve_fill(arena_t* a) noexcept nogil:
    """0 when it is full, -ENOMEM when the OS has refused."""
    cdef int r = 1
    while r > 0:
        r = reserve_fill_one(a)
    return r


cdef void reserve_trim(arena_t* a, uint64_t most) noexcept nogil:
    cdef uint32_t pb
    while load64(&a.nr_ready) > most:
        pb = arena_take_whole(a, True)
        if pb == NONE32:
            break
        arena_punch(a, pb, PAGEBLOCK_SIZE)


cdef void* reserve_thread(void* arg) noexcept nogil:
    """Until the target is 0."""
    cdef arena_t* a = <arena_t*>arg
    cdef uint64_t target
    cdef unsigned int pause = 0
    background_enter()
    while True:
        if pause == 0:
            sem_wait(&a.filler_wake)
        else:
            background_sleep(pause)
        # Before the look: whoever finds the reserve short after it calls again.
        swap64(&a.filler_called, 0)
        target = load64(&a.ready_target)
        if target == 0:
            return NULL
        if load64(&a.nr_ready) > target + target // 2:
            reserve_trim(a, target)
        if reserve_fill(a) == 0:
            pause = 0
        elif pause == 0:
            pause = FIRST_PAUSE_MS
        elif pause < LAST_PAUSE_MS:
            pause *= 2


# The collector must not take the arena away before __dealloc__ has used it.
@cython.no_gc_clear
cdef class Reserve:
    """Keeps nbytes of the arena, rounded up to 2 MiB, resident and free, so that an allocation never has to
    wait for memory.

    It is full when the constructor returns, and a thread keeps it so until close(). It must be made before
    anything else uses the arena, and closed before the arena is. As a context manager it is closed at the
    end. Raises ValueError for nbytes outside the arena's size or an arena that has a reserve, MemoryError
    when the system refuses the memory, and OSError if there can be no thread.
    """

    def __cinit__(self, Arena arena not None, nbytes):
        cdef arena_t* a = arena.open()
        cdef uint64_t most = a.nr_pageblocks * PAGEBLOCK_SIZE, wanted
        cdef int err
        if not 0 < nbytes <= most:
            raise ValueError(f"a reserve of 1 to {most} bytes expected, got {nbytes}")
        if load64(&a.ready_target) != 0:
            raise ValueError("this arena has a reserve already")
        self.arena = arena
        self.filler.arena = a
        wanted = nbytes
        store64(&a.ready_target, round_up(wanted, PAGEBLOCK_SIZE) // PAGEBLOCK_SIZE)
        with nogil:
            err = reserve_fill(a)
        if err:
            self._give_up()
            raise MemoryError(f"the system refuses the memory of a reserve of {nbytes} bytes: ask for less")
        err = background_start(&self.filler.thread, reserve_thread, a, b"zramfs-reserve")
        if err:
            self._give_up()
            raise OSError(err, f"no thread to keep a reserve: {os.strerror(err)}")
        self.filler.running = True

    cdef void _give_up(self) noexcept:
        store64(&self.filler.arena.ready_target, 0)
        with nogil:
            reserve_trim(self.filler.arena, 0)

    def __dealloc__(self):
        self.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def __repr__(self):
        cdef arena_t* a = self.filler.arena
        if not self.filler.running:
            return "<Reserve, closed>"
        return f"<Reserve of {load64(&a.nr_ready)} pageblocks, target {load64(&a.ready_target)}>"

    def close(self):
        """Ends the thread and gives the reserve back to the system. A second close() does nothing."""
        cdef arena_t* a = self.filler.arena
        if not self.filler.running:
            return
        self.filler.running = False
        with nogil:
            store64(&a.ready_target, 0)
            sem_post(&a.filler_wake)
            background_join(self.filler.thread)
            reserve_trim(a, 0)
