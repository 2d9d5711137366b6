# SPDX-License-Identifier: Apache-2.0
# Locks:
# * lane_t.rest_lock (serve.pyx) for one word; nothing is taken under it here.
"""The workers of a lane: their memory, their start and their end; see workers.pxd."""
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport memset
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_POPULATE, MAP_PRIVATE, PROT_NONE, PROT_READ, PROT_WRITE,
    mlock, mmap, mprotect, munmap,
)
from posix.signal cimport sigaction, sigaction_t, sigdelset, sigemptyset, sigfillset, sigset_t
from posix.unistd cimport close

from allocator.prim cimport (
    add64, load64, peek64, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_unlock, store64,
)
from zramfs.lane.kept cimport KEPT_HANDS, page_release
from zramfs.lane.slow cimport (
    SLOW_SPARES, SLOW_THREADS, pthread_cond_destroy, pthread_cond_init, slow_idle, slow_init, slow_t,
)
from zramfs.lane.serve cimport (
    POLLIN, lane_drop_workers, lane_has_requests, lane_stop_workers, lane_t, lane_wake_workers, poll, pollfd,
    pthread_t, slow_worker_serve, worker_serve, worker_thread_t,
)
from zramfs.lane.worker cimport BUCKETS, GROUPS, MAX_IO

cdef extern from "pthread.h" nogil:
    ctypedef struct pthread_attr_t:
        pass
    int pthread_attr_init(pthread_attr_t* attr)
    int pthread_attr_setstack(pthread_attr_t* attr, void* stack, size_t size)
    int pthread_attr_destroy(pthread_attr_t* attr)
    int pthread_create(pthread_t* thread, const pthread_attr_t* attr, void* (*f)(void*) noexcept nogil,
                       void* arg)
    int pthread_join(pthread_t thread, void** result)
    int pthread_kill(pthread_t thread, int sig)
    int pthread_setname_np(pthread_t thread, const char* name)
    int pthread_sigmask(int how, const sigset_t* set, sigset_t* old)

cdef extern from "signal.h" nogil:
    enum: SIG_SETMASK, SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV
    int SIGRTMIN

cdef extern from *:
    """
    #ifdef __SANITIZE_THREAD__
    #define LANE_STACK (4 << 20)    /* of which the sanitizer's own state for the thread takes 1 to 2 MiB */
    #else
    #define LANE_STACK (256 << 10)
    #endif
    """
    enum: STACK "LANE_STACK"

cdef enum:
    PAGE = 4096
    # One mapping a thread, locked in memory: guard page, stack, page for worker_thread_t, page in whose
    # last REQUEST_HEAD bytes a request begins, data.
    THREAD_AT = PAGE + STACK
    DATA_AT = THREAD_AT + 2 * PAGE
    REGION = DATA_AT + MAX_IO
    SPARE = PAGE + MAX_IO       # page in whose end a request begins, data


cdef void ignore_signal(int number) noexcept nogil:
    """A handler only so that the signal interrupts a blocking read."""


cdef inline int kick_signal() noexcept nogil:
    return SIGRTMIN + 7         # no library in use takes this one


cdef void lane_init(lane_t* lane) noexcept nogil:
    lane.fd = lane.null_fd = lane.done_fd = -1
    pthread_mutex_init(&lane.rest_lock, NULL)
    pthread_cond_init(&lane.rest_over, NULL)
    lane.shared.wake_workers = lane_wake_workers
    lane.shared.lane = lane


cdef uint8_t* locked_memory(size_t size, uint64_t* unlocked) noexcept nogil:
    """All of it is made resident now: a page fault under a fatal signal gives the caller EIO, and
    one on memory that was swapped out may wait for ourselves. NULL, and errno."""
    cdef uint8_t* base = <uint8_t*> mmap(
        NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0)
    if base == MAP_FAILED:
        return NULL
    if mlock(base, size) != 0:
        unlocked[0] += size
    return base


