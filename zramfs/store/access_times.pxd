# SPDX-License-Identifier: Apache-2.0
"""When each page was used last, if access times are kept, and which pages are idle.

slots.pyx writes the time of an access and clears the mark. Everything that looks at them is here."""
from libc.stdint cimport uint32_t, uint64_t

from zramfs.store.slots cimport store_t

# Whether the times are kept from now on. Switched on for the first time it takes 4 bytes for each page of
# the device that is used; MemoryError when address space is short. The GIL guards it.
cdef int keep_access_times(store_t* st, bint on) except -1
# Gives the memory of times back to the OS: bytes [begin, end) of them, but for a page that begins before it.
cdef void times_give_back(store_t* st, uint64_t begin, uint64_t end) noexcept nogil
# Seconds since boot; 0 while access times are not kept.
cdef uint32_t last_access(store_t* st, uint64_t slot) noexcept nogil
# What was_used_before() takes for pages that were not used for more than age seconds; None: 0, which is all
# pages. ValueError while access times are not kept.
cdef uint32_t time_of_age(store_t* st, age) except? 0
cdef inline bint was_used_before(store_t* st, uint64_t slot, uint32_t before) noexcept nogil:
    return before == 0 or last_access(st, slot) < before
# Marks the pages idle whose last access lies more than age seconds back (0: all of them), and takes the
# mark from the others, from a chunk on, for about ns nanoseconds (0: to the end). Never SAME, SAME_OBJ and
# WRITTEN_BACK. The chunk where the next call goes on; chunk_count(): it is done.
cdef uint64_t mark_idle(store_t* st, uint64_t chunk, uint32_t age, uint64_t ns) noexcept nogil
