# SPDX-License-Identifier: Apache-2.0
"""FUSE operations that move no data of the device: its attributes, INIT, STATFS.

Each returns the bytes of its reply at w.data, or a negative errno, or VIOLATION. arg: the request behind
its header, as long as the operation's struct in fuse_abi.pxd (INIT: of room bytes).
"""
from libc.stdint cimport int64_t, uint8_t, uint64_t

from zramfs.lane.fuse_abi cimport fuse_setattr_in
from zramfs.lane.worker cimport worker_t

cdef uint64_t REFUSED         # bit of server_t.refused

cdef int64_t attributes(worker_t* w) noexcept nogil     # GETATTR
# SETATTR, but for the size.
cdef int64_t set_attributes(worker_t* w, const fuse_setattr_in* a) noexcept nogil
cdef int64_t do_statfs(worker_t* w) noexcept nogil
cdef int64_t do_init(worker_t* w, const uint8_t* arg, size_t room) noexcept nogil
