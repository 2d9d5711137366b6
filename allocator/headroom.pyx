# SPDX-License-Identifier: Apache-2.0
# Lock order: see headroom.pxd.
"""Room for a pool to grow: what the host and the memory cgroups around this process can still give.

A pool asks before it takes pages. The answer is a grant: a number of pages up to which no further look is
needed. A grant is a quarter of the room that the last look found, so a pool that nobody stops comes to
rest before the floor, after one look for each quarter. It is at most 16 MiB, because others use memory too,
and a limit may come or become less at any moment. The writer that has used up the grant looks by itself.
No other thread has to run in time for that, so a fast writer neither outruns the limit nor is refused while
there is room. A caller of look() does the same now and then, for a pool that does not grow.

Room is the smaller of two:
* the host's: MemAvailable less `keep_free`;
* that of each cgroup: its limit, less its usage and a margin, plus its clean file pages, which the kernel
  drops first. Dirty file pages are not counted: they may wait for the very pool that asks.
"""
cimport cython
from libc.stdint cimport uint64_t
from libc.stdlib cimport strtoull
from libc.string cimport strlen, strstr

from allocator.prim cimport *

import os

from allocator.stats import HeadroomStats

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void* buf, size_t n, long off) noexcept

cdef enum:
    PAGE_SHIFT = 12
    RETRY_NS = 10000000             # between two looks of writers that are refused

cdef uint64_t ALL_ROOM = <uint64_t>-1
# The least grant while there is room, in bytes: two looks for each MiB cost less than 1 % of writing it.
cdef uint64_t LEAST_GRANT = 1 << 20
# The most at once: half of LEAST_MARGIN, so that a pool stays below a limit that has just become less. A
# look costs 0.1 ms, and 16 MiB of new data at least 10 ms.
cdef uint64_t MOST_GRANT = 16 << 20
# Kept below the limit of a group, for what is not the pool. While a pool grew to 846 MiB, its daemon with 4
# threads took 18 MiB more for tables, 4 for page tables and 1 for its heap, spread over the growth. A
# command such as `zramfs stop` takes 14 MiB, and must find them in the same group.
cdef uint64_t LEAST_MARGIN = 32 << 20
cdef uint64_t MARGIN_PART = 16      # of the limit


cdef uint64_t less(uint64_t a, uint64_t b) noexcept nogil:
    """a - b, at least 0."""
    return a - b if a > b else 0


cdef bint read_text(headroom_t* h, int fd) noexcept nogil:
    """The beginning of a file, from the kernel, into h.text. False if it can't be read."""
    cdef ssize_t n = pread(fd, h.text, HEADROOM_TEXT - 1, 0) if fd >= 0 else -1
    h.text[n if n > 0 else 0] = 0
    return n > 0


cdef uint64_t number_of(const char* text, const char* name) noexcept nogil:
    """The number behind a name at the beginning of a line; 0 if the name is not there."""
    cdef const char* found = text
    cdef size_t length = strlen(name)
    while True:
        found = strstr(found, name)
        if found == NULL:
            return 0
        if found == text or (found - 1)[0] == b"\n":
            return strtoull(found + length, NULL, 10)
        found += length


cdef uint64_t whole_number(headroom_t* h, int fd, uint64_t otherwise) noexcept nogil:
    """The number that a file holds; otherwise if it holds none ("max"), or can't be read."""
    cdef char* end = NULL
    cdef uint64_t value
    if not read_text(h, fd):
        return otherwise
    value = strtoull(h.text, &end, 10)
    return otherwise if end == h.text else value


cdef uint64_t room_of_host_locked(headroom_t* h) noexcept nogil:
    if h.keep_free == 0 or not read_text(h, h.meminfo_fd):
        return ALL_ROOM
    return less(number_of(h.text, b"MemAvailable:") << 10, h.keep_free)


