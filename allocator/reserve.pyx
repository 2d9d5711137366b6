# SPDX-License-Identifier: Apache-2.0
# Lock order: the keeper holds no lock while it touches memory or makes a system call; arena_t.lock for
# the moments in between.
"""The reserve: whole free pageblocks that are resident, with every descriptor that using them takes.

Under memory pressure a server of swap must store a page without waiting for one. So an allocation
takes a pageblock of the reserve and of nowhere else, and the keeper, a thread of its own that may wait for
memory as long as it takes, makes another one resident. When it has none left an allocation waits for
the keeper, but not for long, and fails: the kernel then keeps its page. Pageblocks that become free go to the reserve first; the
keeper gives back to the OS what is more than one and a half times the target.

What makes a pageblock ready: its 512 frames, its descriptor, those of its pages, and as many zspage
descriptors as it has frames. Zspages are numbered from 0 and a number that is free is used before a
new one, so numbers in use stay below the frames of all pageblocks that were ever taken or made ready.
"""
cimport cython
from libc.stdint cimport uint32_t, uint64_t
from posix.signal cimport sigfillset, sigset_t

from allocator.arena cimport Arena
from allocator.buddy cimport arena_add_ready, arena_punch, arena_take_whole
from allocator.frames cimport arena_t, frame_ptr
from allocator.layout cimport (
    NONE32, PAGEBLOCK_FRAMES, PAGEBLOCK_SIZE, page_desc_t, pageblock_desc_t, zspage_desc_t,
)
from allocator.prim cimport *

import os

cdef extern from "pthread.h" nogil:
    int pthread_create(unsigned long* thread, const void* attr, void* (*f)(void*) noexcept nogil, void* arg)
    int pthread_join(unsigned long thread, void** result)
    int pthread_setname_np(unsigned long thread, const char* name)
    int pthread_sigmask(int how, const sigset_t* set, sigset_t* old)

cdef extern from "sys/resource.h" nogil:
    enum: PRIO_PROCESS
    int setpriority(int which, unsigned int who, int priority)

cdef extern from "signal.h" nogil:
    enum: SIG_SETMASK


cdef void make_ready(arena_t* a, uint32_t pb) noexcept nogil:
    """512 page faults: 0.2 to 0.5 ms while memory is plentiful."""
    cdef uint32_t frame = pb * PAGEBLOCK_FRAMES
    make_resident(&a.pageblocks[pb], sizeof(pageblock_desc_t))
    make_resident(&a.pages[frame], PAGEBLOCK_FRAMES * sizeof(page_desc_t))
    make_resident(&a.zspages[frame], PAGEBLOCK_FRAMES * sizeof(zspage_desc_t))
    make_resident(frame_ptr(a, frame), PAGEBLOCK_SIZE)


cdef bint fill(arena_t* a) noexcept nogil:
    """One pageblock more in reserve. False if it has enough, or the arena no more."""
    cdef uint32_t pb
    if load64(&a.nr_ready) >= load64(&a.ready_target):
        return False
    pb = arena_take_whole(a, False)
    if pb == NONE32:
        return False
    make_ready(a, pb)
    arena_add_ready(a, pb)
    return True


cdef void trim(arena_t* a, uint64_t keep) noexcept nogil:
    cdef uint32_t pb
    while load64(&a.nr_ready) > keep:
        pb = arena_take_whole(a, True)
        if pb == NONE32:
            break
        arena_punch(a, pb)


cdef int start_keeper(unsigned long* thread, void* (*work)(void*) noexcept nogil, void* arg,
                      const char* name) noexcept nogil:
    cdef sigset_t blocked, before
    cdef int err
    # Signals are for Python's main thread.
    sigfillset(&blocked)
    pthread_sigmask(SIG_SETMASK, &blocked, &before)
    err = pthread_create(thread, NULL, work, arg)
    pthread_sigmask(SIG_SETMASK, &before, NULL)
    if err == 0:
        pthread_setname_np(thread[0], name)
    return err


cdef void become_keeper() noexcept nogil:
    ready_stack()
    # Of this thread alone; without the right to it (CAP_SYS_NICE) it goes on as it is.
    setpriority(PRIO_PROCESS, 0, -20)


cdef void* keep(void* arg) noexcept nogil:
    """The keeper's thread, until the target is 0."""
    cdef arena_t* a = <arena_t*>arg
    cdef uint64_t target
    become_keeper()
    while True:
        sem_wait(&a.keeper_wake)
        # Before the look: whoever finds the reserve short after it calls again.
        swap64(&a.keeper_called, 0)
        target = load64(&a.ready_target)
        if target == 0:
            return NULL
        if load64(&a.nr_ready) > target + target // 2:
            trim(a, target)
        while fill(a):
            pass


def prepare_thread():
    """Makes the calling thread's stack resident. For threads that call the pool's functions beside those
    that serve swap: they must not wait for memory in the middle, with a lock in their hands."""
    ready_stack()


# The collector must not take the arena away before __dealloc__ has used it.
@cython.no_gc_clear
cdef class Reserve:
    """Keeps nbytes of the arena, rounded up to 2 MiB, resident and free.

    Full when the constructor returns, and until close(). From then on every free frame of the arena is
    resident, so it has to be made before anything else uses the arena. Raises ValueError for nbytes
    outside the arena's size or a second reserve, OSError if there can be no thread.
    """

    def __cinit__(self, Arena arena not None, nbytes):
        cdef arena_t* a = arena.open()
        cdef int err
        if not 0 < nbytes <= a.nr_pageblocks * PAGEBLOCK_SIZE:
            raise ValueError(f"a reserve of 1 to {a.nr_pageblocks * PAGEBLOCK_SIZE} bytes expected, got {nbytes}")
        if a.ready_target != 0:
            raise ValueError("this arena has a reserve already")
        self.arena = arena
        self.keeper.arena = a
        store64(&a.ready_target, (nbytes + PAGEBLOCK_SIZE - 1) // PAGEBLOCK_SIZE)
        with nogil:
            while fill(a):
                pass
        err = start_keeper(&self.keeper.thread, keep, a, b"zramfs-reserve")
        if err:
            store64(&a.ready_target, 0)
            with nogil:
                trim(a, 0)
            raise OSError(err, f"no thread to keep a reserve: {os.strerror(err)}")
        self.keeper.running = True

    def __dealloc__(self):
        self.close()

    def close(self):
        """Ends the thread and gives the reserve back. To be called before the arena is closed."""
        cdef arena_t* a = self.keeper.arena
        if not self.keeper.running:
            return
        self.keeper.running = False
        with nogil:
            store64(&a.ready_target, 0)
            sem_post(&a.keeper_wake)
            pthread_join(self.keeper.thread, NULL)
            trim(a, 0)
