# SPDX-License-Identifier: Apache-2.0
# No locks: only the thread changes what ballast_t says of the pieces. All else is constant while it runs.
"""The ballast of a server of swap: memory that is held only to be given to a kernel that is stuck.

The kernel needs memory itself to swap a page out: loop's worker allocates for each request. It may not swap,
and it has no right to the last pages below a zone's min watermark. If other threads take all that is free
above that mark, the worker looks for a page without end, and everything that could free one waits for the
worker. One of 10 emulated machines of 360 MiB stood like that for 20 minutes, 59 pages short (Linux 6.1).
A raised vm.min_free_kbytes makes that rare, but it raises the mark, too.

So a thread looks whether requests come. If none comes while memory is short, it gives the kernel a piece of
the ballast, then another. It takes them again when there is enough memory. Punching a hole into a file takes
no memory. Nor does the look: the kernel keeps the buffer of an open /proc/zoneinfo.
"""
cimport cython
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport strtoull
from libc.string cimport strchr, strncmp
from posix.fcntl cimport O_CLOEXEC, O_RDONLY, open as open_file

from allocator.prim cimport (
    FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, MAP_SHARED,
    MFD_CLOEXEC, PROT_READ, PROT_WRITE, add64, close, fallocate, ftruncate, load64, make_resident,
    memfd_create, mmap, munmap, store64, write,
)
from allocator.background cimport background_enter, background_start
from zramfs.lane.crew cimport crew_served
from zramfs.lane.lane cimport Lane
from zramfs.lane.serve cimport POLLIN, crew_t, poll, pollfd

import os

from zramfs.model.stats import BallastStats

cdef extern from "pthread.h" nogil:
    int pthread_join(unsigned long thread, void** result)

cdef extern from "sys/eventfd.h" nogil:
    int eventfd(unsigned int value, int flags)
    enum: EFD_CLOEXEC

cdef extern from "sys/mman.h" nogil:
    int mlock(const void* addr, size_t length)

cdef extern from "unistd.h" nogil:
    ssize_t pread(int fd, void* buf, size_t n, int64_t offset)

cdef enum:
    # Up to 252 pages that were freed can stay with a CPU, where no other CPU finds them.
    PIECE = 2 << 20
    PIECE_PAGES = PIECE // 4096
    PIECES = 4
    # 256 CPUs take 25 KB for a zone.
    TEXT = 512 << 10
    MAX_ZONES = 64
    LOOK_MS = 100               # between looks while requests come or memory is short
    IDLE_MS = 1000              # else: a look takes 30 us
    STUCK = 3                   # looks in a row without memory and without a request
    IDLE = 20                   # looks in a row without a request

cdef enum weight_t:
    BETWEEN, SHORT, PLENTY

cdef struct zone_t:             # pages
    uint64_t free
    uint64_t low                # below it the kernel is reclaiming, or about to
    uint64_t managed

cdef struct ballast_t:
    crew_t* crew
    int fd                      # memfd of PIECES pieces
    int zoneinfo
    int stop_fd                 # readable when the thread is to end
    uint8_t* base
    char* text                  # TEXT bytes
    unsigned long thread
    uint64_t held               # atomic: pieces that are resident, the first ones
    uint64_t released           # atomic: pieces given away so far


cdef uint64_t number_behind(const char* at, const char* word, size_t n) noexcept nogil:
    """The number behind a word of n characters; 1 << 63 if another word stands there."""
    if strncmp(at, word, n) != 0 or at[n] != c' ':
        return <uint64_t> 1 << 63
    return strtoull(at + n, NULL, 10)


cdef weight_t memory_weigh(const char* text) noexcept nogil:
    """What zoneinfo(5) says of memory. Zones of less than a quarter of the largest are left out: the kernel
    protects them from most of what allocates."""
    cdef zone_t zones[MAX_ZONES]
    cdef zone_t* z
    cdef int i, nr = 0
    cdef uint64_t number, largest = 0
    cdef bint short_everywhere = True, plenty_everywhere = True
    cdef const char* at = text
    while at != NULL and at[0] != 0:
        while at[0] == c' ' or at[0] == c'\n':
            at += 1
        number = number_behind(at, "pages free", 10)
        if number >> 63 == 0:
            if nr == MAX_ZONES:
                break
            zones[nr].free, zones[nr].low, zones[nr].managed = number, 0, 0
            nr += 1
        elif nr != 0:
            number = number_behind(at, "low", 3)
            if number >> 63 == 0:
                zones[nr - 1].low = number
            number = number_behind(at, "managed", 7)
            if number >> 63 == 0:
                zones[nr - 1].managed = number
                largest = max(largest, number)
        at = strchr(at, c'\n')
    if largest == 0:
        return BETWEEN
    for i in range(nr):
        z = &zones[i]
        if z.managed < largest // 4:
            continue
        if z.free >= z.low:
            short_everywhere = False
        # Half a piece more than what is taken: it must not be short again at once.
        if z.free < z.low + PIECE_PAGES * 3 // 2:
            plenty_everywhere = False
    return SHORT if short_everywhere else PLENTY if plenty_everywhere else BETWEEN


