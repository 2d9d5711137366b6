# SPDX-License-Identifier: Apache-2.0
"""The lane: serves one FUSE connection whose root is a regular file, the device."""
cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport ECONNABORTED, ENODEV, ENOENT, ENOTCONN, errno
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from posix.unistd cimport getgid, getuid, write

import os
import time

from allocator.prim cimport cas64, load64, peek64
from zramfs.lane.workers cimport (
    lane_add_slow_workers, lane_add_worker, lane_free, lane_init, lane_is_idle, lane_join, lane_start,
    lane_start_slow_workers, lane_stop, lane_wait_end,
)
from zramfs.lane.fuse_abi cimport (
    FUSE_HAS_RESEND, FUSE_KERNEL_VERSION, FUSE_NOTIFY_INVAL_INODE, FUSE_NOTIFY_RESEND, FUSE_NOTIFY_STORE,
    FUSE_ROOT_ID, ZRAMFS_FUSE_MINOR_MIN, fuse_notify_inval_inode_out, fuse_notify_store_out, fuse_out_header,
)
from zramfs.lane.kept cimport (
    KEPT_BUCKETS, KEPT_BYTES, KEPT_GROUPS, KEPT_VERSION, count_opens, page_map, page_take_over,
)
from zramfs.lane.metadata cimport REFUSED
from zramfs.lane.opens cimport CLAIMED, TRUNCATING
from zramfs.store.ranges cimport store_disksize
from zramfs.store.slots cimport store_ctx_t, store_t
from zramfs.model.kernel_pages import expect_kernel_pages
from zramfs.model.stats import BUCKET_BOUNDS as _BUCKET_BOUNDS, LaneStats, Latency, OPERATIONS as _OPERATIONS
from zramfs.store.store cimport Store
from zramfs.store.tables cimport store_ctx_free, store_ctx_new
from zramfs.lane.serve cimport MAX_THREADS, SLOW_THREADS, lane_t, worker_thread_t
from zramfs.lane.worker cimport (
    BUCKET_SHIFT, BUCKETS, DISCARDS, GROUPS, READS, WRITES, lane_shared_t, worker_lock, worker_t,
    worker_unlock,
)

cdef extern from "sys/eventfd.h" nogil:
    int eventfd(unsigned int value, int flags)
    enum: EFD_CLOEXEC

assert _BUCKET_BOUNDS == tuple([1 << BUCKET_SHIFT + i for i in range(BUCKETS - 1)])
assert _OPERATIONS.index("discard") == DISCARDS == GROUPS - 1
assert (KEPT_GROUPS, KEPT_BUCKETS) == (GROUPS, BUCKETS)

PAGE_BYTES = KEPT_BYTES      # of what outlives the lane
PAGE_VERSION = KEPT_VERSION  # of its layout

cdef struct inval_inode_t:
    fuse_out_header head
    fuse_notify_inval_inode_out body

cdef struct store_byte_t:
    fuse_out_header head
    fuse_notify_store_out body
    char byte

cdef size_t STORE_BYTE = sizeof(fuse_out_header) + sizeof(fuse_notify_store_out) + 1


