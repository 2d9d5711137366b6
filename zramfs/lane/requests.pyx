# SPDX-License-Identifier: Apache-2.0
# Lock: worker_t.lock (worker.pxd), while a request is worked on; the locks of the store are taken under it.
"""The FUSE protocol for one regular file that behaves like a block device of fixed size.

Every length is checked against what was read; a request that does not hold together is answered
with EINVAL and counted. Nothing here blocks, allocates or knows of threads and descriptors.
"""
from libc.errno cimport EAGAIN, EBUSY, EINVAL, EIO, ENOSPC, ENOSYS, ENXIO, EOPNOTSUPP
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from allocator.prim cimport add64, cas64, load64, now_ns, peek64, store64, sub64
from zramfs.lane.fuse_abi cimport *
from zramfs.lane.metadata cimport put_attributes, do_init, do_statfs, set_attributes
from zramfs.lane.opens cimport do_open, do_release, end_truncation, try_truncation
from zramfs.lane.pieces cimport transfer_range
from zramfs.store.ranges cimport store_seek, store_zero
from zramfs.lane.worker cimport *

cdef extern from "unistd.h" nogil:
    enum: SEEK_DATA, SEEK_HOLE

cdef extern from *:
    int clz64 "__builtin_clzll"(uint64_t v) nogil

PUT_OFF = <size_t> -1

cdef enum:
    # Errors the kernel accepts in a reply: -511 to 0.
    MAX_ERRNO = 511
    # Waking another thread costs about 5 us; more than this is worth it. 32 KiB are 10 us to read
    # with lz4 and 60 us to write.
    LONG_BYTES = 32768
    LONG_DISCARD = 1048576
    LONG_NS = 30000

# Result of an operation that needs the backing store and may not wait for it.
cdef int64_t LATER = -100001


cdef void stamp_change(lane_shared_t* s) noexcept nogil:
    cdef uint64_t now = wall_ns()
    store64(&s.kept.mtime, now)
    store64(&s.kept.ctime, now)


# --- I/O statistics, as the block layer counts them

cdef void advance_io_time(lane_shared_t* s, uint64_t now, bint busy) noexcept nogil:
    """Brings io_ns up to now. A thread that loses the race leaves the interval to the winner."""
    cdef uint64_t stamp = peek64(&s.stamp)
    if now > stamp and cas64(&s.stamp, stamp, now) and busy:
        add64(&s.kept.io_ns, now - stamp)


cdef uint64_t io_begin(worker_t* w) noexcept nogil:
    cdef uint64_t now = now_ns()
    if w.began:
        return w.began
    if load64(&w.shared.latest_open):
        store64(&w.shared.latest_open, 0)
    advance_io_time(w.shared, now, add64(&w.shared.in_flight, 1) > 1)
    return now


cdef inline int latency_bucket(uint64_t ns) noexcept nogil:
    """The least i with ns <= 1 << BUCKET_SHIFT + i; the last one has no bound. 14 instructions without
    a branch: 1.4 ns a request with the count itself, where a single counter costs 1.2 ns."""
    cdef int i = 63 - clz64(((ns - (ns != 0)) >> BUCKET_SHIFT) * 2 + 1)
    return min(i, BUCKETS - 1)


cdef int64_t io_later(worker_t* w, uint64_t began) noexcept nogil:
    """The request stays in flight, and is counted when somebody has done it."""
    w.began = began
    return LATER


cdef void io_end(worker_t* w, int group, uint64_t began, uint64_t nbytes) noexcept nogil:
    cdef uint64_t now = now_ns()
    cdef uint64_t ns = now - began
    advance_io_time(w.shared, now, True)
    sub64(&w.shared.in_flight, 1)
    add_count(&w.counts.ios[group][latency_bucket(ns)], 1)
    add_count(&w.counts.nbytes[group], nbytes)
    add_count(&w.counts.ns[group], ns)
    w.last_ns = ns
    if ns > peek64(&w.counts.longest_ns):
        store64(&w.counts.longest_ns, ns)


# --- Operations. Each returns the bytes of its reply at w.data, or a negative errno, or VIOLATION.

cdef int64_t do_read(worker_t* w, const uint8_t* arg) noexcept nogil:
    cdef fuse_read_in a
    cdef uint64_t size = device_size(w)
    cdef uint64_t began, n
    cdef int64_t result
    memcpy(&a, arg, sizeof(a))
    if a.size > MAX_IO:
        return VIOLATION
    if w.st == NULL:
        return -ENXIO
    if a.offset >= size:
        return 0
    n = min(<uint64_t> a.size, size - a.offset)
    began = io_begin(w)
    result = transfer_range(w, a.offset, n, False)
    if result == -EAGAIN:
        return io_later(w, began)
    io_end(w, READS, began, n)
    return result if result < 0 else <int64_t> n


