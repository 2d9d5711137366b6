# SPDX-License-Identifier: Apache-2.0
"""The lane: threads without the interpreter that answer a FUSE connection.

Lock order: worker_t.lock is a leaf above the store; nothing else is taken while it is held except
what the store takes itself. No thread of a lane ever takes the GIL, so joining them with the GIL
held is safe.
"""
cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, ECONNABORTED, EINTR, EIO, ENODEV, ENOENT, ENOTCONN, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset, strerror
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_POPULATE, MAP_PRIVATE, PROT_NONE, PROT_READ, PROT_WRITE,
    mlock, mmap, mprotect, munmap,
)
from posix.signal cimport sigaction, sigaction_t, sigaddset, sigdelset, sigemptyset, sigfillset, sigset_t
from posix.unistd cimport close, dup2, getgid, getuid, read, write

from dataclasses import dataclass
import os
import time

from allocator.prim cimport cas64, load64, peek64, store64, sub64
from zramfs.fuse_abi cimport (
    FUSE_HAS_RESEND, FUSE_KERNEL_VERSION, FUSE_NOTIFY_INVAL_INODE, FUSE_ROOT_ID,
    ZRAMFS_FUSE_MINOR_MIN, fuse_notify_inval_inode_out, fuse_out_header,
)
from zramfs.requests cimport (
    CLAIMED, DISCARDS, FLUSHES, GROUPS, MAX_IO, READS, REPLY_HEAD, REQUEST_HEAD, WRITES,
    answer, refuse, server_t, worker_lock, worker_t, worker_unlock,
)
from zramfs.store cimport Store, store_ctx_free, store_ctx_new, store_ctx_t, store_t

cdef extern from "pthread.h" nogil:
    ctypedef unsigned long pthread_t
    ctypedef struct pthread_attr_t:
        pass
    int pthread_attr_init(pthread_attr_t* attr)
    int pthread_attr_setstack(pthread_attr_t* attr, void* stack, size_t size)
    int pthread_attr_destroy(pthread_attr_t* attr)
    int pthread_create(pthread_t* thread, const pthread_attr_t* attr, void* (*f)(void*) noexcept nogil,
                       void* arg)
    int pthread_join(pthread_t thread, void** result)
    int pthread_kill(pthread_t thread, int sig)
    int pthread_setname_np(pthread_t thread, const char* name)
    int pthread_sigmask(int how, const sigset_t* set, sigset_t* old)

cdef extern from "signal.h" nogil:
    enum: SIG_SETMASK, SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV
    int SIGRTMIN

cdef extern from "poll.h" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd* fds, unsigned long n, int timeout_ms)
    enum: POLLIN

cdef extern from "sys/eventfd.h" nogil:
    int eventfd(unsigned int value, int flags)
    enum: EFD_CLOEXEC

cdef extern from "stdio.h" nogil:
    int snprintf(char* to, size_t size, const char* form, ...)

cdef enum:
    MAX_THREADS = 64
    PAGE = 4096
    STACK = 256 * 1024
    # One mapping a thread, locked in memory: guard page, stack, page for the worker, page in whose
    # last 80 bytes a request's head lands, data.
    WORKER_AT = PAGE + STACK
    DATA_AT = WORKER_AT + 2 * PAGE
    REGION = DATA_AT + MAX_IO

cdef struct thread_t:
    worker_t w                  # first: what requests.pyx sees
    lane_t* lane
    pthread_t id
    uint64_t running            # 1 until the thread is past its last system call on the connection
    uint64_t reply_errors
    uint64_t unlocked           # bytes that mlock refused

cdef struct lane_t:
    server_t server
    int fd                      # the connection; /dev/null in its place once the last thread ended
    int null_fd
    int done_fd                 # readable once the last thread ended
    int count
    uint64_t live               # threads that have not ended
    uint64_t stopping
    uint64_t end_errno          # of a read that failed for another reason than unmount or abort
    thread_t* threads[MAX_THREADS]


cdef struct inval_inode_t:
    fuse_out_header head
    fuse_notify_inval_inode_out body


cdef void ignore_signal(int number) noexcept nogil:
    """A handler only so that the signal interrupts a blocking read."""