cdef worker_thread_t* worker_thread_new(lane_t* lane) noexcept nogil:
    """NULL, and errno."""
    cdef worker_thread_t* t
    cdef uint64_t unlocked = 0
    cdef uint8_t* base = locked_memory(REGION, &unlocked)
    if base == NULL:
        return NULL
    mprotect(base, PAGE, PROT_NONE)
    t = <worker_thread_t*> (base + THREAD_AT)
    t.lane = lane
    t.w.shared = &lane.shared
    t.w.data = base + DATA_AT
    t.unlocked = unlocked
    return t


cdef void worker_take_hand(worker_thread_t* t, int number) noexcept nogil:
    t.hand = &t.lane.shared.kept.hands[number]
    t.w.counts = &t.lane.shared.kept.counts[number]


cdef int lane_add_worker(lane_t* lane) noexcept nogil:
    cdef worker_thread_t* t = worker_thread_new(lane)
    if t == NULL:
        return errno
    t.index = lane.count
    worker_take_hand(t, lane.count)
    lane.threads[lane.count] = t
    lane.count += 1
    return 0


cdef int lane_add_slow_workers(lane_t* lane) noexcept nogil:
    cdef slow_t* s
    cdef uint64_t unlocked = 0
    cdef int i
    if lane.slow != NULL:
        return 0
    for i in range(SLOW_SPARES):
        if lane.spares[i] == NULL:
            lane.spares[i] = locked_memory(SPARE, &unlocked)
        if lane.spares[i] == NULL:
            return errno
    while lane.slow_count < SLOW_THREADS:
        lane.slow_threads[lane.slow_count] = worker_thread_new(lane)
        if lane.slow_threads[lane.slow_count] == NULL:
            return errno
        lane.slow_threads[lane.slow_count].w.may_wait = True
        worker_take_hand(lane.slow_threads[lane.slow_count], KEPT_HANDS - SLOW_THREADS + lane.slow_count)
        lane.slow_threads[lane.slow_count].hand.waits = 1
        lane.slow_count += 1
    s = <slow_t*> locked_memory(sizeof(slow_t), &unlocked)
    if s == NULL:
        return errno
    lane.slow_threads[0].unlocked += unlocked
    slow_init(s)
    for i in range(SLOW_SPARES):
        s.spare[i] = lane.spares[i] + PAGE
    s.spares = SLOW_SPARES
    pthread_mutex_lock(&lane.rest_lock)
    lane.slow = s
    pthread_mutex_unlock(&lane.rest_lock)
    return 0


cdef void block_signals(sigset_t* before) noexcept nogil:
    """For threads that are about to be made. Faults stay deliverable so that faulthandler can report
    them."""
    cdef sigset_t blocked
    sigfillset(&blocked)
    sigdelset(&blocked, SIGSEGV)
    sigdelset(&blocked, SIGBUS)
    sigdelset(&blocked, SIGFPE)
    sigdelset(&blocked, SIGILL)
    sigdelset(&blocked, SIGABRT)
    sigdelset(&blocked, kick_signal())
    pthread_sigmask(SIG_SETMASK, &blocked, before)


cdef int worker_thread_start(worker_thread_t* t, void* (*work)(void*) noexcept nogil,
                             const char* name) noexcept nogil:
    """0 or an errno. live counts the thread already."""
    cdef pthread_attr_t attr
    cdef int err
    store64(&t.running, 1)
    pthread_attr_init(&attr)
    err = pthread_attr_setstack(&attr, <uint8_t*> t - STACK, STACK)
    if err == 0:
        err = pthread_create(&t.id, &attr, work, t)
    pthread_attr_destroy(&attr)
    if err:
        store64(&t.running, 0)
    else:
        pthread_setname_np(t.id, name)
    return err


