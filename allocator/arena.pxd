# SPDX-License-Identifier: Apache-2.0
# Locks: see frames.pxd.
"""C interface of the arena: its making, its end and its statistics."""
from libc.stdint cimport uint64_t

from allocator.frames cimport arena_t


# In the empty memory file fd, or one of its own (-1). NULL: *err is -ENOMEM, because the memory file or its
# mapping can't be had. Both functions keep a duplicate of fd.
cdef arena_t* arena_new(uint64_t user_size, uint64_t nr_pageblocks, int fd, int* err) noexcept nogil
# The arena in a memory file that another process has left, to be recovered (recovery.pyx). *err is -EINVAL
# for another file or layout.
cdef arena_t* arena_adopt(int fd, int* err) noexcept nogil
cdef void arena_delete(arena_t* a) noexcept nogil
cdef tuple arena_buddyinfo(arena_t* a)
cdef object arena_stats(arena_t* a)


cdef class Arena:
    cdef arena_t* a     # NULL once closed

    cdef arena_t* open(self) except NULL
