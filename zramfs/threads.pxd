# SPDX-License-Identifier: Apache-2.0
"""The threads that serve a connection: their memory, start, work and end. None takes the GIL, so
waiting for them with the GIL held is safe."""
from libc.stdint cimport uint64_t

from zramfs.requests cimport server_t, worker_t

cdef enum:
    MAX_THREADS = 64

cdef extern from "pthread.h" nogil:
    ctypedef unsigned long pthread_t

# Fields without a word on who writes them are constant once the threads run.
cdef struct thread_t:
    worker_t w
    crew_t* crew
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
    uint64_t stopping           # atomic
    uint64_t end_errno          # atomic: of a read that failed otherwise than by unmount or abort
    thread_t* threads[MAX_THREADS]

# Memory and buffers of one more thread: 0 or an errno.
cdef int crew_add(crew_t* crew) noexcept nogil
# Starts all threads: 0 or an errno; after an error, crew_stop and crew_join.
cdef int crew_start(crew_t* crew) noexcept nogil
# Asks all threads to end and returns when they have.
cdef void crew_stop(crew_t* crew) noexcept nogil
# True if the last thread ended, after at most timeout_ms.
cdef bint crew_wait(crew_t* crew, int timeout_ms) noexcept nogil
# After the last thread ended: frees what the threads library holds of them.
cdef void crew_join(crew_t* crew) noexcept nogil
# True if no request waits in the kernel's queue and none is in hand.
cdef bint crew_idle(crew_t* crew) noexcept nogil
# Frees the threads' memory and closes all descriptors.
cdef void crew_free(crew_t* crew) noexcept nogil
