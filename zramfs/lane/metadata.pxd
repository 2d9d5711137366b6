# SPDX-License-Identifier: Apache-2.0
"""FUSE operations that move no data of the device: its attributes, who has it open, INIT, STATFS.

Each returns the bytes of its reply at w.data, or a negative errno, or VIOLATION. arg: the request behind
its header, as long as the operation's struct in fuse_abi.pxd (INIT: of room bytes).
"""
from libc.stdint cimport int64_t, uint8_t, uint64_t

from zramfs.lane.worker cimport worker_t

cdef uint64_t CLAIMED         # bit of server_t.opens
cdef uint64_t REFUSED         # bit of server_t.refused

cdef int64_t attributes(worker_t* w) noexcept nogil     # GETATTR
cdef int64_t do_setattr(worker_t* w, const uint8_t* arg) noexcept nogil
cdef int64_t do_open(worker_t* w) noexcept nogil
cdef int64_t do_release(worker_t* w) noexcept nogil
cdef int64_t do_statfs(worker_t* w) noexcept nogil
cdef int64_t do_init(worker_t* w, const uint8_t* arg, size_t room) noexcept nogil