cdef inline int kick_signal() noexcept nogil:
    return SIGRTMIN + 7         # glibc keeps the first two; no library we use takes this one


cdef bint reply(thread_t* t, size_t size, uint64_t unique) noexcept nogil:
    """Sends the reply at w.data - REPLY_HEAD. False if the connection has ended."""
    cdef int err
    if write(t.lane.fd, t.w.data - REPLY_HEAD, size) >= 0:
        return True
    err = errno
    if err == ENOENT:
        return True             # the caller was killed while the request was in hand
    if err == ENODEV or err == ECONNABORTED or err == ENOTCONN:
        return False
    # A request that stays unanswered hangs its caller for ever: end it with an error. If the
    # kernel had already ended it, this one gets ENOENT.
    store64(&t.reply_errors, peek64(&t.reply_errors) + 1)
    write(t.lane.fd, t.w.data - REPLY_HEAD, refuse(&t.w, unique, EIO))
    return True


cdef void* serve(void* arg) noexcept nogil:
    cdef thread_t* t = <thread_t*> arg
    cdef lane_t* lane = t.lane
    cdef uint8_t* request = t.w.data - REQUEST_HEAD
    cdef ssize_t got
    cdef size_t size
    cdef uint64_t unique
    cdef int err
    cdef pollfd wait
    while not load64(&lane.stopping):
        got = read(lane.fd, request, REQUEST_HEAD + MAX_IO)
        if got < 0:
            err = errno
            if err == EINTR or err == ENOENT:
                continue        # ENOENT: the request was withdrawn while it was being read
            if err == EAGAIN:
                wait.fd, wait.events = lane.fd, POLLIN
                poll(&wait, 1, -1)
                continue
            if err != ENODEV and err != ECONNABORTED:
                store64(&lane.end_errno, <uint64_t> err)
            break
        if got == 0:
            break               # a socket's other end was closed
        store64(&t.w.serving, 1)
        unique = (<uint64_t*> request)[1]
        size = answer(&t.w, <size_t> got)
        store64(&t.w.serving, 0)
        if size and not reply(t, size, unique):
            break
    store64(&t.running, 0)
    leave(lane, 1)
    return NULL


cdef void leave(lane_t* lane, uint64_t threads) noexcept nogil:
    cdef uint64_t one = 1
    if sub64(&lane.live, threads) == 0:
        # Nobody will answer any more: give the connection up, so that the kernel fails what waits
        # instead of letting it hang. dup2 keeps the descriptor's number taken.
        dup2(lane.null_fd, lane.fd)
        write(lane.done_fd, &one, sizeof(one))


cdef bint wait_done(lane_t* lane, int timeout_ms) noexcept nogil:
    cdef pollfd wait
    wait.fd, wait.events = lane.done_fd, POLLIN
    return poll(&wait, 1, timeout_ms) > 0


cdef void kick(lane_t* lane) noexcept nogil:
    """Ends all threads. The signal may arrive just before a thread sleeps in read, so it is
    repeated until each has ended."""
    cdef int i
    store64(&lane.stopping, 1)
    while load64(&lane.live) != 0:
        for i in range(lane.count):
            if load64(&lane.threads[i].running):
                pthread_kill(lane.threads[i].id, kick_signal())
        if wait_done(lane, 5):
            break


cdef bint idle(lane_t* lane) noexcept nogil:
    """True if no request waits in the kernel's queue and none is in hand."""
    cdef pollfd wait
    cdef int i
    wait.fd, wait.events, wait.revents = lane.fd, POLLIN, 0
    if poll(&wait, 1, 0) > 0:
        return False
    for i in range(lane.count):
        if load64(&lane.threads[i].w.serving):
            return False
    return True


@dataclass(frozen=True, slots=True)
class LaneStats:
    """What a lane has done. The first 16 fields are those of the block layer's `stat` file (sectors
    of 512 bytes, ms), where in_flight counts requests in hand, not those in the kernel's queue."""

    read_ios: int
    read_sectors: int
    read_ms: int
    write_ios: int
    write_sectors: int
    write_ms: int
    in_flight: int
    io_ms: int
    queue_ms: int
    discard_ios: int
    discard_sectors: int
    discard_ms: int
    flush_ios: int
    flush_ms: int
    protocol_errors: int
    longest_us: int
    reply_errors: int
    unlocked_bytes: int
    protocol_minor: int
    can_resend: bool


