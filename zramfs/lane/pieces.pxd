# SPDX-License-Identifier: Apache-2.0
"""Large requests, cut into pieces that several threads of a lane work on; job_t in worker.pxd is one."""
from libc.stdint cimport int64_t, uint64_t

from zramfs.lane.worker cimport worker_t

# Moves n bytes at off between the device and w.data, with the help of other threads where it pays: 0 or a
# negative errno. -EAGAIN: a page is on the backing store, and the thread may not wait for that.
cdef int64_t transfer_range(worker_t* w, uint64_t off, uint64_t n, bint writes) noexcept nogil
# Works on the job of another thread as long as it has pieces to take. True if there were some.
cdef bint help_with_pieces(worker_t* w, worker_t* owner) noexcept nogil