cdef uint64_t room_of_group_locked(headroom_t* h, const headroom_group_t* g) noexcept nogil:
    cdef uint64_t limit, usage, clean, above
    limit = min(whole_number(h, g.limit_fd[0], ALL_ROOM), whole_number(h, g.limit_fd[1], ALL_ROOM))
    usage = whole_number(h, g.usage_fd, 0)
    read_text(h, g.stat_fd)
    if g.version1:
        # The smallest limit above, also of groups that a namespace hides.
        above = number_of(h.text, b"hierarchical_memory_limit ")
        if above != 0:
            limit = min(limit, above)
        clean = less(number_of(h.text, b"total_inactive_file ") + number_of(h.text, b"total_active_file "),
                     number_of(h.text, b"total_dirty ") + number_of(h.text, b"total_writeback "))
    else:
        clean = less(number_of(h.text, b"inactive_file ") + number_of(h.text, b"active_file "),
                     number_of(h.text, b"file_dirty ") + number_of(h.text, b"file_writeback "))
    if limit >= <uint64_t>1 << 62:  # "none" of version 1 is the largest number of whole pages
        return ALL_ROOM
    return less(limit, less(usage, clean) + max(LEAST_MARGIN, limit // MARGIN_PART))


cdef void look_locked(headroom_t* h, uint64_t pages) noexcept nogil:
    """Reads the files, and grants a pool that has `pages` pages a part of the room."""
    cdef uint64_t room, group_room = ALL_ROOM
    cdef int i
    for i in range(h.nr_groups):
        group_room = min(group_room, room_of_group_locked(h, &h.groups[i]))
    store64(&h.group_room, group_room)
    store64(&h.host_room, room_of_host_locked(h))
    room = min(group_room, peek64(&h.host_room))
    if room == ALL_ROOM and h.nr_groups == 0:
        # Nothing bounds the pool, and nothing can but keep_free, which takes the grant back.
        store64(&h.granted, ALL_ROOM >> 1)
    else:
        room = min(max(room >> 2, min(room, LEAST_GRANT)), MOST_GRANT)
        store64(&h.granted, pages + (room >> PAGE_SHIFT))
    h.looked_ns = now_ns()
    add64(&h.looks, 1)


cdef bint headroom_take(headroom_t* h, uint64_t pages, uint64_t n, uint64_t over) noexcept nogil:
    cdef bint fits
    if pages + n <= peek64(&h.granted) + over:
        return True
    pthread_mutex_lock(&h.lock)
    # Another writer may have looked meanwhile. Those that are refused do not look all the time.
    if pages + n > peek64(&h.granted) + over and (
            min(h.host_room, h.group_room) >= LEAST_GRANT or now_ns() - h.looked_ns >= RETRY_NS):
        look_locked(h, pages)
    fits = pages + n <= peek64(&h.granted) + over
    pthread_mutex_unlock(&h.lock)
    if not fits:
        add64(&h.refused, 1)
    return fits


# ---- for Python -----------------------------------------------------------------------------

cdef int open_or_none(path) except -2:
    """A descriptor of a file for reading, -1 if it can't be opened."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


@cython.no_gc_clear
cdef class Headroom:
    """Room for the growth of one pool. Every method may be called from any thread.

    keep_free: bytes of the host's memory that stay available to others, 0 = no floor. meminfo: a file like
    /proc/meminfo.
    """

    def __cinit__(self, keep_free=0, meminfo="/proc/meminfo"):
        self.group_fds = []
        pthread_mutex_init(&self.h.lock, NULL)
        self.h.meminfo_fd = open_or_none(meminfo)
        self.h.host_room = self.h.group_room = ALL_ROOM
        self.keep_free = keep_free

    def __dealloc__(self):
        for fd in (self.h.meminfo_fd, *(self.group_fds or ())):
            if fd >= 0:
                close(fd)
        pthread_mutex_destroy(&self.h.lock)

    @property
    def keep_free(self):
        """Bytes of MemAvailable that are left to the host; settable."""
        return peek64(&self.h.keep_free)

    @keep_free.setter
    def keep_free(self, nbytes):
        if not 0 <= nbytes < 1 << 62:
            raise ValueError(f"a size of 0 to 2^62 - 1 bytes expected, got {nbytes}")
        pthread_mutex_lock(&self.h.lock)
        store64(&self.h.keep_free, nbytes)
        store64(&self.h.granted, 0)
        pthread_mutex_unlock(&self.h.lock)

    def set_groups(self, groups):
        """The memory cgroups that bound this process: at most 16 pairs of directory and version (1 or 2).
        Those that were set before are forgotten. Their files are opened anew."""
        cdef int i
        groups = list(groups)
        if len(groups) > HEADROOM_GROUPS:
            raise ValueError(f"at most {HEADROOM_GROUPS} groups expected, got {len(groups)}")
        before, self.group_fds = self.group_fds, []
        for place, version in groups:
            names = (("memory.limit_in_bytes", "", "memory.usage_in_bytes") if version == 1 else
                     ("memory.max", "memory.high", "memory.current"))
            for name in (*names, "memory.stat"):
                self.group_fds.append(open_or_none(os.path.join(place, name)) if name else -1)
        pthread_mutex_lock(&self.h.lock)
        for i, (_, version) in enumerate(groups):
            self.h.groups[i].limit_fd[0] = self.group_fds[4 * i]
            self.h.groups[i].limit_fd[1] = self.group_fds[4 * i + 1]
            self.h.groups[i].usage_fd = self.group_fds[4 * i + 2]
            self.h.groups[i].stat_fd = self.group_fds[4 * i + 3]
            self.h.groups[i].version1 = version == 1
        self.h.nr_groups = len(groups)
        store64(&self.h.granted, 0)
        pthread_mutex_unlock(&self.h.lock)
        for fd in before:
            if fd >= 0:
                close(fd)

    def look(self, pages):
        """Reads the files at once, and grants anew. pages: how many pool pages are in use."""
        cdef uint64_t used = pages
        with nogil:
            pthread_mutex_lock(&self.h.lock)
            look_locked(&self.h, used)
            pthread_mutex_unlock(&self.h.lock)

    def stats(self):
        """As the last look found it."""
        host, group = peek64(&self.h.host_room), peek64(&self.h.group_room)
        return HeadroomStats(
            keep_free=peek64(&self.h.keep_free),
            host_room=None if host == ALL_ROOM else host,
            group_room=None if group == ALL_ROOM else group,
            looks=peek64(&self.h.looks), refused=peek64(&self.h.refused),
        )
