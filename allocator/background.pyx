# SPDX-License-Identifier: Apache-2.0
# Locks: none.
"""Background threads, which may wait for memory as long as it takes.

A server of swap must not wait for memory while it serves a request. Threads of their own do so instead:
the one that fills the reserve (reserve.pyx), and whatever a user of this package adds. They run without
Python and hold no lock while they wait.
"""
from posix.signal cimport sigfillset, sigset_t
from posix.time cimport nanosleep, timespec

from allocator.prim cimport ready_stack

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


cdef int background_start(unsigned long* thread, void* (*work)(void*) noexcept nogil, void* arg,
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


cdef void background_join(unsigned long thread) noexcept nogil:
    pthread_join(thread, NULL)


cdef void background_enter() noexcept nogil:
    ready_stack()
    # Of this thread alone; without the right to it (CAP_SYS_NICE) it goes on as it is.
    setpriority(PRIO_PROCESS, 0, -20)


cdef void background_sleep(unsigned int ms) noexcept nogil:
    cdef timespec t
    t.tv_sec = ms // 1000
    t.tv_nsec = ms % 1000 * 1000000
    nanosleep(&t, NULL)


def prepare_thread():
    """Makes 64 KiB of the calling thread's stack resident. For threads that call a pool's functions beside
    those that serve swap: they must not wait for memory in the middle, with a lock in their hands."""
    ready_stack()