cdef int64_t do_write(worker_t* w, const uint8_t* arg, size_t payload) noexcept nogil:
    """A write past the end is cut there; one that the store refuses is refused as a whole, though
    its first pages may be on the device, as with a disk. A short count would be more precise, but
    the kernel's write-back of mapped pages and loop devices without direct I/O take one for
    success and lose the rest without a word (seen with Linux 6.18).
    """
    cdef fuse_write_in a
    cdef fuse_write_out* out = <fuse_write_out*> w.data
    cdef uint64_t size = device_size(w)
    cdef uint64_t began, n
    cdef int64_t result
    memcpy(&a, arg, sizeof(a))
    if a.size > payload:
        return VIOLATION
    if w.st == NULL:
        return -ENXIO
    if a.offset >= size:
        return -ENOSPC
    n = min(<uint64_t> a.size, size - a.offset)
    began = io_begin(w)
    result = transfer_range(w, a.offset, n, True)
    if result == -EAGAIN:
        return io_later(w, began)
    io_end(w, WRITES, began, n)
    if result < 0:
        return result
    stamp_change(w.shared)
    memset(out, 0, sizeof(out[0]))
    out.size = <uint32_t> n
    return sizeof(out[0])


cdef int64_t do_fallocate(worker_t* w, const uint8_t* arg) noexcept nogil:
    """Ranges as fallocate(2) on a block device has them: KEEP_SIZE cuts at the end, without it a
    range that passes the end is EINVAL, and so is one that starts there."""
    cdef fuse_fallocate_in a
    cdef uint64_t size = device_size(w)
    cdef uint64_t began, n
    cdef int64_t result
    memcpy(&a, arg, sizeof(a))
    if a.offset > <uint64_t> INT64_MAX or a.length > <uint64_t> INT64_MAX - a.offset:
        return VIOLATION
    if a.mode != (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE) and \
            (a.mode & ~<uint32_t> FALLOC_FL_KEEP_SIZE) != FALLOC_FL_ZERO_RANGE:
        return -EOPNOTSUPP
    if w.st == NULL:
        return -ENXIO
    if a.length == 0 or a.offset >= size:
        return -EINVAL
    n = a.length
    if n > size - a.offset:
        if not a.mode & FALLOC_FL_KEEP_SIZE:
            return -EINVAL
        n = size - a.offset
    began = io_begin(w)
    result = store_zero(w.st, w.ctx, a.offset, n, &w.done)
    if result == -EAGAIN:
        return io_later(w, began)
    io_end(w, DISCARDS, began, n)
    if result < 0:
        return result
    stamp_change(w.shared)
    return 0


cdef int64_t do_lseek(worker_t* w, const uint8_t* arg) noexcept nogil:
    cdef fuse_lseek_in a
    cdef fuse_lseek_out* out = <fuse_lseek_out*> w.data
    cdef int64_t result
    memcpy(&a, arg, sizeof(a))
    if a.whence != SEEK_DATA and a.whence != SEEK_HOLE:
        return -EINVAL
    if a.offset >= device_size(w):
        return -ENXIO
    result = store_seek(w.st, a.offset, a.whence == SEEK_HOLE)
    if result < 0:
        return result
    out.offset = <uint64_t> result
    return sizeof(out[0])


cdef int64_t truncate_device(worker_t* w, const fuse_setattr_in* a, uint32_t pid) noexcept nogil:
    """0 or a negative errno. The device keeps its size: a truncation to 0 (open(O_TRUNC), ftruncate)
    discards all pages, since the caller then expects to find zeros where it writes nothing. One to a
    smaller size changes nothing: dd seek=N asks for it and wants to keep what lies before N, and a user
    of a block device does not expect to lose what lies behind. A larger size is EINVAL."""
    cdef uint64_t size = device_size(w), began
    cdef int64_t result
    if a.size > size:
        add_count(&w.counts.refused_sizes, 1)
        return -EINVAL
    if a.size != 0 or size == 0:
        return 0
    if not try_truncation(w.shared, pid, a.valid & FATTR_FH):
        add_count(&w.counts.busy_truncations, 1)
        return -EBUSY
    began = io_begin(w)
    result = store_zero(w.st, w.ctx, 0, size, &w.done)
    io_end(w, DISCARDS, began, size)
    end_truncation(w.shared)
    stamp_change(w.shared)
    return result


cdef int64_t do_setattr(worker_t* w, const uint8_t* arg, uint32_t pid) noexcept nogil:
    cdef fuse_setattr_in a
    cdef int64_t result = 0
    memcpy(&a, arg, sizeof(a))
    if max(a.atimensec, a.mtimensec, a.ctimensec) >= NS_PER_SECOND:
        return VIOLATION
    if a.valid & FATTR_SIZE:
        result = truncate_device(w, &a, pid)
    return result if result < 0 else set_attributes(w, &a)


cdef size_t argument_size(uint32_t opcode) noexcept nogil:
    """Bytes that must follow the request's header."""
    if opcode == FUSE_READ:
        return sizeof(fuse_read_in)
    elif opcode == FUSE_WRITE:
        return sizeof(fuse_write_in)
    elif opcode == FUSE_FALLOCATE:
        return sizeof(fuse_fallocate_in)
    elif opcode == FUSE_LSEEK:
        return sizeof(fuse_lseek_in)
    elif opcode == FUSE_GETATTR:
        return sizeof(fuse_getattr_in)
    elif opcode == FUSE_SETATTR:
        return sizeof(fuse_setattr_in)
    elif opcode == FUSE_OPEN:
        return sizeof(fuse_open_in)
    elif opcode == FUSE_RELEASE:
        return sizeof(fuse_release_in)
    elif opcode == FUSE_INIT:
        return 16
    elif opcode == FUSE_INTERRUPT:
        return sizeof(fuse_interrupt_in)
    return 0


