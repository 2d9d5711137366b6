# SPDX-License-Identifier: Apache-2.0
"""What the workers of a lane do: how they read requests, answer them, rest, and help each other.

No worker takes the GIL, so Python may wait for them while it holds it. Their memory, start and end are in
workers.pxd.

* Only worker 0 always reads. The others rest until there is work for two: a long request while nobody reads,
  or, looked for at every eighth request, more requests waiting. The kernel wakes all readers of a connection
  in turns, and a second reader would cost a single client the warm caches of the first (4 KiB reads at depth
  1: 7.2 us of CPU with it, 5.0 us without).
* Resting workers take pieces of a large request when no other request waits (`job_t` in worker.pxd): 1 MiB
  writes at depth 1 gain 25 %, reads up to 15 %.
* A worker may look for the next request for a while before it sleeps, because waking it costs more than the
  request (4 KiB reads at depth 1 on a virtual machine: 40 us with sleep, 18 us without; through a loop device
  40 and 24). It does so only while requests come singly and soon after each other, so that an idle device
  costs nothing and a client with a deep queue keeps the CPUs.
* Requests that need the backing store are done by slow workers; see slow.pxd.
"""
from libc.stdint cimport uint8_t, uint64_t

from allocator.prim cimport pthread_mutex_t
from zramfs.lane.kept cimport kept_hand
from zramfs.lane.slow cimport SLOW_SPARES, SLOW_THREADS, pthread_cond_t, slow_t
from zramfs.lane.worker cimport lane_shared_t, worker_t

cdef enum:
    MAX_THREADS = 64

cdef extern from "pthread.h" nogil:
    ctypedef unsigned long pthread_t

cdef extern from "poll.h" nogil:
    struct pollfd:
        int fd
        short events
    int poll(pollfd* fds, unsigned long n, int timeout_ms)
    enum: POLLIN

# Unmarked fields are constant once the workers run.
cdef struct worker_thread_t:
    worker_t w
    lane_t* lane
    int index
    kept_hand* hand             # what the keeper sees of it
    unsigned int requests       # read so far, wraps
    bint long_request           # the last one
    bint hopeful                # the next request will probably come while we look for it
    unsigned int row            # requests since the last that had to be waited for
    unsigned int calm           # waits in a row that were short and followed few requests
    unsigned int misses         # unsuccessful looks since the last successful one
    unsigned int alone          # long requests in a row after which no other waited and somebody read
    pthread_t id
    uint64_t running            # atomic: 1 until the thread is past its last request
    uint64_t unlocked           # bytes that mlock refused

cdef struct lane_t:
    lane_shared_t shared
    int fd                      # the connection; /dev/null in its place once the last thread ended
    int null_fd
    int done_fd                 # readable once the last thread ended
    int count                   # threads with memory
    int created                 # threads to join
    uint64_t live               # atomic: threads that have not ended
    uint64_t reading            # atomic: threads that wait for a request or are about to
    uint64_t resting            # atomic, written under rest_lock: workers that wait to be woken
    uint64_t woken              # under rest_lock: how many of them were woken
    uint64_t blocked            # atomic, written under rest_lock: threads that wait for the backing store;
                                # nobody rests then
    pthread_mutex_t rest_lock
    pthread_cond_t rest_over
    uint64_t poll_ns            # how long a thread looks for a request before it sleeps; 0 = not at all
    uint64_t polling            # atomic: 1 while one does
    uint64_t stopping           # atomic
    uint64_t end_errno          # atomic: of a read that failed otherwise than by unmount or abort
    worker_thread_t* threads[MAX_THREADS]
    slow_t* slow                # NULL: none yet; written once, under rest_lock
    worker_thread_t* slow_threads[SLOW_THREADS]
    uint8_t* spares[SLOW_SPARES]    # the mappings of the buffers that slow_t hands round
    int slow_count              # slow threads with memory
    int slow_created            # slow threads to join

# What a lane thread and a slow thread do until the connection ends or all have to; arg is the
# worker_thread_t.
cdef void* worker_serve(void* arg) noexcept nogil
cdef void* slow_worker_serve(void* arg) noexcept nogil
# No thread begins another request; those that rest, or wait for one, end.
cdef void lane_stop_workers(lane_t* lane) noexcept nogil
# `threads` workers have ended; the last one gives the connection up.
cdef void lane_drop_workers(lane_t* lane, uint64_t threads) noexcept nogil
# Wakes at most `threads` of the workers that rest; arg is the lane_t (lane_shared_t.wake_workers).
cdef void lane_wake_workers(void* arg, uint64_t threads) noexcept nogil
# True if requests wait in the kernel's queue.
cdef bint lane_has_requests(lane_t* lane) noexcept nogil