@cython.no_gc_clear     # the threads use the store until __dealloc__ has joined them
@cython.final
cdef class Lane:
    """Serves one FUSE connection whose root is a regular file: the device.

    fd is a descriptor of /dev/fuse from mounting.mount_file(); once the constructor has returned
    it belongs to the lane. poll_us: how many microseconds a thread may look for the next request
    before it sleeps (at most 10 000), 0 = it sleeps at once. page: a memfd of KEPT_BYTES zero bytes, or as a
    predecessor left it (kept_page.h), or -1. takeover: a predecessor on the same connection and page is dead;
    what it has read and not answered comes again, and `blamed` says how many requests are refused because
    they ended several in a row. Raises ValueError for a number of threads outside 1 to 64 or another
    poll_us, OSError if memory or descriptors are short, ZramfsError(EOPNOTSUPP) on a kernel whose pages are
    not of 4 KiB.
    """
    def __cinit__(self, int fd, *, int threads=2, int poll_us=0, int page=-1, bint takeover=False):
        cdef lane_shared_t* shared
        cdef int err
        expect_kernel_pages()
        if not 1 <= threads <= MAX_THREADS:
            raise ValueError(f"expected 1 to {MAX_THREADS} threads, got {threads}")
        if not 0 <= poll_us <= 10_000:
            raise ValueError(f"expected 0 to 10000 microseconds of polling, got {poll_us}")
        self.lane = <lane_t*> calloc(1, sizeof(lane_t))
        if self.lane == NULL:
            raise MemoryError
        self.threads = threads
        lane_init(self.lane)
        self.lane.null_fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self.lane.done_fd = eventfd(0, EFD_CLOEXEC)
        if self.lane.done_fd < 0:
            raise OSError(errno, f"no descriptor to tell the end of the lane: {os.strerror(errno)}")
        shared = &self.lane.shared
        err = page_map(page, &shared.kept)
        if err:
            raise OSError(err, f"the page that outlives the lane can't be mapped: {os.strerror(err)}")
        for _ in range(threads):
            err = lane_add_worker(self.lane)
            if err:
                raise OSError(err, f"no memory for the buffers of {threads} threads: {os.strerror(err)}")
        os.set_blocking(fd, True)
        shared.threads = threads
        self.takeover = takeover
        if takeover:
            shared.opens = count_opens(shared.kept)
            self.blamed = page_take_over(shared.kept)
        else:
            shared.kept.mode = 0o600
            shared.kept.uid, shared.kept.gid = getuid(), getgid()
            shared.kept.atime = shared.kept.mtime = shared.kept.ctime = <uint64_t> time.time_ns()
        self.lane.poll_ns = <uint64_t> poll_us * 1000
        self.lane.fd = fd

    def __dealloc__(self):
        if self.lane == NULL:
            return
        if self.lane.created:
            with nogil:
                lane_stop(self.lane)
            lane_join(self.lane)
        self._exchange(NULL, NULL)
        lane_free(self.lane)
        free(self.lane)

    def start(self) -> None:
        """Starts the threads. The kernel's INIT is answered from here on; a store may be set before
        or later. Raises RuntimeError the second time, OSError if a thread cannot be made."""
        cdef int err
        if self.started:
            raise RuntimeError("this lane was started before; a lane serves one connection, once")
        self.started = True
        if self.takeover:
            self._resend()
        err = lane_start(self.lane)
        if err:
            self.abort()
            lane_join(self.lane)
            raise OSError(err, f"cannot start {self.threads} threads: {os.strerror(err)}")

    cdef int _resend(self) except -1:
        """Before the first read: what a predecessor has read and not answered comes again, first of all."""
        cdef fuse_out_header resend
        cdef ssize_t sent
        memset(&resend, 0, sizeof(resend))
        resend.len = sizeof(resend)
        resend.error = FUSE_NOTIFY_RESEND
        with nogil:
            sent = write(self.lane.fd, &resend, sizeof(resend))
        if sent < 0 and errno not in (ENODEV, ECONNABORTED, ENOTCONN):
            raise OSError(errno, "the kernel (before Linux 6.9?) sends nothing again: " + os.strerror(errno))
        return 0

    def join(self, timeout: float | None = None) -> bool:
        """Waits until all threads have ended, at most timeout seconds. True if they have; the store
        is then no longer used. Raises RuntimeError before start()."""
        cdef int ms = 200       # between looks for signals that another thread received
        if not self.started:
            raise RuntimeError("nothing to wait for: call start() first")
        end = None if timeout is None else time.monotonic() + timeout
        while not lane_wait_end(self.lane, 0):
            if end is not None:
                left = end - time.monotonic()
                if left <= 0:
                    return False
                ms = min(200, int(left * 1000) + 1)
            with nogil:
                lane_wait_end(self.lane, ms)
            PyErr_CheckSignals()
        # Under the GIL throughout: of several callers each returns with the store released.
        lane_join(self.lane)
        self._exchange(NULL, NULL)
        self.store = None
        return True

    def abort(self) -> None:
        """Ends the threads and gives up the connection, which the kernel then aborts: open files get
        ECONNABORTED or ENOTCONN. Returns when the last request that was read is answered."""
        if self.started:
            with nogil:
                lane_stop(self.lane)

    def set_store(self, Store store) -> None:
        """Replaces the store; None makes a device without a size, whose I/O gets ENXIO. Raises
        RuntimeError unless the lane is claimed or does not run, MemoryError, ValueError for a
        closed store."""
        cdef store_ctx_t* fresh[MAX_THREADS + SLOW_THREADS]
        cdef store_t* st = NULL
        cdef int i, j
        if self.alive and not load64(&self.lane.shared.opens) & CLAIMED:
            raise RuntimeError("the store of a running lane can be replaced only after claim()")
        if store is not None:
            st = store.st
            if st == NULL:
                raise ValueError("expected an open store, got a closed one")
            if st.backing != NULL:
                self._start_slow()
            for i in range(self.lane.count + self.lane.slow_count):
                fresh[i] = store_ctx_new(st)
                if fresh[i] == NULL:
                    for j in range(i):
                        store_ctx_free(fresh[j])
                    raise MemoryError(f"no memory for the codec workspaces of {self.threads} threads")
        with nogil:
            self._exchange(st, fresh)
        self.store = store

    cdef int _start_slow(self) except -1:
        """The threads that wait for the backing store, from now on or from start()."""
        if lane_add_slow_workers(self.lane) != 0:
            raise MemoryError(f"no memory for the buffers of {SLOW_THREADS} threads for the backing store")
        if self.alive and lane_start_slow_workers(self.lane) != 0:
            raise MemoryError(f"cannot start {SLOW_THREADS} threads for the backing store")
        return 0

    cdef void _exchange(self, store_t* st, store_ctx_t** fresh) noexcept nogil:
        """Gives every thread the store and a context of its own, and frees those it had. st NULL:
        no store; fresh is not looked at then."""
        cdef store_ctx_t* old
        cdef worker_t* w
        cdef int i
        for i in range(self.lane.count + self.lane.slow_count):
            w = &self._thread(i).w
            worker_lock(w)
            old = w.ctx
            w.st = st
            w.ctx = NULL
            if st != NULL:
                fresh[i].steps = &self._thread(i).hand.steps
                w.ctx = fresh[i]
            worker_unlock(w)
            if old != NULL:
                store_ctx_free(old)

    cdef worker_thread_t* _thread(self, int i) noexcept nogil:
        """The lane's own threads, then the slow ones."""
        if i < self.lane.count:
            return self.lane.threads[i]
        return self.lane.slow_threads[i - self.lane.count]

    def wait_unused(self) -> bool:
        """True as soon as nobody has the device open. close(2) returns before its RELEASE is answered, so
        this waits until the requests already sent have been, at most 100 looks, which are 0.1 s of an idle
        machine: whoever answers them waits for a CPU as long as the looks do."""
        cdef uint64_t* opens = &self.lane.shared.opens
        quiet = looks = 0
        while load64(opens) != 0:
            # Ten quiet ones: a request that was just read is in no queue and not yet marked as served.
            quiet = quiet + 1 if lane_is_idle(self.lane) else 0
            looks += 1
            if load64(opens) & CLAIMED or quiet == 10 or looks == 100:
                return False
            time.sleep(0.001)
        return True

    def claim(self) -> bool:
        """True if nobody has the device open, after wait_unused(); from then on OPEN answers EBUSY until
        release_claim()."""
        while self.wait_unused():
            if cas64(&self.lane.shared.opens, 0, CLAIMED):
                return True
        return False

    def release_claim(self) -> None:
        """Lets the device be opened again. Raises RuntimeError if it was not claimed."""
        if not cas64(&self.lane.shared.opens, CLAIMED, 0):
            raise RuntimeError("release_claim() without a successful claim()")

    def notify_size(self) -> None:
        """Tells the kernel that size and content have changed: it drops attributes and mapped pages, and
        takes the new size. The lane must be claimed. Raises OSError if the kernel refuses."""
        self._drop_known(0)
        if self.store is not None:
            self._show_end()

    def notify_resize(self, bint larger) -> None:
        """The same for a device that may be open and mapped: its content stays, and so do mapped pages. A
        smaller size is what the kernel asks for next, when somebody looks (stat). Raises OSError."""
        self._drop_known(-1)
        if larger and self.store is not None:
            self._show_end()

    cdef int _drop_known(self, int64_t offset) except -1:
        """What the kernel knows: attributes, and mapped pages from an offset on; -1: none of these."""
        cdef inval_inode_t inval
        memset(&inval, 0, sizeof(inval))
        inval.head.len = sizeof(inval)
        inval.head.error = FUSE_NOTIFY_INVAL_INODE
        inval.body.ino = FUSE_ROOT_ID
        inval.body.off = offset
        self._notify(&inval, sizeof(inval))
        return 0

    cdef int _show_end(self) except -1:
        """Has the kernel take a size that is larger than the one it knows."""
        cdef store_byte_t last
        # The kernel drops the answer to a GETATTR if a write ends meanwhile, and then keeps the size that it
        # knew before: 0, in which any access to a mapping is a SIGBUS (docs/concurrency.md). A byte at the
        # end makes it take the size at once. The byte's page counts as unread, so its value is never seen.
        memset(&last, 0, sizeof(last))
        last.head.len = STORE_BYTE
        last.head.error = FUSE_NOTIFY_STORE
        last.body.nodeid = FUSE_ROOT_ID
        last.body.offset = store_disksize(self.store.st) - 1
        last.body.size = 1
        self._notify(&last, STORE_BYTE)
        return 0

    cdef int _notify(self, const void* message, size_t size) except -1:
        cdef ssize_t sent
        with nogil:
            sent = write(self.lane.fd, message, size)
        # ENOENT: the kernel does not know the file yet; the others: the connection has ended.
        if sent < 0 and errno not in (ENOENT, ENODEV, ECONNABORTED, ENOTCONN):
            raise OSError(errno, "the kernel refused the change of size: " + os.strerror(errno))
        return 0

    @property
    def alive(self) -> bool:
        """True from start() until the last thread has ended."""
        return bool(self.started and load64(&self.lane.live))

    @property
    def open_count(self) -> int:
        """Open files on the device; 0 while claimed."""
        return load64(&self.lane.shared.opens) & ~(CLAIMED | TRUNCATING)

    @property
    def done_fd(self) -> int:
        """A descriptor that becomes readable when the last thread has ended, to wait for without
        a thread. It belongs to the lane."""
        return self.lane.done_fd

    @property
    def error(self) -> str | None:
        """Why the lane cannot serve or ended, if it was not unmount, abort or abort()."""
        cdef uint64_t refused = load64(&self.lane.shared.refused)
        cdef uint64_t number = load64(&self.lane.end_errno)
        if refused:
            refused &= ~REFUSED
            return (f"this kernel speaks FUSE {refused >> 32}.{refused & 0xFFFFFFFF}; zramfs needs "
                    f"{FUSE_KERNEL_VERSION}.{ZRAMFS_FUSE_MINOR_MIN} (Linux 3.15) or newer")
        if number:
            return f"reading requests from the kernel failed: {os.strerror(number)}"
        return None

    def stats(self) -> LaneStats:
        """Counters since the first predecessor's start; consistent only while nothing is in flight."""
        cdef lane_shared_t* shared = &self.lane.shared
        cdef uint64_t counts[GROUPS][BUCKETS]
        cdef worker_thread_t* t
        cdef int i, g, b
        nbytes, ns = [0] * GROUPS, [0] * GROUPS
        memset(counts, 0, sizeof(counts))
        bad = replies = unlocked = longest = helped = large = busy = 0
        for i in range(self.lane.count + self.lane.slow_count):
            t = self._thread(i)
            for g in range(GROUPS):
                for b in range(BUCKETS):
                    counts[g][b] += peek64(&t.w.counts.ios[g][b])
                nbytes[g] += peek64(&t.w.counts.nbytes[g])
                ns[g] += peek64(&t.w.counts.ns[g])
            bad += peek64(&t.w.counts.protocol_errors)
            replies += peek64(&t.w.counts.reply_errors)
            unlocked += t.unlocked
            helped += peek64(&t.w.counts.helped)
            large += peek64(&t.w.counts.refused_sizes)
            busy += peek64(&t.w.counts.busy_truncations)
            longest = max(longest, peek64(&t.w.counts.longest_ns))
        latency = []
        for g in range(GROUPS):
            latency.append(Latency(tuple([counts[g][b] for b in range(BUCKETS)]), ns[g]))
        ios = [each.count for each in latency]
        ms = [n // 1_000_000 for n in ns]
        return LaneStats(
            ios[READS], nbytes[READS] // 512, ms[READS],
            ios[WRITES], nbytes[WRITES] // 512, ms[WRITES],
            peek64(&shared.in_flight), peek64(&shared.kept.io_ns) // 1_000_000, sum(ns) // 1_000_000,
            ios[DISCARDS], nbytes[DISCARDS] // 512, ms[DISCARDS],
            bad, longest // 1000, replies, unlocked, helped,
            peek64(&shared.kept.minor), bool(peek64(&shared.kept.flags) & FUSE_HAS_RESEND), tuple(latency),
            peek64(&self.lane.slow.put_off) if self.lane.slow != NULL else 0,
            peek64(&self.lane.slow.refused) if self.lane.slow != NULL else 0,
            large, busy,
        )