@cython.no_gc_clear     # the threads use the store until __dealloc__ has joined them
@cython.final
cdef class Lane:
    """Serves one FUSE connection whose root is a regular file: the device.

    fd is a descriptor of /dev/fuse from mounting.mount_file(); once the constructor has returned
    it belongs to the lane. Raises ValueError for a number of threads outside 1 to 64, OSError if
    memory or descriptors are short.
    """
    cdef lane_t* lane
    cdef object store
    cdef readonly int threads
    cdef bint started
    cdef int created            # threads to join
    cdef object __weakref__

    def __cinit__(self, int fd, *, int threads=2):
        cdef int i
        if not 1 <= threads <= MAX_THREADS:
            raise ValueError(f"expected 1 to {MAX_THREADS} threads, got {threads}")
        self.lane = <lane_t*> calloc(1, sizeof(lane_t))
        if self.lane == NULL:
            raise MemoryError
        self.threads = threads
        self.lane.fd = self.lane.null_fd = self.lane.done_fd = -1
        self.lane.null_fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self.lane.done_fd = eventfd(0, EFD_CLOEXEC)
        if self.lane.done_fd < 0:
            raise OSError(errno, "no descriptor for the end of the lane: " + strerror(errno).decode())
        for i in range(threads):
            self._map_thread()
        os.set_blocking(fd, True)
        cdef server_t* server = &self.lane.server
        server.mode = 0o600
        server.uid, server.gid = getuid(), getgid()
        server.atime = server.mtime = server.ctime = <uint64_t> time.time_ns()
        self.lane.fd = fd

    cdef int _map_thread(self) except -1:
        """Makes one thread's memory resident before it can read a request: a page fault under a
        fatal signal gives the caller EIO, and one on swapped-out memory may wait for ourselves."""
        cdef thread_t* t
        cdef uint8_t* base = <uint8_t*> mmap(
            NULL, REGION, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0)
        if base == MAP_FAILED:
            raise OSError(errno, f"no memory for a thread's buffers ({REGION} bytes)")
        mprotect(base, PAGE, PROT_NONE)
        t = <thread_t*> (base + WORKER_AT)
        t.lane = self.lane
        t.w.server = &self.lane.server
        t.w.data = base + DATA_AT
        if mlock(base + PAGE, REGION - PAGE) != 0:
            t.unlocked = REGION - PAGE
        self.lane.threads[self.lane.count] = t
        self.lane.count += 1
        return 0

    def __dealloc__(self):
        cdef int i
        if self.lane == NULL:
            return
        if self.created:
            with nogil:
                kick(self.lane)
            self._join_threads()
        for i in range(self.lane.count):
            if self.lane.threads[i].w.ctx != NULL:
                store_ctx_free(self.lane.threads[i].w.ctx)
            munmap(<uint8_t*> self.lane.threads[i] - WORKER_AT, REGION)
        for fd in (self.lane.fd, self.lane.null_fd, self.lane.done_fd):
            if fd >= 0:
                close(fd)
        free(self.lane)

    def start(self) -> None:
        """Starts the threads. The kernel's INIT is answered from here on; a store may be set before
        or later. Raises RuntimeError the second time, OSError if a thread cannot be made."""
        cdef int err
        if self.started:
            raise RuntimeError("this lane was started before; a lane serves one connection, once")
        self.started = True
        err = self._create_threads()
        if err:
            self.abort()
            self._join_threads()
            raise OSError(err, f"cannot start {self.threads} threads: {os.strerror(err)}")

    cdef int _create_threads(self) noexcept:
        cdef lane_t* lane = self.lane
        cdef sigset_t blocked, before
        cdef sigaction_t action
        cdef pthread_attr_t attr
        cdef char name[16]
        cdef int i, err = 0
        memset(&action, 0, sizeof(action))
        action.sa_handler = ignore_signal
        sigemptyset(&action.sa_mask)
        sigaction(kick_signal(), &action, NULL)
        # Inherited by the threads. Faults stay deliverable so that faulthandler can report them.
        sigfillset(&blocked)
        for i in (SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, kick_signal()):
            sigdelset(&blocked, i)
        pthread_sigmask(SIG_SETMASK, &blocked, &before)
        store64(&lane.live, lane.count + 1)     # one for us: threads may end before all exist
        for i in range(lane.count):
            pthread_attr_init(&attr)
            err = pthread_attr_setstack(&attr, <uint8_t*> lane.threads[i] - STACK, STACK)
            store64(&lane.threads[i].running, 1)
            if err == 0:
                err = pthread_create(&lane.threads[i].id, &attr, serve, lane.threads[i])
            pthread_attr_destroy(&attr)
            if err:
                store64(&lane.threads[i].running, 0)
                leave(lane, lane.count - i)
                break
            self.created += 1
            snprintf(name, sizeof(name), "zramfs-lane%hhu", <unsigned char> i)
            pthread_setname_np(lane.threads[i].id, name)
        leave(lane, 1)
        pthread_sigmask(SIG_SETMASK, &before, NULL)
        return err

    cdef void _join_threads(self) noexcept:
        cdef int i
        for i in range(self.created):
            pthread_join(self.lane.threads[i].id, NULL)
        self.created = 0

    def join(self, timeout: float | None = None) -> bool:
        """Waits until all threads have ended, at most timeout seconds. True if they have; the store
        is then no longer used. Raises RuntimeError before start()."""
        cdef int ms = 200       # between looks for signals that another thread received
        if not self.started:
            raise RuntimeError("nothing to wait for: call start() first")
        end = None if timeout is None else time.monotonic() + timeout
        while not self._ended(0):
            if end is not None:
                left = end - time.monotonic()
                if left <= 0:
                    return False
                ms = min(200, int(left * 1000) + 1)
            self._ended(ms)
            PyErr_CheckSignals()
        if self.created:
            self._join_threads()
            self._bind(None)
        return True

    cdef bint _ended(self, int timeout_ms) noexcept:
        cdef bint result
        with nogil:
            result = wait_done(self.lane, timeout_ms)
        return result

    def abort(self) -> None:
        """Ends the threads and gives up the connection, which the kernel then aborts: open files get
        ECONNABORTED or ENOTCONN. Returns when the last request in hand is answered."""
        if self.started:
            with nogil:
                kick(self.lane)

    def set_store(self, Store store) -> None:
        """Replaces the store; None makes a device without a size, whose I/O gets ENXIO. Raises
        RuntimeError unless the lane is claimed or does not run, MemoryError, ValueError for a
        closed store."""
        if self.alive and not load64(&self.lane.server.opens) & CLAIMED:
            raise RuntimeError("the store of a running lane can be replaced only after claim()")
        if store is not None and store.st == NULL:
            raise ValueError("expected an open store, got a closed one")
        self._bind(store)

    cdef int _bind(self, Store store) except -1:
        cdef store_ctx_t* fresh[MAX_THREADS]
        cdef store_t* st = store.st if store is not None else NULL
        cdef worker_t* w
        cdef int i, j
        for i in range(self.lane.count):
            fresh[i] = store_ctx_new(st) if st != NULL else NULL
            if st != NULL and fresh[i] == NULL:
                for j in range(i):
                    store_ctx_free(fresh[j])
                raise MemoryError(f"no memory for the codec workspaces of {self.threads} threads")
        for i in range(self.lane.count):
            w = &self.lane.threads[i].w
            with nogil:
                worker_lock(w)
                w.st = st
                w.ctx, fresh[i] = fresh[i], w.ctx
                worker_unlock(w)
        for i in range(self.lane.count):
            if fresh[i] != NULL:
                store_ctx_free(fresh[i])
        self.store = store
        return 0

    def claim(self) -> bool:
        """True if nobody has the device open; from then on OPEN answers EBUSY until
        release_claim(). close(2) returns before its RELEASE is answered, so this waits, at most
        0.1 s, until the requests already sent have been."""
        cdef uint64_t* opens = &self.lane.server.opens
        quiet = 0
        end = time.monotonic() + 0.1
        while not cas64(opens, 0, CLAIMED):
            # Five looks: a request that was just read is in no queue and not yet marked as served.
            quiet = quiet + 1 if idle(self.lane) else 0
            if load64(opens) & CLAIMED or quiet == 5 or time.monotonic() > end:
                return False
            time.sleep(0.001)
        return True

    def release_claim(self) -> None:
        """Lets the device be opened again. Raises RuntimeError if it was not claimed."""
        if not cas64(&self.lane.server.opens, CLAIMED, 0):
            raise RuntimeError("release_claim() without a successful claim()")

    def notify_size(self) -> None:
        """Tells the kernel that size and content have changed: it drops attributes and mapped pages.
        Raises OSError if the kernel refuses."""
        cdef inval_inode_t message
        cdef ssize_t sent
        memset(&message, 0, sizeof(message))
        message.head.len = sizeof(message)
        message.head.error = FUSE_NOTIFY_INVAL_INODE
        message.body.ino = FUSE_ROOT_ID
        with nogil:
            sent = write(self.lane.fd, &message, sizeof(message))
        # ENOENT: the kernel does not know the file yet; the others: the connection has ended.
        if sent < 0 and errno not in (ENOENT, ENODEV, ECONNABORTED, ENOTCONN):
            raise OSError(errno, "the kernel refused the change of size: " + os.strerror(errno))

    @property
    def alive(self) -> bool:
        """True from start() until the last thread has ended."""
        return bool(self.started and load64(&self.lane.live))

    @property
    def open_count(self) -> int:
        """Open files on the device; 0 while claimed."""
        return load64(&self.lane.server.opens) & ~CLAIMED

    @property
    def done_fd(self) -> int:
        """A descriptor that becomes readable when the last thread has ended, to wait for without
        a thread. It belongs to the lane."""
        return self.lane.done_fd

    @property
    def error(self) -> str | None:
        """Why the lane cannot serve or ended, if it was not unmount, abort or abort()."""
        cdef uint64_t refused = load64(&self.lane.server.refused)
        cdef uint64_t number = load64(&self.lane.end_errno)
        if refused:
            return (f"this kernel speaks FUSE {refused >> 32}.{refused & 0xFFFFFFFF}; zramfs needs "
                    f"{FUSE_KERNEL_VERSION}.{ZRAMFS_FUSE_MINOR_MIN} (Linux 3.15) or newer")
        if number:
            return f"reading requests from the kernel failed: {os.strerror(number)}"
        return None

    def stats(self) -> LaneStats:
        """Counters since the start; a consistent picture only while nothing is in flight."""
        cdef server_t* server = &self.lane.server
        cdef thread_t* t
        cdef int i
        ios, nbytes, ms = [0] * GROUPS, [0] * GROUPS, [0] * GROUPS
        bad = replies = unlocked = longest = 0
        for i in range(self.lane.count):
            t = self.lane.threads[i]
            for group in range(GROUPS):
                ios[group] += peek64(&t.w.ios[<int> group])
                nbytes[group] += peek64(&t.w.nbytes[<int> group])
                ms[group] += peek64(&t.w.ns[<int> group])
            bad += peek64(&t.w.protocol_errors)
            replies += peek64(&t.reply_errors)
            unlocked += t.unlocked
            longest = max(longest, peek64(&t.w.longest_ns))
        ns = [n // 1_000_000 for n in ms]
        return LaneStats(
            ios[READS], nbytes[READS] // 512, ns[READS],
            ios[WRITES], nbytes[WRITES] // 512, ns[WRITES],
            peek64(&server.in_flight), peek64(&server.io_ns) // 1_000_000, sum(ms) // 1_000_000,
            ios[DISCARDS], nbytes[DISCARDS] // 512, ns[DISCARDS],
            ios[FLUSHES], ns[FLUSHES],
            bad, longest // 1000, replies, unlocked,
            peek64(&server.minor), bool(peek64(&server.flags) & FUSE_HAS_RESEND),
        )