cdef weight_t zoneinfo_weigh(ballast_t* b) noexcept nogil:
    cdef size_t n = 0
    cdef ssize_t got
    while True:
        # A read gives a page of it at the most.
        got = pread(b.zoneinfo, b.text + n, TEXT - 1 - n, <int64_t> n)
        if got <= 0:
            break
        n += <size_t> got
    if got < 0 or n == TEXT - 1:
        return BETWEEN
    b.text[n] = 0
    return memory_weigh(b.text)


cdef void* ballast_run(void* arg) noexcept nogil:
    """The thread, until stop_fd is readable."""
    cdef ballast_t* b = <ballast_t*> arg
    cdef uint64_t served, before = crew_served(b.crew), held
    cdef int quiet = 0, stuck = 0
    cdef weight_t memory
    cdef pollfd stop
    background_enter()
    while True:
        held = load64(&b.held)
        stop.fd, stop.events = b.stop_fd, POLLIN
        if poll(&stop, 1, IDLE_MS if quiet == IDLE and stuck == 0 and held == PIECES else LOOK_MS) > 0:
            return NULL
        served = crew_served(b.crew)
        memory = zoneinfo_weigh(b)
        quiet = 0 if served != before else min(quiet + 1, IDLE)
        stuck = stuck + 1 if memory == SHORT and served == before else 0
        before = served
        if stuck >= STUCK and held > 0:
            fallocate(b.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, <int64_t> (held - 1) * PIECE, PIECE)
            store64(&b.held, held - 1)
            add64(&b.released, 1)
        elif memory == PLENTY and held < PIECES:
            make_resident(b.base + held * PIECE, PIECE)
            store64(&b.held, held + 1)


# The thread looks at the lane until __dealloc__ has joined it.
@cython.no_gc_clear
@cython.final
cdef class Ballast:
    """Holds 8 MiB for a lane, resident and locked as far as this process may, until close().

    zoneinfo: the kernel's account of memory. Raises OSError if it cannot be read, or for want of memory,
    descriptors or a thread. The ballast is full when the constructor returns.
    """
    cdef Lane lane
    cdef ballast_t b
    cdef bint running

    def __cinit__(self, Lane lane not None, zoneinfo="/proc/zoneinfo"):
        cdef ballast_t* b = &self.b
        cdef int err
        # Before anything can fail: __dealloc__ closes what is not negative.
        b.fd = b.zoneinfo = b.stop_fd = -1
        path = os.fsencode(zoneinfo)
        self.lane = lane
        b.crew = lane.crew
        b.fd = memfd_create(b"zramfs-ballast", MFD_CLOEXEC)
        b.zoneinfo = open_file(path, O_RDONLY | O_CLOEXEC)
        b.stop_fd = eventfd(0, EFD_CLOEXEC)
        if b.fd < 0 or b.zoneinfo < 0 or b.stop_fd < 0 or ftruncate(b.fd, PIECES * PIECE) != 0:
            self._fail(f"no descriptors for it and for {zoneinfo}")
        b.base = <uint8_t*> mmap(NULL, PIECES * PIECE, PROT_READ | PROT_WRITE, MAP_SHARED, b.fd, 0)
        b.text = <char*> mmap(NULL, TEXT, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if <void*> b.base == MAP_FAILED or <void*> b.text == MAP_FAILED:
            self._fail("no memory for it")
        # Where it is refused, the process was forced to go on without.
        mlock(b.base, PIECES * PIECE)
        mlock(b.text, TEXT)
        with nogil:
            make_resident(b.base, PIECES * PIECE)
            make_resident(b.text, TEXT)
            zoneinfo_weigh(b)
        b.held = PIECES
        err = background_start(&b.thread, ballast_run, b, b"zramfs-ballast")
        if err:
            raise OSError(err, f"no thread for a ballast: {os.strerror(err)}")
        self.running = True

    def __dealloc__(self):
        cdef ballast_t* b = &self.b
        self.close()
        if b.base != NULL and <void*> b.base != MAP_FAILED:
            munmap(b.base, PIECES * PIECE)
        if b.text != NULL and <void*> b.text != MAP_FAILED:
            munmap(b.text, TEXT)
        for fd in (b.fd, b.zoneinfo, b.stop_fd):
            if fd >= 0:
                close(fd)

    cdef int _fail(self, what) except -1:
        raise OSError(errno, f"a ballast for a server of swap: {what}: {os.strerror(errno)}")

    @property
    def stats(self) -> BallastStats:
        return BallastStats(load64(&self.b.held) * PIECE, PIECES * PIECE, load64(&self.b.released))

    def close(self) -> None:
        """Ends the thread, and gives all back."""
        cdef ballast_t* b = &self.b
        cdef uint64_t one = 1
        if not self.running:
            return
        self.running = False
        with nogil:
            write(b.stop_fd, &one, sizeof(one))
            pthread_join(b.thread, NULL)
            fallocate(b.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, PIECES * PIECE)
        store64(&b.held, 0)
