# SPDX-License-Identifier: Apache-2.0
# Lock order: arena_t.lock is the innermost lock of the whole program; nothing is taken under it,
# and no system call is made under it: a pageblock is given back to the OS between two holds.
"""4 KiB page frames in 2 MiB pageblocks of one memory file.

Buddy free lists of order 0 to 8 inside the pageblocks in use. A pageblock whose frames are all
free leaves the lists, its memory goes back to the OS at once, and it waits in the list of returned
pageblocks. Small blocks are used first, so that a hole is filled before a pageblock is broken.
"""
from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from allocator.layout cimport *
from allocator.prim cimport *

from allocator.stats import ArenaStats

# Frame numbers have 32 bits and NONE32 is taken: 16 TiB less one pageblock.
MAX_PAGEBLOCKS = (1 << 23) - 1


cdef inline uint64_t round_up(uint64_t n, uint64_t to) noexcept nogil:
    return (n + to - 1) // to * to


cdef arena_t* arena_new(uint64_t user_size, uint64_t nr_pageblocks) noexcept nogil:
    """NULL if the memory file or its mapping can't be had. Costs a few pages of memory however
    large it is: everything else appears when it is first touched."""
    cdef arena_t* a = <arena_t*>calloc(1, sizeof(arena_t))
    cdef uint64_t nr_frames = nr_pageblocks * PAGEBLOCK_FRAMES
    cdef superblock_t sb
    cdef void* base
    cdef int order
    if a == NULL:
        return NULL
    sb.magic = SUPERBLOCK_MAGIC
    sb.version = LAYOUT_VERSION
    sb.chain_max = CHAIN_MAX
    sb.user_off = FRAME_SIZE
    sb.user_size = round_up(user_size, FRAME_SIZE)
    sb.pageblock_off = sb.user_off + sb.user_size
    sb.page_off = round_up(sb.pageblock_off + nr_pageblocks * sizeof(pageblock_desc_t), FRAME_SIZE)
    sb.zspage_off = round_up(sb.page_off + nr_frames * sizeof(page_desc_t), FRAME_SIZE)
    sb.frames_off = round_up(sb.zspage_off + nr_frames * sizeof(zspage_desc_t), PAGEBLOCK_SIZE)
    sb.nr_pageblocks = nr_pageblocks
    sb.file_size = sb.frames_off + nr_pageblocks * PAGEBLOCK_SIZE

    a.fd = memfd_create(b"zramfs", MFD_CLOEXEC)
    if a.fd < 0:
        free(a)
        return NULL
    if ftruncate(a.fd, <int64_t>sb.file_size) != 0:
        close(a.fd)
        free(a)
        return NULL
    base = mmap(NULL, sb.file_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, a.fd, 0)
    if base == MAP_FAILED:
        close(a.fd)
        free(a)
        return NULL
    # A core dump must not carry what users stored.
    madvise(base, sb.file_size, MADV_DONTDUMP)
    a.base = <uint8_t*>base
    a.file_size = sb.file_size
    a.sb = <superblock_t*>base
    a.sb[0] = sb
    a.user = a.base + sb.user_off
    a.pageblocks = <pageblock_desc_t*>(a.base + sb.pageblock_off)
    a.pages = <page_desc_t*>(a.base + sb.page_off)
    a.zspages = <zspage_desc_t*>(a.base + sb.zspage_off)
    a.frames = a.base + sb.frames_off
    a.nr_pageblocks = <uint32_t>nr_pageblocks
    a.nr_frames = <uint32_t>nr_frames
    for order in range(NR_ORDERS):
        a.free_head[order] = NONE32
    a.returned = NONE32
    pthread_mutex_init(&a.lock, NULL)
    return a


cdef void arena_delete(arena_t* a) noexcept nogil:
    if a == NULL:
        return
    munmap(a.base, a.file_size)
    close(a.fd)
    pthread_mutex_destroy(&a.lock)
    free(a)


# ---- free lists ---------------------------------------------------------------------------

cdef inline void push_free_locked(arena_t* a, uint32_t frame, int order) noexcept nogil:
    cdef page_desc_t* page = &a.pages[frame]
    cdef uint32_t head = a.free_head[order]
    page.flags = PG_FREE
    page.order = <uint8_t>order
    page.owner = OWNER_NONE
    page.prev = NONE32
    page.next = head
    if head != NONE32:
        a.pages[head].prev = frame
    a.free_head[order] = frame
    a.free_count[order] += 1


cdef inline void remove_free_locked(arena_t* a, uint32_t frame, int order) noexcept nogil:
    cdef page_desc_t* page = &a.pages[frame]
    if page.prev != NONE32:
        a.pages[page.prev].next = page.next
    else:
        a.free_head[order] = page.next
    if page.next != NONE32:
        a.pages[page.next].prev = page.prev
    page.flags = 0
    a.free_count[order] -= 1


