# SPDX-License-Identifier: Apache-2.0
"""Who has the device open, and who may truncate it.

A truncation to 0 discards all pages, so it has to be refused while a loop device or another program uses
the device. OPEN and RELEASE are counted in lane_shared_t.opens. A truncation sets a bit there, which keeps
others from opening the device until the truncation has ended.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from zramfs.lane.worker cimport lane_shared_t, worker_t

# Bits of lane_shared_t.opens: nobody may open the device.
cdef uint64_t CLAIMED         # Lane.claim()
cdef uint64_t TRUNCATING      # a truncation is at work

# unique, pid: the number of the request and the task that asks, as in the request's header.
cdef int64_t do_open(worker_t* w, uint64_t unique, uint32_t pid) noexcept nogil
cdef int64_t do_release(worker_t* w, const uint8_t* arg, uint64_t unique) noexcept nogil
# True if nobody but the task that truncates has the device open; end_truncation() has to follow. by_handle:
# it has an open file (ftruncate). Waits up to 50 ms for RELEASE requests that other threads have read.
cdef bint try_truncation(lane_shared_t* s, uint32_t pid, bint by_handle) noexcept nogil
cdef void end_truncation(lane_shared_t* s) noexcept nogil