cdef int64_t dispatch_request(worker_t* w, const fuse_in_header* h, size_t got) noexcept nogil:
    cdef const uint8_t* arg = w.data - REQUEST_HEAD + sizeof(fuse_in_header)
    cdef uint32_t opcode = h.opcode
    if h.len != got or got < sizeof(fuse_in_header) + argument_size(opcode):
        return VIOLATION
    if opcode == FUSE_INIT:
        return do_init(w, arg, got - sizeof(fuse_in_header))
    elif opcode == FUSE_DESTROY or opcode == FUSE_FORGET or opcode == FUSE_BATCH_FORGET:
        return 0
    elif opcode == FUSE_INTERRUPT:
        return 0                    # no request waits, so there is nothing to interrupt
    elif argument_size(opcode) == 0 and opcode != FUSE_STATFS:
        # FSYNC and FLUSH too: memory has nothing behind it to write to. After the first ENOSYS the kernel
        # takes them for done without asking; it still writes mapped pages before (fuse_fsync, fuse_flush).
        return -ENOSYS
    elif h.nodeid != FUSE_ROOT_ID:
        return VIOLATION
    elif opcode == FUSE_READ:
        return do_read(w, arg)
    elif opcode == FUSE_WRITE:
        return do_write(w, arg, got - REQUEST_HEAD)
    elif opcode == FUSE_FALLOCATE:
        return do_fallocate(w, arg)
    elif opcode == FUSE_LSEEK:
        return do_lseek(w, arg)
    elif opcode == FUSE_GETATTR:
        return put_attributes(w)
    elif opcode == FUSE_SETATTR:
        return do_setattr(w, arg, h.pid)
    elif opcode == FUSE_OPEN:
        return do_open(w, h.unique, h.pid)
    elif opcode == FUSE_RELEASE:
        return do_release(w, arg, h.unique)
    return do_statfs(w)


cdef uint64_t request_payload(const worker_t* w, size_t got) noexcept nogil:
    cdef const uint8_t* request = w.data - REQUEST_HEAD
    cdef fuse_in_header h
    cdef fuse_read_in a
    if got < sizeof(h) + sizeof(a):
        return 0
    memcpy(&h, request, sizeof(h))
    if h.opcode == FUSE_READ:
        memcpy(&a, request + sizeof(h), sizeof(a))
        return a.size
    return got - sizeof(h) - sizeof(a) if h.opcode == FUSE_WRITE else 0


cdef bint request_takes_long(const worker_t* w, size_t got, uint64_t payload) noexcept nogil:
    cdef const uint8_t* request = w.data - REQUEST_HEAD
    cdef fuse_in_header h
    cdef fuse_fallocate_in a
    if payload > LONG_BYTES or w.last_ns > LONG_NS:
        return True
    memcpy(&h, request, sizeof(h))
    if h.opcode == FUSE_FALLOCATE and got >= sizeof(h) + sizeof(a):
        memcpy(&a, request + sizeof(h), sizeof(a))
        return a.length > LONG_DISCARD
    return h.opcode == FUSE_SETATTR         # a truncation may discard all pages


cdef size_t refuse_request(worker_t* w, uint64_t unique, int error) noexcept nogil:
    cdef fuse_out_header* out = <fuse_out_header*> (w.data - REPLY_HEAD)
    out.len = REPLY_HEAD
    out.error = -error
    out.unique = unique
    return REPLY_HEAD


cdef size_t answer_request(worker_t* w, size_t got) noexcept nogil:
    cdef fuse_in_header h
    cdef fuse_out_header* out
    cdef int64_t result
    if got < sizeof(h):
        add_count(&w.counts.protocol_errors, 1)
        return 0                    # too short to name a request to answer
    # The reply is built over the request.
    memcpy(&h, w.data - REQUEST_HEAD, sizeof(h))
    worker_lock(w)
    if w.ctx != NULL:
        w.ctx.may_wait = w.may_wait
    result = dispatch_request(w, &h, got)
    worker_unlock(w)
    if result == LATER:
        return PUT_OFF
    w.began = w.done = 0
    if result == VIOLATION:
        add_count(&w.counts.protocol_errors, 1)
        result = -EINVAL
    if h.opcode == FUSE_FORGET or h.opcode == FUSE_BATCH_FORGET or h.opcode == FUSE_INTERRUPT:
        return 0
    if result < 0:
        return refuse_request(w, h.unique, <int> -result if result >= -MAX_ERRNO else EIO)
    out = <fuse_out_header*> (w.data - REPLY_HEAD)
    out.len = <uint32_t> (REPLY_HEAD + result)
    out.error = 0
    out.unique = h.unique
    return out.len
