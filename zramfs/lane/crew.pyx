# SPDX-License-Identifier: Apache-2.0
# Lock: crew_t.rest_lock (serve.pyx), for one word; nothing is taken under it here.
"""The crew of a connection; see crew.pxd."""
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
from zramfs.lane.slow cimport (
    SLOW_SPARES, SLOW_THREADS, pthread_cond_destroy, pthread_cond_init, slow_idle, slow_init, slow_t,
)
from zramfs.lane.serve cimport (
    POLLIN, call, crew_t, leave, poll, pollfd, pthread_t, serve, serve_slow, stop_all, thread_t, waiting,
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
    # One mapping a thread, locked in memory: guard page, stack, page for thread_t, page in whose
    # last REQUEST_HEAD bytes a request begins, data.
    THREAD_AT = PAGE + STACK
    DATA_AT = THREAD_AT + 2 * PAGE
    REGION = DATA_AT + MAX_IO
    SPARE = PAGE + MAX_IO       # page in whose end a request begins, data


cdef void ignore_signal(int number) noexcept nogil:
    """A handler only so that the signal interrupts a blocking read."""


cdef inline int kick_signal() noexcept nogil:
    return SIGRTMIN + 7         # no library in use takes this one


cdef void crew_init(crew_t* crew) noexcept nogil:
    crew.fd = crew.null_fd = crew.done_fd = -1
    pthread_mutex_init(&crew.rest_lock, NULL)
    pthread_cond_init(&crew.rest_over, NULL)
    crew.server.summon = call
    crew.server.crew = crew


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


cdef thread_t* thread_new(crew_t* crew) noexcept nogil:
    """NULL, and errno."""
    cdef thread_t* t
    cdef uint64_t unlocked = 0
    cdef uint8_t* base = locked_memory(REGION, &unlocked)
    if base == NULL:
        return NULL
    mprotect(base, PAGE, PROT_NONE)
    t = <thread_t*> (base + THREAD_AT)
    t.crew = crew
    t.w.server = &crew.server
    t.w.data = base + DATA_AT
    t.unlocked = unlocked
    return t


cdef int crew_add(crew_t* crew) noexcept nogil:
    cdef thread_t* t = thread_new(crew)
    if t == NULL:
        return errno
    t.index = crew.count
    crew.threads[crew.count] = t
    crew.count += 1
    return 0


cdef int crew_add_slow(crew_t* crew) noexcept nogil:
    cdef slow_t* s
    cdef uint64_t unlocked = 0
    cdef int i
    if crew.slow != NULL:
        return 0
    for i in range(SLOW_SPARES):
        if crew.spares[i] == NULL:
            crew.spares[i] = locked_memory(SPARE, &unlocked)
        if crew.spares[i] == NULL:
            return errno
    while crew.slow_count < SLOW_THREADS:
        crew.slow_threads[crew.slow_count] = thread_new(crew)
        if crew.slow_threads[crew.slow_count] == NULL:
            return errno
        crew.slow_threads[crew.slow_count].w.may_wait = True
        crew.slow_count += 1
    s = <slow_t*> locked_memory(sizeof(slow_t), &unlocked)
    if s == NULL:
        return errno
    crew.slow_threads[0].unlocked += unlocked
    slow_init(s)
    for i in range(SLOW_SPARES):
        s.spare[i] = crew.spares[i] + PAGE
    s.spares = SLOW_SPARES
    pthread_mutex_lock(&crew.rest_lock)
    crew.slow = s
    pthread_mutex_unlock(&crew.rest_lock)
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


cdef int thread_start(thread_t* t, void* (*work)(void*) noexcept nogil, const char* name) noexcept nogil:
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


cdef int crew_start(crew_t* crew) noexcept nogil:
    cdef sigset_t before
    cdef sigaction_t action
    cdef char name[16]
    cdef int i, err = 0
    memset(&action, 0, sizeof(action))
    action.sa_handler = ignore_signal
    sigemptyset(&action.sa_mask)
    sigaction(kick_signal(), &action, NULL)
    block_signals(&before)
    store64(&crew.live, <uint64_t> crew.count + 1)      # one for us: threads may end before all exist
    for i in range(crew.count):
        snprintf(name, sizeof(name), "zramfs-lane%hhu", <unsigned char> i)
        err = thread_start(crew.threads[i], serve, name)
        if err:
            leave(crew, <uint64_t> (crew.count - i))
            break
        crew.created += 1
    pthread_sigmask(SIG_SETMASK, &before, NULL)
    if err == 0:
        err = crew_start_slow(crew)
    leave(crew, 1)
    return err


cdef int crew_start_slow(crew_t* crew) noexcept nogil:
    cdef sigset_t before
    cdef char name[16]
    cdef int err = 0
    block_signals(&before)
    while err == 0 and crew.slow_created < crew.slow_count:
        snprintf(name, sizeof(name), "zramfs-slow%hhu", <unsigned char> crew.slow_created)
        add64(&crew.live, 1)
        err = thread_start(crew.slow_threads[crew.slow_created], serve_slow, name)
        if err:
            leave(crew, 1)
        else:
            crew.slow_created += 1
    pthread_sigmask(SIG_SETMASK, &before, NULL)
    return err


cdef bint crew_wait(crew_t* crew, int timeout_ms) noexcept nogil:
    cdef pollfd wait
    wait.fd, wait.events = crew.done_fd, POLLIN
    return poll(&wait, 1, timeout_ms) > 0


cdef void crew_stop(crew_t* crew) noexcept nogil:
    cdef int i
    stop_all(crew)
    # The signal may arrive just before a thread sleeps in read, so it is repeated.
    while load64(&crew.live) != 0:
        for i in range(crew.created):
            if load64(&crew.threads[i].running):
                pthread_kill(crew.threads[i].id, kick_signal())
        crew_wait(crew, 5)


cdef void crew_join(crew_t* crew) noexcept nogil:
    cdef int i
    for i in range(crew.created):
        pthread_join(crew.threads[i].id, NULL)
    for i in range(crew.slow_created):
        pthread_join(crew.slow_threads[i].id, NULL)
    crew.created = crew.slow_created = 0


cdef bint crew_idle(crew_t* crew) noexcept nogil:
    cdef int i
    if waiting(crew):
        return False
    for i in range(crew.count):
        if load64(&crew.threads[i].w.serving):
            return False
    # In the order of a request's way: what has left the queue is being served.
    if crew.slow != NULL and not slow_idle(crew.slow):
        return False
    for i in range(crew.slow_count):
        if load64(&crew.slow_threads[i].w.serving):
            return False
    return True


cdef uint64_t crew_served(crew_t* crew) noexcept nogil:
    cdef uint64_t served = 0
    cdef int i, g, b
    for i in range(crew.count):
        for g in range(GROUPS):
            for b in range(BUCKETS):
                served += peek64(&crew.threads[i].w.ios[g][b])
    return served


cdef void crew_free(crew_t* crew) noexcept nogil:
    cdef int i
    for i in range(crew.count):
        munmap(<uint8_t*> crew.threads[i] - THREAD_AT, REGION)
    for i in range(crew.slow_count):
        munmap(<uint8_t*> crew.slow_threads[i] - THREAD_AT, REGION)
    for i in range(SLOW_SPARES):
        if crew.spares[i] != NULL:
            munmap(crew.spares[i], SPARE)
    if crew.slow != NULL:
        munmap(crew.slow, sizeof(slow_t))
    pthread_cond_destroy(&crew.rest_over)
    pthread_mutex_destroy(&crew.rest_lock)
    if crew.fd >= 0:
        close(crew.fd)
    if crew.null_fd >= 0:
        close(crew.null_fd)
    if crew.done_fd >= 0:
        close(crew.done_fd)
