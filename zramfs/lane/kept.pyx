# SPDX-License-Identifier: Apache-2.0
"""The page that outlives the lane; see kept.pxd."""
from libc.errno cimport EINVAL, errno
from libc.stdint cimport uint64_t
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_POPULATE, MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE, mlock, mmap,
    munmap,
)
from posix.stat cimport fstat, struct_stat

from allocator.prim cimport load64


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
