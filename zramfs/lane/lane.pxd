# SPDX-License-Identifier: Apache-2.0
cimport cython
from libc.stdint cimport int64_t, uint64_t

from zramfs.store.slots cimport store_ctx_t, store_t
from zramfs.store.store cimport Store
from zramfs.lane.serve cimport lane_t, worker_thread_t


@cython.final
cdef class Lane:
    cdef lane_t* lane               # constant, and there as long as the lane
    cdef Store store
    cdef readonly int threads
    cdef readonly uint64_t blamed
    cdef bint started
    cdef bint takeover
    cdef object __weakref__
    cdef int _start_slow(self) except -1
    cdef int _resend(self) except -1
    cdef int _drop_known(self, int64_t offset) except -1
    cdef int _show_end(self) except -1
    cdef int _notify(self, const void* message, size_t size) except -1
    cdef void _exchange(self, store_t* st, store_ctx_t** fresh) noexcept nogil
    cdef worker_thread_t* _thread(self, int i) noexcept nogil
