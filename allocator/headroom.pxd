# SPDX-License-Identifier: Apache-2.0
# Lock order: headroom_t.lock is a leaf. Its holder reads files of /proc and of a memory cgroup, about
# 0.1 ms, and takes no other lock.
"""How much more memory the host, and the memory cgroups around this process, can give."""
from libc.stdint cimport uint64_t

from allocator.prim cimport pthread_mutex_t

cdef enum:
    HEADROOM_GROUPS = 16            # a cgroup path of Kubernetes has 5 parts
    HEADROOM_TEXT = 8192            # memory.stat of version 2 has 2 KiB, of version 1 1.3 KiB


# The open files of one memory cgroup. A descriptor of -1 stands for a file that is not there.
cdef struct headroom_group_t:
    int limit_fd[2]                 # memory.limit_in_bytes, or memory.max and memory.high
    int usage_fd
    int stat_fd
    bint version1


cdef struct headroom_t:
    pthread_mutex_t lock
    # guarded by lock
    int meminfo_fd
    headroom_group_t groups[HEADROOM_GROUPS]
    int nr_groups
    char text[HEADROOM_TEXT]
    uint64_t looked_ns              # when the files were read last
    # changed under lock, read by anybody
    uint64_t keep_free              # bytes of MemAvailable that are left to the host, 0 = no floor
    uint64_t granted                # pool pages that may be in use before the next look
    uint64_t host_room              # bytes at the last look; ALL_ROOM = not bounded
    uint64_t group_room
    uint64_t looks                  # since creation
    # atomic
    uint64_t refused                # requests for pages that found no room


# Whether a pool with `pages` pages in use may take n more, and up to `over` beyond what is granted.
cdef bint headroom_take(headroom_t* h, uint64_t pages, uint64_t n, uint64_t over) noexcept nogil


cdef class Headroom:
    cdef headroom_t h
    cdef dict files
