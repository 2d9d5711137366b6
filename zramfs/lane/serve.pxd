# SPDX-License-Identifier: Apache-2.0
"""The threads that serve a connection: how they read, answer, rest and help. None takes the GIL, so
waiting for them with the GIL held is safe. Their memory, start and end: crew.pxd.

The kernel wakes all that read a connection in turns, which costs a single client the warm caches of
the thread that has just served it (4 KiB reads at depth 1: 5.0 us of CPU instead of 7.2). So only
thread 0 always reads, and the others rest until there is work for two: a request that takes long
while nobody reads, or, looked for at every eighth request, more requests waiting. Of a large request
they take pieces when no other is waiting (`job_t` in worker.pxd): 1 MiB writes at depth 1 gain 25 %,
reads up to 15 %.

A thread may look for the next request for a while before it sleeps, because waking it costs more than
the request (4 KiB reads at depth 1 on a virtual machine: 40 us with sleep, 18 us without; through
a loop device 40 and 24). It does so only while requests come singly and soon after each other, so that
an idle device costs nothing and a client with a deep queue keeps the CPUs.

What needs the backing store is done by slow threads, which are there once a store has one; see slow.pxd.
"""
from libc.stdint cimport uint8_t, uint64_t

from allocator.prim cimport pthread_mutex_t
from zramfs.lane.slow cimport SLOW_SPARES, SLOW_THREADS, pthread_cond_t, slow_t
from zramfs.lane.worker cimport server_t, worker_t

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

# Fields without a word on who writes them are constant once the threads run.
cdef struct thread_t:
    worker_t w
    crew_t* crew
    int index
    unsigned int requests       # read so far, wraps
    bint long_request           # the last one
    bint hopeful                # the next request will probably come while we look for it
    unsigned int row            # requests since the last that had to be waited for
    unsigned int calm           # waits in a row that were short and followed few requests
    unsigned int misses         # looks in vain since the last that found one
    unsigned int alone          # long requests in a row after which no other waited and somebody read
    pthread_t id
    uint64_t running            # atomic: 1 until the thread is past its last request
    uint64_t reply_errors       # atomic: replies that the kernel refused for an unexpected reason
    uint64_t unlocked           # bytes that mlock refused

cdef struct crew_t:
    server_t server
    int fd                      # the connection; /dev/null in its place once the last thread ended
    int null_fd
    int done_fd                 # readable once the last thread ended
    int count                   # threads with memory
    int created                 # threads to join
    uint64_t live               # atomic: threads that have not ended
    uint64_t reading            # atomic: threads that wait for a request or are about to
    uint64_t resting            # atomic, written under rest_lock: threads that wait to be called
    uint64_t called             # under rest_lock: how many of them may go on
    uint64_t blocked            # under rest_lock: threads that wait for the backing store; nobody rests then
    pthread_mutex_t rest_lock
    pthread_cond_t rest_over
    uint64_t poll_ns            # how long a thread looks for a request before it sleeps; 0 = not at all
    uint64_t polling            # atomic: 1 while one does
    uint64_t stopping           # atomic
    uint64_t end_errno          # atomic: of a read that failed otherwise than by unmount or abort
    thread_t* threads[MAX_THREADS]
    slow_t* slow                # NULL: none yet; written once, under rest_lock
    thread_t* slow_threads[SLOW_THREADS]
    uint8_t* spares[SLOW_SPARES]    # the mappings of the buffers that slow_t hands round
    int slow_count              # slow threads with memory
    int slow_created            # slow threads to join

# Work of a lane thread and of a slow one, until the connection ends or all have to; arg is the thread_t.
cdef void* serve(void* arg) noexcept nogil
cdef void* serve_slow(void* arg) noexcept nogil
# No thread begins another request; those that rest, or wait for one, end.
cdef void stop_all(crew_t* crew) noexcept nogil
# So many threads less are alive; the last one gives the connection up.
cdef void leave(crew_t* crew, uint64_t threads) noexcept nogil
# Wakes up to so many of those that rest; arg is the crew_t (server_t.summon).
cdef void call(void* arg, uint64_t threads) noexcept nogil
# True if requests wait in the kernel's queue.
cdef bint waiting(crew_t* crew) noexcept nogil
