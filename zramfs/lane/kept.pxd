# SPDX-License-Identifier: Apache-2.0
"""The page that outlives the lane (kept_page.h): who maps it, and what a successor reads there."""
from libc.stdint cimport uint64_t

cdef extern from "kept_page.h" nogil:
    enum: KEPT_BYTES, KEPT_BUCKETS, KEPT_GROUPS, KEPT_HANDS, KEPT_OPENS, KEPT_REFUSED, KEPT_VERSION
    const uint64_t KEPT_MAGIC
    const uint64_t FUSE_RESENT

    struct kept_hand:
        uint64_t unique
        uint64_t waits
        uint64_t steps

    struct kept_suspect:
        uint64_t unique
        uint64_t deaths

    struct kept_counts:
        uint64_t[26]* ios
        uint64_t* nbytes
        uint64_t* ns
        uint64_t longest_ns
        uint64_t protocol_errors
        uint64_t reply_errors
        uint64_t refused_sizes
        uint64_t busy_truncations
        uint64_t helped

    struct kept_page:
        uint64_t magic
        uint64_t refused_count
        uint64_t own_ends
        uint64_t own_ends_seen
        kept_hand* hands
        kept_suspect* suspects
        uint64_t* refused
        uint64_t minor
        uint64_t flags
        uint64_t mode
        uint64_t uid
        uint64_t gid
        uint64_t atime
        uint64_t mtime
        uint64_t ctime
        uint64_t io_ns
        uint64_t more_opens
        uint64_t* opens
        kept_counts* counts

# The page behind a descriptor, or one of this process alone for -1; resident, and locked where that is
# allowed. 0 or an errno: EINVAL for a file that is no such page.
cdef int page_map(int fd, kept_page** page) noexcept nogil
cdef void page_release(kept_page* page) noexcept nogil
# For a successor: clears the hands, and answers how many of the requests that were in them ended BLAMED
# daemons in a row. Those are refused from here on.
cdef uint64_t page_take_over(kept_page* page) noexcept nogil
# Whether a request that comes again was in hand at too many deaths. unique: with or without FUSE_RESENT.
cdef bint is_refused(kept_page* page, uint64_t unique) noexcept nogil
# Open files, as the predecessor left them.
cdef uint64_t count_opens(kept_page* page) noexcept nogil
