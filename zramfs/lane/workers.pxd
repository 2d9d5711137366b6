# SPDX-License-Identifier: Apache-2.0
"""The workers of a lane: their memory, their start and their end.

A lane thread and a slow thread are both workers. All of their memory is allocated and locked before they
start. What they do then is in serve.pyx.
"""
from libc.stdint cimport uint64_t

from zramfs.lane.serve cimport lane_t

# Of zeroed memory.
cdef void lane_init(lane_t* lane) noexcept nogil
# Memory and buffers of one more thread: 0 or an errno.
cdef int lane_add_worker(lane_t* lane) noexcept nogil
# Memory of the slow threads, unless they have it: 0 or an errno.
cdef int lane_add_slow_workers(lane_t* lane) noexcept nogil
# Starts those that have memory and do not run: 0 or an errno. lane_start does so by itself.
cdef int lane_start_slow_workers(lane_t* lane) noexcept nogil
# Starts all threads: 0 or an errno; after an error, lane_stop and lane_join.
cdef int lane_start(lane_t* lane) noexcept nogil
# Asks all threads to end and returns when they have.
cdef void lane_stop(lane_t* lane) noexcept nogil
# True if the last thread ended, after at most timeout_ms.
cdef bint lane_wait_end(lane_t* lane, int timeout_ms) noexcept nogil
# After the last thread ended: frees what the threads library holds of them.
cdef void lane_join(lane_t* lane) noexcept nogil
# True if no request waits in the kernel's queue and none is being served.
cdef bint lane_is_idle(lane_t* lane) noexcept nogil
# Requests that the lane's own threads have answered so far.
cdef uint64_t lane_requests_served(lane_t* lane) noexcept nogil
# Frees the threads' memory and closes all descriptors.
cdef void lane_free(lane_t* lane) noexcept nogil
