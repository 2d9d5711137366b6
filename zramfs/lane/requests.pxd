# SPDX-License-Identifier: Apache-2.0
"""One request of the FUSE protocol: the function that answers, and what a thread asks before and after."""
from libc.stdint cimport uint64_t

from zramfs.lane.worker cimport worker_t

cdef size_t PUT_OFF           # result of answer()

# Answers the request of `got` bytes that was read to w.data - REQUEST_HEAD. The reply stands at
# w.data - REPLY_HEAD; the result is its length, 0 if the request wants none. PUT_OFF: it needs the
# backing store, for which the thread may not wait. The same request with the same began and done, from
# a thread that may, goes on where this one stopped.
cdef size_t answer(worker_t* w, size_t got) noexcept nogil
# Bytes of data that the request of `got` bytes wants read or written.
cdef uint64_t payload_of(const worker_t* w, size_t got) noexcept nogil
# True if the request of `got` bytes, with that many bytes of data, will probably take so long that another
# thread had better read the next one meanwhile.
cdef bint takes_long(const worker_t* w, size_t got, uint64_t payload) noexcept nogil
# Makes the reply at w.data - REPLY_HEAD an error without data.
cdef size_t refuse(worker_t* w, uint64_t unique, int error) noexcept nogil
