# SPDX-License-Identifier: Apache-2.0
"""The crew of a connection: its threads' memory, their start and their end."""
from libc.stdint cimport uint64_t

from zramfs.lane.serve cimport crew_t

# Of zeroed memory.
cdef void crew_init(crew_t* crew) noexcept nogil
# Memory and buffers of one more thread: 0 or an errno.
cdef int crew_add(crew_t* crew) noexcept nogil
# Memory of the slow threads, unless they have it: 0 or an errno.
cdef int crew_add_slow(crew_t* crew) noexcept nogil
# Starts those that have memory and do not run: 0 or an errno. crew_start does so by itself.
cdef int crew_start_slow(crew_t* crew) noexcept nogil
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
# Requests that the lane's own threads have answered so far.
cdef uint64_t crew_served(crew_t* crew) noexcept nogil
# Frees the threads' memory and closes all descriptors.
cdef void crew_free(crew_t* crew) noexcept nogil