cdef int lane_start(lane_t* lane) noexcept nogil:
    cdef sigset_t before
    cdef sigaction_t action
    cdef char name[16]
    cdef int i, err = 0
    memset(&action, 0, sizeof(action))
    action.sa_handler = ignore_signal
    sigemptyset(&action.sa_mask)
    sigaction(kick_signal(), &action, NULL)
    block_signals(&before)
    store64(&lane.live, <uint64_t> lane.count + 1)      # one for us: threads may end before all exist
    for i in range(lane.count):
        snprintf(name, sizeof(name), "zramfs-lane%hhu", <unsigned char> i)
        err = worker_thread_start(lane.threads[i], worker_serve, name)
        if err:
            lane_drop_workers(lane, <uint64_t> (lane.count - i))
            break
        lane.created += 1
    pthread_sigmask(SIG_SETMASK, &before, NULL)
    if err == 0:
        err = lane_start_slow_workers(lane)
    lane_drop_workers(lane, 1)
    return err


cdef int lane_start_slow_workers(lane_t* lane) noexcept nogil:
    cdef sigset_t before
    cdef char name[16]
    cdef int err = 0
    block_signals(&before)
    while err == 0 and lane.slow_created < lane.slow_count:
        snprintf(name, sizeof(name), "zramfs-slow%hhu", <unsigned char> lane.slow_created)
        add64(&lane.live, 1)
        err = worker_thread_start(lane.slow_threads[lane.slow_created], slow_worker_serve, name)
        if err:
            lane_drop_workers(lane, 1)
        else:
            lane.slow_created += 1
    pthread_sigmask(SIG_SETMASK, &before, NULL)
    return err


cdef bint lane_wait_end(lane_t* lane, int timeout_ms) noexcept nogil:
    cdef pollfd wait
    wait.fd, wait.events = lane.done_fd, POLLIN
    return poll(&wait, 1, timeout_ms) > 0


cdef void lane_stop(lane_t* lane) noexcept nogil:
    cdef int i
    lane_stop_workers(lane)
    # The signal may arrive just before a thread sleeps in read, so it is repeated.
    while load64(&lane.live) != 0:
        for i in range(lane.created):
            if load64(&lane.threads[i].running):
                pthread_kill(lane.threads[i].id, kick_signal())
        lane_wait_end(lane, 5)


cdef void lane_join(lane_t* lane) noexcept nogil:
    cdef int i
    for i in range(lane.created):
        pthread_join(lane.threads[i].id, NULL)
    for i in range(lane.slow_created):
        pthread_join(lane.slow_threads[i].id, NULL)
    lane.created = lane.slow_created = 0


cdef bint lane_is_idle(lane_t* lane) noexcept nogil:
    cdef int i
    if lane_has_requests(lane):
        return False
    for i in range(lane.count):
        if load64(&lane.threads[i].w.serving):
            return False
    # In the order of a request's way: what has left the queue is being served.
    if lane.slow != NULL and not slow_idle(lane.slow):
        return False
    for i in range(lane.slow_count):
        if load64(&lane.slow_threads[i].w.serving):
            return False
    return True


cdef uint64_t lane_requests_served(lane_t* lane) noexcept nogil:
    cdef uint64_t served = 0
    cdef int i, g, b
    for i in range(lane.count):
        for g in range(GROUPS):
            for b in range(BUCKETS):
                served += peek64(&lane.threads[i].w.counts.ios[g][b])
    return served


cdef void lane_free(lane_t* lane) noexcept nogil:
    cdef int i
    for i in range(lane.count):
        munmap(<uint8_t*> lane.threads[i] - THREAD_AT, REGION)
    for i in range(lane.slow_count):
        munmap(<uint8_t*> lane.slow_threads[i] - THREAD_AT, REGION)
    for i in range(SLOW_SPARES):
        if lane.spares[i] != NULL:
            munmap(lane.spares[i], SPARE)
    if lane.slow != NULL:
        munmap(lane.slow, sizeof(slow_t))
    page_release(lane.shared.kept)
    pthread_cond_destroy(&lane.rest_over)
    pthread_mutex_destroy(&lane.rest_lock)
    if lane.fd >= 0:
        close(lane.fd)
    if lane.null_fd >= 0:
        close(lane.null_fd)
    if lane.done_fd >= 0:
        close(lane.done_fd)
