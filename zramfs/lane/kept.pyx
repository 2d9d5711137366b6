# SPDX-License-Identifier: Apache-2.0
"""The page that outlives the lane; see kept.pxd."""
from libc.errno cimport EINVAL, errno
from libc.stdint cimport uint64_t
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_POPULATE, MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE, mlock, mmap,
    munmap,
)
from posix.stat cimport fstat, struct_stat

from libc.string cimport memcpy, memset

from allocator.prim cimport load64, store64

cdef enum:
    BLAMED = 3      # ends of daemons in a row with a request in hand, and it is refused


cdef int page_map(int fd, kept_page** page) noexcept nogil:
    cdef struct_stat seen
    cdef int flags = MAP_PRIVATE | MAP_ANONYMOUS
    cdef void* at
    if fd >= 0:
        if fstat(fd, &seen) != 0:
            return errno
        if seen.st_size < KEPT_BYTES:       # or an access is a SIGBUS
            return EINVAL
        flags = MAP_SHARED
    at = mmap(NULL, KEPT_BYTES, PROT_READ | PROT_WRITE, flags | MAP_POPULATE, fd, 0)
    if at == MAP_FAILED:
        return errno
    page[0] = <kept_page*> at
    if page[0].magic == 0:
        page[0].magic = KEPT_MAGIC
    if page[0].magic != KEPT_MAGIC:
        munmap(at, KEPT_BYTES)
        page[0] = NULL
        return EINVAL
    mlock(at, KEPT_BYTES)
    return 0


cdef void page_release(kept_page* page) noexcept nogil:
    if page != NULL:
        munmap(page, KEPT_BYTES)


cdef uint64_t deaths_with(kept_page* page, uint64_t unique) noexcept nogil:
    cdef int i
    for i in range(KEPT_HANDS):
        if page.suspects[i].unique == unique:
            return page.suspects[i].deaths
    return 0


cdef uint64_t page_take_over(kept_page* page) noexcept nogil:
    cdef kept_suspect found[KEPT_HANDS]
    cdef uint64_t refused = 0, unique
    cdef int i, n = 0
    cdef bint blames = load64(&page.own_ends) != page.own_ends_seen
    # First: a process that is killed in here leaves too little blame, and not twice as much.
    page.own_ends_seen = load64(&page.own_ends)
    memset(found, 0, sizeof(found))
    for i in range(KEPT_HANDS):
        unique = page.hands[i].unique
        memset(&page.hands[i], 0, sizeof(kept_hand))
        if unique == 0 or not blames:
            continue
        found[n].unique = unique
        found[n].deaths = 1 + deaths_with(page, unique)
        if found[n].deaths == BLAMED:
            page.refused[page.refused_count % KEPT_REFUSED] = unique
            store64(&page.refused_count, page.refused_count + 1)
            refused += 1
        n += 1
    if blames:
        memcpy(page.suspects, found, sizeof(found))
    return refused


cdef bint is_refused(kept_page* page, uint64_t unique) noexcept nogil:
    cdef uint64_t i
    for i in range(min(load64(&page.refused_count), <uint64_t> KEPT_REFUSED)):
        if page.refused[i] == unique & ~<uint64_t> FUSE_RESENT:
            return True
    return False


cdef uint64_t count_opens(kept_page* page) noexcept nogil:
    cdef uint64_t found = load64(&page.more_opens)
    cdef int i
    for i in range(KEPT_OPENS):
        found += load64(&page.opens[i]) != 0
    return found
