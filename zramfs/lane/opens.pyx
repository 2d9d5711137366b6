# SPDX-License-Identifier: Apache-2.0
"""Who has the device open, and who may truncate it; see opens.pxd."""
from libc.errno cimport EBUSY
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.time cimport nanosleep, timespec

from allocator.prim cimport add64, cas64, load64, store64
from zramfs.lane.fuse_abi cimport (
    FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE, FOPEN_PARALLEL_DIRECT_WRITES, fuse_open_out, fuse_release_in,
)
from zramfs.lane.kept cimport FUSE_RESENT, KEPT_OPENS
from zramfs.lane.worker cimport VIOLATION, lane_shared_t, worker_t

CLAIMED = 1 << 63
TRUNCATING = 1 << 62

cdef uint64_t COUNT = ~(CLAIMED | TRUNCATING)
# In lane_shared_t.latest_open, above 31 bits of its file handle and 32 of its pid.
cdef uint64_t UNUSED_SINCE = 1 << 63
cdef uint64_t HANDLES = (1 << 31) - 1

cdef enum:
    # close(2) returns before its RELEASE is answered, so a program that truncates what another has just
    # closed may find it open. The thread that has read the RELEASE needs a CPU, and no more than that.
    GRACE_LOOKS = 50
    LOOK_NS = 1000000


# A handle: the number of its OPEN, and in its lowest bits the place in kept_page.opens, or KEPT_OPENS where
# that is full. So a successor can tell an OPEN and a RELEASE that its predecessor has done and not answered
# from those that are still to be done.
cdef enum:
    PLACE_BITS = 11


cdef uint64_t handle_of(lane_shared_t* s, uint64_t unique) noexcept nogil:
    """Of an OPEN that the predecessor has counted; 0 if it has not."""
    cdef int i
    for i in range(KEPT_OPENS):
        if load64(&s.kept.opens[i]) == unique:
            return unique << PLACE_BITS | <uint64_t> i
    return 0


cdef uint64_t new_handle(lane_shared_t* s, uint64_t unique) noexcept nogil:
    cdef uint64_t place
    cdef int _
    for _ in range(KEPT_OPENS):
        place = add64(&s.handles, 1) % <uint64_t> KEPT_OPENS
        if cas64(&s.kept.opens[place], 0, unique):
            return unique << PLACE_BITS | place
    add64(&s.kept.more_opens, 1)
    return unique << PLACE_BITS | <uint64_t> KEPT_OPENS


cdef bint end_handle(lane_shared_t* s, uint64_t handle) noexcept nogil:
    """False if it is none, or was ended before."""
    cdef uint64_t place = handle & ((1 << PLACE_BITS) - 1), unique = handle >> PLACE_BITS
    cdef uint64_t more = load64(&s.kept.more_opens)
    if unique == 0 or place > <uint64_t> KEPT_OPENS:
        return False
    if place < <uint64_t> KEPT_OPENS:
        return cas64(&s.kept.opens[place], unique, 0)
    while more:
        if cas64(&s.kept.more_opens, more, more - 1):
            return True
        more = load64(&s.kept.more_opens)
    return False


cdef int64_t do_open(worker_t* w, uint64_t unique, uint32_t pid) noexcept nogil:
    cdef lane_shared_t* s = w.shared
    cdef fuse_open_out* out = <fuse_open_out*> w.data
    cdef uint64_t opens = load64(&s.opens), handle = 0
    if unique & FUSE_RESENT:
        unique &= ~<uint64_t> FUSE_RESENT
        handle = handle_of(s, unique)
    while opens <= COUNT:
        if handle != 0 or cas64(&s.opens, opens, opens + 1):
            if handle == 0:
                handle = new_handle(s, unique)
            store64(&s.latest_open, UNUSED_SINCE | (handle & HANDLES) << 32 | pid)
            memset(out, 0, sizeof(out[0]))
            out.fh = handle
            # Pages that shared mappings left in the cache stay valid: the kernel drops what direct
            # writes and discards overlay, and a new mapping and notify_size() drop them all.
            out.open_flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES | FOPEN_KEEP_CACHE
            return sizeof(out[0])
        opens = load64(&s.opens)
    return -EBUSY


cdef int64_t do_release(worker_t* w, const uint8_t* arg, uint64_t unique) noexcept nogil:
    cdef lane_shared_t* s = w.shared
    cdef fuse_release_in a
    cdef uint64_t opens = load64(&s.opens), latest = load64(&s.latest_open)
    memcpy(&a, arg, sizeof(a))
    if latest and (latest & ~UNUSED_SINCE) >> 32 == a.fh & HANDLES:
        cas64(&s.latest_open, latest, 0)
    if not end_handle(s, a.fh):
        return 0 if unique & FUSE_RESENT else VIOLATION
    while opens & COUNT:
        if cas64(&s.opens, opens, opens - 1):
            return 0
        opens = load64(&s.opens)
    return VIOLATION


cdef bint is_own_open(lane_shared_t* s, uint32_t pid) noexcept nogil:
    """True if the latest open file is the caller's, and nobody has read or written since. The kernel sends
    open(O_TRUNC) as OPEN and a SETATTR that names no file, just as truncate(2) by a path. A truncate(2) by
    somebody else must not count a loop device's open file as its own, so the task has to be the same."""
    cdef uint64_t latest = load64(&s.latest_open)
    return latest != 0 and <uint32_t> latest == pid


cdef bint try_truncation(lane_shared_t* s, uint32_t pid, bint by_handle) noexcept nogil:
    cdef uint64_t opens, own
    cdef int looks = 0
    cdef timespec pause
    pause.tv_sec, pause.tv_nsec = 0, LOOK_NS
    while True:
        # In this order, and at each look: a RELEASE takes the caller's own open file out of latest_open
        # first. Else one that is released meanwhile would stand for that of somebody else.
        opens = load64(&s.opens)
        own = 1 if by_handle or is_own_open(s, pid) else 0
        if opens <= own:
            if cas64(&s.opens, opens, opens | TRUNCATING):
                return True
            continue
        # A single thread has answered what was sent before.
        if opens > COUNT or s.threads == 1 or looks == GRACE_LOOKS:
            return False
        nanosleep(&pause, NULL)
        looks += 1


cdef void end_truncation(lane_shared_t* s) noexcept nogil:
    cdef uint64_t opens = load64(&s.opens)
    while not cas64(&s.opens, opens, opens & ~TRUNCATING):
        opens = load64(&s.opens)
