# SPDX-License-Identifier: Apache-2.0
# Lock: slow_t.lock, for a few words or the copy of a request's head; nothing is taken under it.
"""Requests that need the backing store, on their way from the lane's threads to the slow ones.

A read is its head of 80 bytes, which is copied. What has a payload (a write of a part of a page) goes
over with its buffer: the lane's thread gets a spare one for it, and the slow thread gives its own back
as the next spare. So nothing of the size of a page is copied, and all memory is there beforehand.

Of the threads that rest, the last one to rest is called first. One request at a time then meets the same
thread, which has the unit of the request before unpacked (units.pxd). Where the four take turns each of them
unpacks a unit that is read page by page.
"""
from libc.stdint cimport uint8_t, uint64_t

from allocator.prim cimport pthread_mutex_t
from zramfs.lane.worker cimport REQUEST_HEAD, worker_t

cdef enum:
    # Four reads at once: a disk's queue is used, and a spindle is not made to seek more than it would.
    SLOW_THREADS = 4
    # The kernel has at most 64 requests under way that nobody waits for (MAX_BACKGROUND), and one for
    # each task that waits. A guess of how many tasks.
    SLOW_QUEUE = 512
    SLOW_SPARES = 4             # buffers of 1 MiB; only writes of a part of a page take one

cdef extern from "pthread.h" nogil:
    ctypedef struct pthread_cond_t:
        pass
    int pthread_cond_init(pthread_cond_t* c, const void* attr)
    int pthread_cond_wait(pthread_cond_t* c, pthread_mutex_t* m)
    int pthread_cond_signal(pthread_cond_t* c)
    int pthread_cond_broadcast(pthread_cond_t* c)
    int pthread_cond_destroy(pthread_cond_t* c)

cdef struct put_off_t:
    uint8_t head[REQUEST_HEAD]
    uint8_t* data               # where its payload lies, behind its head; NULL: the head is all
    size_t got                  # bytes of the request
    uint64_t began              # as in worker_t
    uint64_t done

# A thread without work, on its own stack. Guarded by slow_t.lock.
cdef struct resting_t:
    pthread_cond_t call
    bint is_called
    resting_t* before           # the one that rested before it; NULL: none

# All but lock, put_off and refused is guarded by lock.
cdef struct slow_t:
    pthread_mutex_t lock
    bint ending
    resting_t* resting          # the last thread that began to rest; NULL: all work
    unsigned int first          # index of the oldest request
    unsigned int waiting
    int spares
    uint8_t* spare[SLOW_SPARES]
    uint64_t put_off            # atomic: requests that came
    uint64_t refused            # atomic: and that found no room, so that the lane waited itself
    put_off_t queue[SLOW_QUEUE]

cdef void slow_init(slow_t* s) noexcept nogil
# The request of `got` bytes at w.data - REQUEST_HEAD. False: there is no room for it. After that, w.data
# may be another buffer.
cdef bint slow_put(slow_t* s, worker_t* w, size_t got) noexcept nogil
# Waits for a request and puts it to w.data - REQUEST_HEAD, w.began and w.done; sets w.serving. False:
# it is the end.
cdef bint slow_take(slow_t* s, worker_t* w, size_t* got) noexcept nogil
# No request is taken any more; those that wait stay unanswered.
cdef void slow_end(slow_t* s) noexcept nogil
cdef bint slow_idle(slow_t* s) noexcept nogil
