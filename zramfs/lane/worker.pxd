# SPDX-License-Identifier: Apache-2.0
# Lock: worker_t.lock, outermost on the way of a request (docs/concurrency.md).
"""What the threads of a lane share, and what each has of its own."""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from posix.time cimport clock_gettime, timespec

from allocator.prim cimport cas_i32, peek64, relax, store64, store_i32
from zramfs.lane.kept cimport kept_counts, kept_page
from zramfs.store.ranges cimport store_disksize
from zramfs.store.slots cimport store_ctx_t, store_t

cdef extern from "time.h" nogil:
    enum: CLOCK_REALTIME_COARSE

cdef enum:
    MAX_IO = 1048576          # bytes of one READ or WRITE: the kernel's limit of 256 pages
    REQUEST_HEAD = 80         # request header and WRITE arguments: the payload follows
    REPLY_HEAD = 16
    # Requests of this many bytes are worth a second thread, which costs a wake-up.
    SHARED_BYTES = 131072

cdef enum:                    # groups, columns of the block layer's `stat` file
    READS, WRITES, DISCARDS, GROUPS

cdef enum:
    # Of the time that a request takes: up to 1024 ns, 2048 ns ... 17.2 s, and more. A page takes 2 to
    # 100 us; below 1 us nothing is compressed, and above 17 s only the order of magnitude matters.
    BUCKET_SHIFT = 10
    BUCKETS = 26

cdef enum:
    # Result of an operation that found the request itself at fault: EINVAL, and counted.
    VIOLATION = -100000

cdef enum:
    NS_PER_SECOND = 1000000000


# Shared by all threads of a lane; every field is read and written with atomics.
cdef struct lane_shared_t:
    uint64_t opens            # number of open files, and bits (opens.pxd)
    uint64_t handles          # places for open files that were looked at so far
    uint64_t latest_open      # its handle and pid (opens.pyx); 0 once anybody has read or written
    uint64_t refused          # REFUSED | major << 32 | minor of a kernel that is too old
    uint64_t in_flight        # I/O requests being served
    uint64_t stamp            # kept.io_ns is right up to this moment
    uint64_t threads          # that read requests; constant
    kept_page* kept           # what a successor finds: the file's attributes, its open files; constant
    # Wakes at most `threads` workers that rest, to help with a job (pieces.pxd); constant.
    void (*wake_workers)(void* lane, uint64_t threads) noexcept nogil
    void* lane

# A large READ or WRITE, cut into pieces that other threads may take: it ends when the last piece has.
#
#    63                32 31      16 15       0
#    +-------------------+----------+---------+    A piece belongs to the worker that moves `taken` by a
#    | number of the job | pieces   | taken   |    compare-and-swap; the owner waits for done = pieces
#    +-------------------+----------+---------+    before it writes any of the other fields again.
cdef struct job_t:
    uint64_t word             # atomic
    uint32_t done             # atomic: pieces that are over, those left out after an error too
    uint64_t error            # atomic: errno of a piece that failed, 0 = none has
    store_t* st               # written by the owner before the word
    uint8_t* data             # of the first byte
    uint64_t off              # on the device
    uint64_t end
    uint32_t shift            # a piece has 2^shift bytes, and begins on the device at a multiple of them
    bint writes

# One thread. Only the thread itself writes the counters; others read them with atomics.
cdef struct worker_t:
    lane_shared_t* shared
    uint8_t* data             # page aligned, MAX_IO bytes; a request is read to data - REQUEST_HEAD
    int32_t lock              # held while st and ctx are used or replaced
    store_t* st               # NULL: a device without a size
    store_ctx_t* ctx
    job_t job                 # of the request being served
    uint64_t serving          # 1 from the moment a request was read until it is answered
    kept_counts* counts       # constant
    uint64_t last_ns          # of the last I/O request; for the thread itself
    bint may_wait             # for the backing store; for the thread itself, as the next two
    uint64_t began            # when the request was first tried, 0: it was not yet
    uint64_t done             # how far that try came


# Takes and leaves w.lock.
cdef inline void worker_lock(worker_t* w) noexcept nogil:
    cdef unsigned int round = 0
    while not cas_i32(&w.lock, 0, 1):
        relax(round)
        round += 1

cdef inline void worker_unlock(worker_t* w) noexcept nogil:
    store_i32(&w.lock, 0)

# For the times of lane_shared_t.
cdef inline uint64_t wall_ns() noexcept nogil:
    # The coarse clock (a tick, 1 to 10 ms) costs a quarter of the fine one and is what file
    # systems stamp with.
    cdef timespec t
    clock_gettime(CLOCK_REALTIME_COARSE, &t)
    return <uint64_t> (t.tv_sec * NS_PER_SECOND + t.tv_nsec)

cdef inline uint64_t device_size(worker_t* w) noexcept nogil:
    return store_disksize(w.st) if w.st != NULL else 0

# Adds to a counter that only this thread writes: no locked instruction.
cdef inline void add_count(uint64_t* counter, uint64_t v) noexcept nogil:
    store64(counter, peek64(counter) + v)