cdef uint32_t take_pageblock_locked(arena_t* a) noexcept nogil:
    """A whole pageblock for use: its number, or NONE32."""
    cdef uint32_t pb = a.returned
    if pb != NONE32:
        a.returned = a.pageblocks[pb].next
        a.nr_returned -= 1
    elif a.fresh < a.nr_pageblocks:
        pb = a.fresh
        a.fresh += 1
    else:
        return NONE32
    a.pageblocks[pb].flags = PB_IN_USE
    a.pageblocks[pb].nr_free = PAGEBLOCK_FRAMES
    a.pageblocks_in_use += 1
    return pb


cdef uint32_t alloc_locked(arena_t* a, int order, uint8_t owner, uint32_t ref) noexcept nogil:
    cdef int have = order
    cdef uint32_t frame, pb, i
    if a.fail_after != 0:
        a.fail_after -= 1
        if a.fail_after == 0:
            return NONE32
    while have < PAGEBLOCK_ORDER and a.free_head[have] == NONE32:
        have += 1
    if have < PAGEBLOCK_ORDER:
        frame = a.free_head[have]
        remove_free_locked(a, frame, have)
    else:
        pb = take_pageblock_locked(a)
        if pb == NONE32:
            return NONE32
        frame = pb * PAGEBLOCK_FRAMES
    while have > order:
        have -= 1
        push_free_locked(a, frame + (1u << have), have)
    for i in range(1u << order):
        a.pages[frame + i].flags = PG_USED
        a.pages[frame + i].owner = owner
        a.pages[frame + i].ref = ref
    a.pageblocks[frame // PAGEBLOCK_FRAMES].nr_free -= <uint16_t>(1u << order)
    a.frames_used += 1u << order
    return frame


cdef uint32_t free_locked(arena_t* a, uint32_t frame, int order) noexcept nogil:
    """Merges the block with its free buddies. If that makes a whole pageblock, it leaves all lists
    and its number is returned, for give_back(); else NONE32."""
    cdef uint32_t pb = frame // PAGEBLOCK_FRAMES
    cdef uint32_t buddy, i
    for i in range(1u << order):
        a.pages[frame + i].flags = 0
        a.pages[frame + i].owner = OWNER_NONE
    a.pageblocks[pb].nr_free += <uint16_t>(1u << order)
    a.frames_used -= 1u << order
    while order < PAGEBLOCK_ORDER:
        buddy = frame ^ (1u << order)
        if not (a.pages[buddy].flags & PG_FREE) or a.pages[buddy].order != order:
            break
        remove_free_locked(a, buddy, order)
        frame &= ~(1u << order)
        order += 1
    if order < PAGEBLOCK_ORDER:
        push_free_locked(a, frame, order)
        return NONE32
    a.pageblocks[pb].flags = 0
    a.pageblocks_in_use -= 1
    return pb


cdef void give_back(arena_t* a, uint32_t pb) noexcept nogil:
    """Returns a whole free pageblock, which stands in no list, to the OS."""
    cdef int64_t off = <int64_t>(a.sb.frames_off + <uint64_t>pb * PAGEBLOCK_SIZE)
    cdef int r = fallocate(a.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, off, <int64_t>PAGEBLOCK_SIZE)
    pthread_mutex_lock(&a.lock)
    if r == 0:
        a.bytes_returned += PAGEBLOCK_SIZE
    else:
        a.punch_errors += 1
    a.pageblocks[pb].next = a.returned
    a.returned = pb
    a.nr_returned += 1
    pthread_mutex_unlock(&a.lock)


# ---- the interface --------------------------------------------------------------------------

cdef int arena_alloc_frames(arena_t* a, int n, uint8_t owner, uint32_t ref, uint32_t* out) noexcept nogil:
    cdef int i
    cdef bint short_of_memory = False
    cdef uint32_t frame
    pthread_mutex_lock(&a.lock)
    for i in range(n):
        frame = alloc_locked(a, 0, owner, ref)
        if frame == NONE32:
            short_of_memory = True
            n = i
            break
        out[i] = frame
    pthread_mutex_unlock(&a.lock)
    if short_of_memory:
        arena_free_frames(a, n, out)
        return -ENOMEM
    return 0


cdef void arena_free_frames(arena_t* a, int n, const uint32_t* frames) noexcept nogil:
    cdef uint32_t empty[CHAIN_MAX]
    cdef uint32_t pb
    cdef int nr_empty = 0, i
    pthread_mutex_lock(&a.lock)
    for i in range(n):
        pb = free_locked(a, frames[i], 0)
        if pb != NONE32:
            empty[nr_empty] = pb
            nr_empty += 1
    pthread_mutex_unlock(&a.lock)
    for i in range(nr_empty):
        give_back(a, empty[i])


cdef uint32_t arena_alloc_block(arena_t* a, int order, uint8_t owner, uint32_t ref) noexcept nogil:
    cdef uint32_t frame
    pthread_mutex_lock(&a.lock)
    frame = alloc_locked(a, order, owner, ref)
    pthread_mutex_unlock(&a.lock)
    return frame


cdef void arena_free_block(arena_t* a, uint32_t frame, int order) noexcept nogil:
    cdef uint32_t pb
    pthread_mutex_lock(&a.lock)
    pb = free_locked(a, frame, order)
    pthread_mutex_unlock(&a.lock)
    if pb != NONE32:
        give_back(a, pb)


cdef class Arena:
    """Page frames in one memory file.

    user_size: bytes of the user region; nr_pageblocks: 2 MiB blocks that it may hand out at most.
    Raises ValueError for sizes out of range and MemoryError when the OS gives no address space.
    """

    def __cinit__(self, user_size, nr_pageblocks):
        cdef uint64_t user, blocks
        if not 0 <= user_size < 1 << 46:
            raise ValueError(f"user region of 0 to 64 TiB expected, got {user_size} bytes")
        if not 1 <= nr_pageblocks <= MAX_PAGEBLOCKS:
            raise ValueError(f"1 to {MAX_PAGEBLOCKS} pageblocks expected, got {nr_pageblocks}")
        user = user_size
        blocks = nr_pageblocks
        with nogil:
            self.a = arena_new(user, blocks)
        if self.a == NULL:
            raise MemoryError(
                f"no memory file with {nr_pageblocks} pageblocks of 2 MiB could be mapped; "
                "see `ulimit -v` and `sysctl vm.overcommit_memory`"
            )

    def __dealloc__(self):
        with nogil:
            arena_delete(self.a)

    def alloc(self, order=0):
        """First frame number of a free block of 2^order frames. Raises MemoryError when none is left."""
        cdef int k = order
        cdef uint32_t frame
        if not 0 <= k <= PAGEBLOCK_ORDER:
            raise ValueError(f"order 0 to {PAGEBLOCK_ORDER} expected, got {order}")
        with nogil:
            frame = arena_alloc_block(self.a, k, OWNER_NONE, 0)
        if frame == NONE32:
            raise MemoryError(f"no free block of order {order} in {self.a.nr_pageblocks} pageblocks")
        return frame

    def free(self, frame, order=0):
        """Takes back what alloc(order) gave. Raises ValueError for anything else."""
        cdef uint32_t first, i
        cdef int k = order
        if not 0 <= k <= PAGEBLOCK_ORDER or not 0 <= frame < self.a.nr_frames or frame % (1 << k):
            raise ValueError(f"frame {frame} is no block of order {order}")
        first = frame
        for i in range(1u << k):
            if not self.a.pages[first + i].flags & PG_USED:
                raise ValueError(f"frame {first + i} is not in use")
        with nogil:
            arena_free_block(self.a, first, k)

    def frame(self, frame):
        """The 4096 bytes of a frame in use, as a writable memoryview; not to be kept past free()."""
        cdef uint32_t n
        if not 0 <= frame < self.a.nr_frames or not self.a.pages[<uint32_t>frame].flags & PG_USED:
            raise ValueError(f"frame {frame} is not in use")
        n = frame
        return <uint8_t[:FRAME_SIZE]>frame_ptr(self.a, n)

    def inject_failure(self, after):
        """The after-th frame allocation from now fails as if memory were short (0 = none does)."""
        pthread_mutex_lock(&self.a.lock)
        self.a.fail_after = after
        pthread_mutex_unlock(&self.a.lock)

    def fileno(self):
        """Descriptor of the memory file, owned by the arena."""
        return self.a.fd

    def buddyinfo(self):
        """Free blocks per order, 0 to 9; order 9 counts whole pageblocks given back to the OS."""
        return arena_buddyinfo(self.a)

    def stats(self):
        return arena_stats(self.a)


cdef tuple arena_buddyinfo(arena_t* a):
    cdef uint64_t count[NR_ORDERS]
    cdef int order
    pthread_mutex_lock(&a.lock)
    for order in range(PAGEBLOCK_ORDER):
        count[order] = a.free_count[order]
    count[PAGEBLOCK_ORDER] = a.nr_returned
    pthread_mutex_unlock(&a.lock)
    return tuple([count[order] for order in range(NR_ORDERS)])


cdef object arena_stats(arena_t* a):
    cdef uint64_t used, blocks, returned, errors
    pthread_mutex_lock(&a.lock)
    used = a.frames_used
    blocks = a.pageblocks_in_use
    returned = a.bytes_returned
    errors = a.punch_errors
    pthread_mutex_unlock(&a.lock)
    return ArenaStats(
        frames_used=used,
        frames_free=blocks * PAGEBLOCK_FRAMES - used,
        pageblocks_in_use=blocks,
        pageblocks_total=a.nr_pageblocks,
        resident=blocks * PAGEBLOCK_SIZE,
        bytes_returned=returned,
        punch_errors=errors,
    )
