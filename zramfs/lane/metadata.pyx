# SPDX-License-Identifier: Apache-2.0
"""FUSE operations that move no data of the device; see metadata.pxd."""
from libc.errno cimport EPROTO
from libc.stdint cimport UINT32_MAX, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from allocator.prim cimport load64, store64
from zramfs.lane.fuse_abi cimport *
from zramfs.store.ranges cimport store_data_bytes
from zramfs.lane.worker cimport *

cdef extern from "sys/stat.h" nogil:
    enum: S_IFREG

REFUSED = 1 << 63

cdef enum:
    PAGE = 4096
    # Requests the kernel may have under way without a task waiting for them (asynchronous direct
    # I/O, read-ahead, RELEASE). Below the client's queue depth it is the limit: its default of 12
    # costs 4 KiB reads 12 % at depth 16 and 14 % at depth 128; 256 gains no more than 64.
    MAX_BACKGROUND = 64
    CONGESTION = 48
    # How long the kernel may keep the attributes, in seconds. Size changes are notified.
    ATTR_SECONDS = 1

# Seconds that fit into int64 nanoseconds: 1677 to 2262.
cdef int64_t MAX_SECONDS = 9223372035


cdef int64_t put_attributes(worker_t* w) noexcept nogil:
    cdef lane_shared_t* s = w.shared
    cdef fuse_attr_out* out = <fuse_attr_out*> w.data
    memset(out, 0, sizeof(out[0]))
    out.attr_valid = ATTR_SECONDS
    out.attr.ino = FUSE_ROOT_ID
    out.attr.size = device_size(w)
    out.attr.blocks = store_data_bytes(w.st) // 512 if w.st != NULL else 0
    out.attr.blksize = PAGE
    out.attr.nlink = 1
    out.attr.mode = <uint32_t> (S_IFREG | load64(&s.kept.mode))
    out.attr.uid = <uint32_t> load64(&s.kept.uid)
    out.attr.gid = <uint32_t> load64(&s.kept.gid)
    put_time(load64(&s.kept.atime), &out.attr.atime, &out.attr.atimensec)
    put_time(load64(&s.kept.mtime), &out.attr.mtime, &out.attr.mtimensec)
    put_time(load64(&s.kept.ctime), &out.attr.ctime, &out.attr.ctimensec)
    return sizeof(out[0])


cdef void put_time(uint64_t ns, uint64_t* seconds, uint32_t* nsec) noexcept nogil:
    cdef int64_t t = <int64_t> ns
    cdef int64_t s = t // NS_PER_SECOND     # C division: towards zero
    if t < s * NS_PER_SECOND:
        s -= 1
    seconds[0] = <uint64_t> s
    nsec[0] = <uint32_t> (t - s * NS_PER_SECOND)


cdef uint64_t get_time(uint64_t seconds, uint32_t nsec) noexcept nogil:
    cdef int64_t s = max(-MAX_SECONDS, min(MAX_SECONDS, <int64_t> seconds))
    return <uint64_t> (s * NS_PER_SECOND + nsec)


cdef int64_t set_attributes(worker_t* w, const fuse_setattr_in* a) noexcept nogil:
    """chmod, chown and utimes."""
    cdef lane_shared_t* s = w.shared
    if a.valid & FATTR_MODE:
        store64(&s.kept.mode, a.mode & 0o7777)
    if a.valid & FATTR_UID:
        store64(&s.kept.uid, a.uid)
    if a.valid & FATTR_GID:
        store64(&s.kept.gid, a.gid)
    if a.valid & FATTR_ATIME:
        store64(&s.kept.atime, wall_ns() if a.valid & FATTR_ATIME_NOW else get_time(a.atime, a.atimensec))
    if a.valid & FATTR_MTIME:
        store64(&s.kept.mtime, wall_ns() if a.valid & FATTR_MTIME_NOW else get_time(a.mtime, a.mtimensec))
    store64(&s.kept.ctime, get_time(a.ctime, a.ctimensec) if a.valid & FATTR_CTIME else wall_ns())
    return put_attributes(w)


cdef int64_t do_statfs(worker_t* w) noexcept nogil:
    cdef fuse_statfs_out* out = <fuse_statfs_out*> w.data
    cdef uint64_t blocks = device_size(w) // PAGE
    cdef uint64_t used = store_data_bytes(w.st) // PAGE if w.st != NULL else 0
    memset(out, 0, sizeof(out[0]))
    out.st.blocks = blocks
    out.st.bfree = out.st.bavail = blocks - min(used, blocks)
    out.st.files = 1
    out.st.bsize = out.st.frsize = PAGE
    out.st.namelen = 255
    return sizeof(out[0])


cdef int64_t do_init(worker_t* w, const uint8_t* arg, size_t room) noexcept nogil:
    """May come at any time: a server that takes over a connection gets the one that its
    predecessor read and did not answer."""
    cdef lane_shared_t* s = w.shared
    cdef zramfs_init_in a
    cdef zramfs_init_out* out = <zramfs_init_out*> w.data
    cdef uint64_t flags
    memset(&a, 0, sizeof(a))
    memcpy(&a, arg, min(room, sizeof(a)))
    memset(out, 0, sizeof(out[0]))
    out.major = FUSE_KERNEL_VERSION
    out.minor = ZRAMFS_FUSE_MINOR
    if a.major > FUSE_KERNEL_VERSION:
        return sizeof(out[0])       # the kernel sends another INIT with our major version
    if a.major < FUSE_KERNEL_VERSION or a.minor < ZRAMFS_FUSE_MINOR_MIN:
        store64(&s.refused, REFUSED | <uint64_t> a.major << 32 | a.minor)
        return -EPROTO
    flags = a.flags
    if flags & FUSE_INIT_EXT:
        flags |= <uint64_t> a.flags2 << 32
    flags &= (FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_ASYNC_DIO | FUSE_ABORT_ERROR | FUSE_MAX_PAGES
              | FUSE_INIT_EXT | FUSE_DIRECT_IO_ALLOW_MMAP | FUSE_HAS_RESEND)
    out.minor = min(a.minor, <uint32_t> ZRAMFS_FUSE_MINOR)
    out.max_readahead = a.max_readahead
    out.flags = <uint32_t> (flags & UINT32_MAX)
    out.flags2 = <uint32_t> (flags >> 32)
    out.max_background = MAX_BACKGROUND
    out.congestion_threshold = CONGESTION
    # A kernel without FUSE_MAX_PAGES (before 7.28) cuts this to its 32 pages by itself.
    out.max_write = MAX_IO
    out.max_pages = MAX_IO // PAGE
    out.time_gran = 1
    store64(&s.kept.flags, flags)
    store64(&s.kept.minor, out.minor)
    return sizeof(out[0])
