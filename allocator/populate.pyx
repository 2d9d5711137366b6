# SPDX-License-Identifier: Apache-2.0
# Locks: see frames.pxd.
"""Memory is asked for by a call that can fail, before anything touches it.

The memory file is sparse: a page of it comes into being when it is first used. If the OS refuses the
page then (a limit of tmpfs, strict overcommit, a damaged page), the answer is SIGBUS, which ends the
process. So whatever is about to be used for the first time is populated by madvise(2), and a refusal
is a failed allocation:
  - a unit of 16 frames (64 KiB), before the first of its frames is handed out;
  - the descriptors of a pageblock and its pages, before the pageblock is taken;
  - a page of zspage descriptors, before the first number in it is used.
What was populated once stays so until its pageblock is given back as a whole, or the balloon takes it.
"""
from libc.errno cimport EINVAL
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from allocator.frames cimport arena_t, frame_ptr, units_of
from allocator.layout cimport *
from allocator.prim cimport (
    FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, add64, fallocate, load64, load8, peek64,
    pthread_mutex_lock, pthread_mutex_unlock, try_populate,
)


cdef int populate_counted(arena_t* a, void* start, uint64_t n) noexcept nogil:
    cdef int r = try_populate(start, n)
    if r != 0:
        add64(&a.sb.refused, 1)
    return r


cdef int populate_range(arena_t* a, uint32_t first, uint32_t n) noexcept nogil:
    """Frames of one pageblock, but for those that the balloon has. Under populate_lock, so that a frame
    can't become the balloon's hole between the look and the call."""
    cdef uint8_t held[PAGEBLOCK_FRAMES]
    cdef uint32_t i, start
    cdef int r = 0
    # Counted before it is punched out, and no longer once it has left the balloon.
    if peek64(&a.reserved) == 0:
        return populate_counted(a, frame_ptr(a, first), n * <uint64_t>FRAME_SIZE)
    pthread_mutex_lock(&a.lock)
    for i in range(n):
        held[i] = load8(&a.pages[first + i].owner) == OWNER_BALLOON
    pthread_mutex_unlock(&a.lock)
    i = 0
    while i < n and r == 0:
        start = i
        while i < n and not held[i]:
            i += 1
        if i != start:
            r = populate_counted(a, frame_ptr(a, first + start), (i - start) * <uint64_t>FRAME_SIZE)
        i += 1
    return r


cdef int arena_populate_frames(arena_t* a, uint32_t first, uint32_t n) noexcept nogil:
    """Whole units. The first and the last may be shared with other frames; those between them are the
    caller's, so that it does no harm to populate them again."""
    cdef uint32_t pb = first // PAGEBLOCK_FRAMES, low = 0, high = 31, missing
    cdef int r = 0
    pthread_mutex_lock(&a.populate_lock)
    missing = units_of(first, n) & ~a.pageblocks[pb].ready
    if missing != 0:
        while not missing >> low & 1:
            low += 1
        while not missing >> high & 1:
            high -= 1
        r = populate_range(a, pb * PAGEBLOCK_FRAMES + low * UNIT_FRAMES, (high - low + 1) * UNIT_FRAMES)
        if r == 0:
            pthread_mutex_lock(&a.lock)
            a.pageblocks[pb].ready |= missing
            pthread_mutex_unlock(&a.lock)
    pthread_mutex_unlock(&a.populate_lock)
    return r


cdef int arena_populate_descriptors(arena_t* a) noexcept nogil:
    cdef uint32_t pb
    cdef bint enough
    cdef int r = 0
    pthread_mutex_lock(&a.populate_lock)
    pthread_mutex_lock(&a.lock)
    pb = a.sb.described
    enough = a.sb.fresh < pb or pb == a.nr_pageblocks
    pthread_mutex_unlock(&a.lock)
    if not enough:
        r = populate_counted(a, &a.pageblocks[pb], sizeof(pageblock_desc_t))
        if r == 0:
            r = populate_counted(a, &a.pages[pb * PAGEBLOCK_FRAMES], PAGEBLOCK_FRAMES * sizeof(page_desc_t))
        if r == 0:
            pthread_mutex_lock(&a.lock)
            a.sb.described = pb + 1
            pthread_mutex_unlock(&a.lock)
    pthread_mutex_unlock(&a.populate_lock)
    return r


cdef int arena_populate_pageblock(arena_t* a, uint32_t pb) noexcept nogil:
    """Without populate_lock: the pageblock is the caller's alone, and the descriptors are only touched.
    0.3 to 1.5 ms while memory is plentiful."""
    cdef int r = arena_populate_zspages(a, pb * PAGEBLOCK_FRAMES, PAGEBLOCK_FRAMES)
    if r == 0:
        r = populate_counted(a, frame_ptr(a, pb * PAGEBLOCK_FRAMES), PAGEBLOCK_SIZE)
    return r


cdef int arena_populate_zspages(arena_t* a, uint32_t number, uint32_t n) noexcept nogil:
    return populate_counted(a, &a.zspages[number], n * sizeof(zspage_desc_t))


cdef int arena_populate_user(arena_t* a, uint64_t offset, uint64_t n) noexcept nogil:
    if offset > a.sb.user_size or n > a.sb.user_size - offset:
        return -EINVAL
    return populate_counted(a, a.user + offset, n) if n != 0 else 0


cdef void arena_punch_hole(arena_t* a, uint32_t frame) noexcept nogil:
    """A frame that the OS does not take back stays resident, which the balloon can't help."""
    pthread_mutex_lock(&a.populate_lock)
    fallocate(a.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
              <int64_t>(a.sb.frames_off + (<uint64_t>frame << FRAME_SHIFT)), FRAME_SIZE)
    pthread_mutex_unlock(&a.populate_lock)


cdef void arena_fill_hole(arena_t* a, uint32_t frame) noexcept nogil:
    if load64(&a.ready_target) != 0 and populate_counted(a, frame_ptr(a, frame), FRAME_SIZE) == 0:
        return
    pthread_mutex_lock(&a.populate_lock)
    pthread_mutex_lock(&a.lock)
    a.pageblocks[frame // PAGEBLOCK_FRAMES].ready &= ~units_of(frame, 1)
    pthread_mutex_unlock(&a.lock)
    pthread_mutex_unlock(&a.populate_lock)
