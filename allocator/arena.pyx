# SPDX-License-Identifier: Apache-2.0
# Lock order: arena_t.lock is the innermost lock of the whole program; nothing is taken under it,
# and no system call is made under it: a pageblock is given back to the OS between two holds.
"""4 KiB page frames in 2 MiB pageblocks of one memory file.

Buddy free lists of order 0 to 8 inside the pageblocks in use. A pageblock whose frames are all
free leaves the lists, its memory goes back to the OS at once (or first to the reserve, where the arena
keeps one: reserve.pyx), and it waits in the list of returned pageblocks. Small blocks are used first, so that a hole is filled before a pageblock is broken.
"""
from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from allocator.layout cimport *
from allocator.prim cimport *

from allocator.stats import ArenaStats

cdef enum:
    # 16 MiB are made ready in 4 to 8 ms, if a CPU is to be had. A guess: then the caller gets an error.
    RESERVE_WAIT_NS = 100000000

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
    sb.chain_max = 0
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
    # Where the machine lets memory files have huge pages (shmem_enabled: advise), a pageblock is one of
    # them: 4 KiB random reads take 0.9 us of user time instead of 1.1, by their TLB misses. Not for the
    # arrays before the frames, which are used sparsely.
    madvise(a.frames, nr_pageblocks * PAGEBLOCK_SIZE, MADV_HUGEPAGE)
    for order in range(NR_ORDERS):
        a.free_head[0][order] = NONE32
        a.free_head[1][order] = NONE32
    a.returned = NONE32
    a.ready = NONE32
    sem_init(&a.keeper_wake, 0, 0)
    short_mutex_init(&a.lock)
    pthread_mutex_init(&a.migrate_lock, NULL)
    return a


cdef void arena_delete(arena_t* a) noexcept nogil:
    if a == NULL:
        return
    munmap(a.base, a.file_size)
    close(a.fd)
    pthread_mutex_destroy(&a.lock)
    pthread_mutex_destroy(&a.migrate_lock)
    sem_destroy(&a.keeper_wake)
    free(a)


# ---- free lists ---------------------------------------------------------------------------

cdef inline int list_of_locked(arena_t* a, uint32_t frame) noexcept nogil:
    return 1 if a.pageblocks[frame // PAGEBLOCK_FRAMES].flags & PB_ISOLATED else 0


cdef inline void push_free_locked(arena_t* a, uint32_t frame, int order) noexcept nogil:
    cdef page_desc_t* page = &a.pages[frame]
    cdef int which = list_of_locked(a, frame)
    cdef uint32_t head = a.free_head[which][order]
    store16(&page.flags, PG_FREE)
    page.order = <uint8_t>order
    page.owner = OWNER_NONE
    page.prev = NONE32
    page.next = head
    if head != NONE32:
        a.pages[head].prev = frame
    a.free_head[which][order] = frame
    a.free_count[which][order] += 1


cdef inline void remove_free_locked(arena_t* a, uint32_t frame) noexcept nogil:
    cdef page_desc_t* page = &a.pages[frame]
    cdef int which = list_of_locked(a, frame)
    if page.prev != NONE32:
        a.pages[page.prev].next = page.next
    else:
        a.free_head[which][page.order] = page.next
    if page.next != NONE32:
        a.pages[page.next].prev = page.prev
    store16(&page.flags, 0)
    a.free_count[which][page.order] -= 1


cdef inline void mark_used_locked(arena_t* a, uint32_t first, uint32_t n, uint8_t owner,
                                  uint32_t ref) noexcept nogil:
    cdef uint32_t frame
    for frame in range(first, first + n):
        a.pages[frame].owner = owner
        a.pages[frame].ref = ref
        store16(&a.pages[frame].flags, PG_USED)
    a.pageblocks[first // PAGEBLOCK_FRAMES].nr_free -= <uint16_t>n
    a.frames_used += n


cdef uint32_t take_whole_locked(arena_t* a, bint from_ready) noexcept nogil:
    """A whole free pageblock, in no list afterwards: of the reserve, or one that is not resident. Its
    number, or NONE32."""
    cdef uint32_t pb = a.ready if from_ready else a.returned
    if pb == NONE32 and not from_ready and a.fresh < a.nr_pageblocks:
        a.fresh += 1
        return a.fresh - 1
    if pb == NONE32:
        return NONE32
    if from_ready:
        a.ready = a.pageblocks[pb].next
        store64(&a.nr_ready, a.nr_ready - 1)
    else:
        a.returned = a.pageblocks[pb].next
        a.nr_returned -= 1
    # What failed in its last life says nothing about this one.
    a.pageblocks[pb].skip = 0
    a.pageblocks[pb].defer = 0
    return pb


cdef uint32_t take_pageblock_locked(arena_t* a) noexcept nogil:
    """A whole pageblock for use: its number, or NONE32."""
    cdef uint32_t pb = take_whole_locked(a, True)
    if pb == NONE32 and a.ready_target == 0:
        pb = take_whole_locked(a, False)
    if pb == NONE32:
        return NONE32
    a.pageblocks[pb].flags = PB_IN_USE
    a.pageblocks[pb].nr_free = PAGEBLOCK_FRAMES
    a.pageblocks_in_use += 1
    return pb


cdef inline bint injected_locked(arena_t* a) noexcept nogil:
    """True for the allocation that fault injection has chosen."""
    if a.fail_after == 0:
        return False
    a.fail_after -= 1
    return a.fail_after == 0


cdef inline void split_locked(arena_t* a, uint32_t frame, int have, int order) noexcept nogil:
    """Frees all but the first 2^order frames of a block of order have that is in no list."""
    while have > order:
        have -= 1
        push_free_locked(a, frame + (1u << have), have)


cdef uint32_t alloc_locked(arena_t* a, int order, uint8_t owner, uint32_t ref) noexcept nogil:
    cdef int have = order
    cdef uint32_t frame, pb
    if injected_locked(a):
        return NONE32
    while have < PAGEBLOCK_ORDER and a.free_head[0][have] == NONE32:
        have += 1
    if have < PAGEBLOCK_ORDER:
        frame = a.free_head[0][have]
        remove_free_locked(a, frame)
    else:
        pb = take_pageblock_locked(a)
        if pb == NONE32:
            return NONE32
        frame = pb * PAGEBLOCK_FRAMES
    split_locked(a, frame, have, order)
    mark_used_locked(a, frame, 1u << order, owner, ref)
    return frame


cdef uint32_t merge_locked(arena_t* a, uint32_t frame, int order) noexcept nogil:
    """Puts a free block that is in no list into one, merged with its free buddies. A whole pageblock
    that is not isolated goes into none, and its number is returned for give_back(); else NONE32."""
    cdef uint32_t pb = frame // PAGEBLOCK_FRAMES
    cdef uint32_t buddy
    while order < PAGEBLOCK_ORDER:
        buddy = frame ^ (1u << order)
        if not load16(&a.pages[buddy].flags) & PG_FREE or a.pages[buddy].order != order:
            break
        remove_free_locked(a, buddy)
        frame &= ~(1u << order)
        order += 1
    if order < PAGEBLOCK_ORDER or a.pageblocks[pb].flags & PB_ISOLATED:
        push_free_locked(a, frame, order)
        return NONE32
    a.pageblocks[pb].flags = 0
    a.pageblocks_in_use -= 1
    return pb


cdef uint32_t free_locked(arena_t* a, uint32_t frame, int order) noexcept nogil:
    """As merge_locked(), for a block in use."""
    cdef uint32_t i
    for i in range(frame, frame + (1u << order)):
        a.pages[i].owner = OWNER_NONE
        store16(&a.pages[i].flags, 0)
    a.pageblocks[frame // PAGEBLOCK_FRAMES].nr_free += <uint16_t>(1u << order)
    a.frames_used -= 1u << order
    return merge_locked(a, frame, order)


cdef void arena_punch(arena_t* a, uint32_t pb) noexcept nogil:
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


cdef uint32_t arena_take_whole(arena_t* a, bint from_ready) noexcept nogil:
    cdef uint32_t pb
    pthread_mutex_lock(&a.lock)
    pb = take_whole_locked(a, from_ready)
    pthread_mutex_unlock(&a.lock)
    return pb


cdef void arena_add_ready(arena_t* a, uint32_t pb) noexcept nogil:
    pthread_mutex_lock(&a.lock)
    a.pageblocks[pb].next = a.ready
    a.ready = pb
    store64(&a.nr_ready, a.nr_ready + 1)
    pthread_mutex_unlock(&a.lock)


cdef inline void call_keeper(arena_t* a) noexcept nogil:
    """Wakes the keeper of the reserve if it has to fill it, or to give some of it back."""
    cdef uint64_t target = peek64(&a.ready_target), ready = peek64(&a.nr_ready)
    if target != 0 and (ready < target or ready > target + target // 2) and cas64(&a.keeper_called, 0, 1):
        sem_post(&a.keeper_wake)


cdef void give_back(arena_t* a, uint32_t pb) noexcept nogil:
    """Returns a whole free pageblock, which stands in no list, to the OS; with a reserve to that, and its
    keeper returns what is too much: no thread that serves requests waits for the system call."""
    if load64(&a.ready_target) == 0:
        arena_punch(a, pb)
        return
    arena_add_ready(a, pb)
    call_keeper(a)


# ---- the interface --------------------------------------------------------------------------

cdef bint wait_for_keeper(arena_t* a, uint64_t* until) noexcept nogil:
    """After an allocation that has found the reserve empty: True if it has become less so. The keeper may
    just not have had a CPU. False at *until, which the first call sets: a keeper that finds no memory may
    wait for the very page that the caller has come to store."""
    if load64(&a.ready_target) == 0:
        return False
    if until[0] == 0:
        until[0] = now_ns() + RESERVE_WAIT_NS
        add64(&a.reserve_misses, 1)
    while load64(&a.nr_ready) == 0:
        if now_ns() > until[0]:
            return False
        call_keeper(a)
        relax(256)
    return True


cdef int arena_alloc_frames(arena_t* a, int n, uint8_t owner, uint32_t ref, uint32_t* out) noexcept nogil:
    cdef int i
    cdef bint starved
    cdef uint64_t until = 0
    while True:
        pthread_mutex_lock(&a.lock)
        for i in range(n):
            out[i] = alloc_locked(a, 0, owner, ref)
            if out[i] == NONE32:
                break
        else:
            i = n
        starved = i < n and a.ready == NONE32
        pthread_mutex_unlock(&a.lock)
        call_keeper(a)
        if i == n:
            return 0
        arena_free_frames(a, i, out)
        if not starved or not wait_for_keeper(a, &until):
            return -ENOMEM


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
    cdef bint starved
    cdef uint64_t until = 0
    while True:
        pthread_mutex_lock(&a.lock)
        frame = alloc_locked(a, order, owner, ref)
        starved = frame == NONE32 and a.ready == NONE32
        pthread_mutex_unlock(&a.lock)
        call_keeper(a)
        if not starved or not wait_for_keeper(a, &until):
            return frame


cdef void arena_free_block(arena_t* a, uint32_t frame, int order) noexcept nogil:
    cdef uint32_t pb
    pthread_mutex_lock(&a.lock)
    pb = free_locked(a, frame, order)
    pthread_mutex_unlock(&a.lock)
    if pb != NONE32:
        give_back(a, pb)


# ---- isolated pageblocks ----------------------------------------------------------------------

cdef void relist_locked(arena_t* a, uint32_t pb, bint isolated) noexcept nogil:
    """Moves the free blocks of a pageblock between the two sets of lists."""
    cdef uint32_t frame = pb * PAGEBLOCK_FRAMES, end = frame + PAGEBLOCK_FRAMES
    cdef pageblock_desc_t* desc = &a.pageblocks[pb]
    cdef int order
    while frame < end:
        if not load16(&a.pages[frame].flags) & PG_FREE:
            frame += 1
            continue
        order = a.pages[frame].order
        remove_free_locked(a, frame)
        desc.flags ^= PB_ISOLATED
        push_free_locked(a, frame, order)
        desc.flags ^= PB_ISOLATED
        frame += 1u << order
    desc.flags = PB_IN_USE | PB_ISOLATED if isolated else PB_IN_USE


cdef bint arena_isolate_pageblock(arena_t* a, uint32_t pb) noexcept nogil:
    cdef bint taken
    pthread_mutex_lock(&a.lock)
    taken = pb < a.nr_pageblocks and a.pageblocks[pb].flags == PB_IN_USE
    if taken:
        relist_locked(a, pb, True)
    pthread_mutex_unlock(&a.lock)
    return taken


cdef bint arena_unisolate_pageblock(arena_t* a, uint32_t pb) noexcept nogil:
    cdef bint whole
    pthread_mutex_lock(&a.lock)
    whole = a.pageblocks[pb].nr_free == PAGEBLOCK_FRAMES
    if whole:
        remove_free_locked(a, pb * PAGEBLOCK_FRAMES)
        a.pageblocks[pb].flags = 0
        a.pageblocks_in_use -= 1
    else:
        relist_locked(a, pb, False)
    pthread_mutex_unlock(&a.lock)
    if whole:
        give_back(a, pb)
    return whole


cdef inline uint32_t free_head_of(arena_t* a, uint32_t frame) noexcept nogil:
    """The head of the free block that a frame lies in, or NONE32: at most ten candidates."""
    cdef uint32_t head
    cdef int order
    for order in range(NR_ORDERS):
        head = frame & ~((1u << order) - 1)
        if load16(&a.pages[head].flags) & PG_FREE and head + (1u << a.pages[head].order) > frame:
            return head
    return NONE32


cdef void carve_locked(arena_t* a, uint32_t frame) noexcept nogil:
    """Splits the free block around a frame until the frame is a block of order 0 in no list."""
    cdef uint32_t head = free_head_of(a, frame)
    cdef int order = a.pages[head].order
    remove_free_locked(a, head)
    while order > 0:
        order -= 1
        if frame & (1u << order):
            push_free_locked(a, head, order)
            head += 1u << order
        else:
            push_free_locked(a, head + (1u << order), order)


cdef bint arena_claim_range(arena_t* a, uint32_t first, uint32_t n, uint8_t owner, uint32_t ref) noexcept nogil:
    cdef uint32_t frame = first
    cdef bint free_all = True
    pthread_mutex_lock(&a.lock)
    if injected_locked(a):
        free_all = False
    while free_all and frame < first + n:
        free_all = free_head_of(a, frame) != NONE32
        frame += 1
    if free_all:
        for frame in range(first, first + n):
            carve_locked(a, frame)
        mark_used_locked(a, first, n, owner, ref)
    pthread_mutex_unlock(&a.lock)
    return free_all


cdef uint32_t arena_alloc_inside(arena_t* a, uint32_t pb, uint32_t* cursor) noexcept nogil:
    cdef uint32_t frame = cursor[0], end = (pb + 1) * PAGEBLOCK_FRAMES
    pthread_mutex_lock(&a.lock)
    if a.pageblocks[pb].flags != PB_IN_USE or a.pageblocks[pb].nr_free == 0 or injected_locked(a):
        frame = end
    # The first may lie inside a block, which frames freed behind the cursor have merged with it.
    if frame < end and free_head_of(a, frame) == NONE32:
        while frame < end and not load16(&a.pages[frame].flags) & PG_FREE:
            frame += 1
    if frame < end:
        carve_locked(a, frame)
        mark_used_locked(a, frame, 1, OWNER_NONE, 0)
    pthread_mutex_unlock(&a.lock)
    cursor[0] = frame + 1 if frame < end else end
    return frame if frame < end else NONE32


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
        self.close()

    def close(self):
        """Gives all memory back. Nobody may be at work on the arena; later calls raise ValueError."""
        cdef arena_t* a = self.a
        self.a = NULL
        with nogil:
            arena_delete(a)

    cdef arena_t* open(self) except NULL:
        if self.a == NULL:
            raise ValueError("the arena is closed")
        return self.a

    def alloc(self, order=0):
        """First frame number of a free block of 2^order frames. Raises MemoryError when none is left."""
        cdef arena_t* a = self.open()
        cdef int k = order
        cdef uint32_t frame
        if not 0 <= k <= PAGEBLOCK_ORDER:
            raise ValueError(f"order 0 to {PAGEBLOCK_ORDER} expected, got {order}")
        with nogil:
            frame = arena_alloc_block(a, k, OWNER_NONE, 0)
        if frame == NONE32:
            raise MemoryError(f"no free block of order {order} in {a.nr_pageblocks} pageblocks")
        return frame

    def free(self, frame, order=0):
        """Takes back what alloc(order) gave. Raises ValueError for anything else."""
        cdef arena_t* a = self.open()
        cdef uint32_t first, i
        cdef int k = order
        if not 0 <= k <= PAGEBLOCK_ORDER or not 0 <= frame < a.nr_frames or frame % (1 << k):
            raise ValueError(f"frame {frame} is no block of order {order}")
        first = frame
        for i in range(1u << k):
            if not load16(&a.pages[first + i].flags) & PG_USED or a.pages[first + i].owner != OWNER_NONE:
                raise ValueError(f"frame {first + i} is not one that alloc() handed out")
        with nogil:
            arena_free_block(a, first, k)

    def frame(self, frame):
        """The 4096 bytes of a frame in use, as a writable memoryview; not to be kept past free()."""
        cdef arena_t* a = self.open()
        cdef uint32_t n
        if not 0 <= frame < a.nr_frames or not a.pages[<uint32_t>frame].flags & PG_USED:
            raise ValueError(f"frame {frame} is not in use")
        n = frame
        return <uint8_t[:FRAME_SIZE]>frame_ptr(a, n)

    def inject_failure(self, after):
        """The after-th frame allocation from now fails as if memory were short (0 = none does)."""
        cdef arena_t* a = self.open()
        cdef uint64_t allocations = after
        pthread_mutex_lock(&a.lock)
        a.fail_after = allocations
        pthread_mutex_unlock(&a.lock)

    def fileno(self):
        """Descriptor of the memory file, owned by the arena."""
        return self.open().fd

    def buddyinfo(self):
        """Free blocks per order, 0 to 9; order 9 counts whole pageblocks, given back to the OS or in the
        reserve."""
        return arena_buddyinfo(self.open())

    def stats(self):
        return arena_stats(self.open())


cdef tuple arena_buddyinfo(arena_t* a):
    cdef uint64_t count[NR_ORDERS]
    cdef int order
    pthread_mutex_lock(&a.lock)
    for order in range(PAGEBLOCK_ORDER):
        count[order] = a.free_count[0][order] + a.free_count[1][order]
    count[PAGEBLOCK_ORDER] = a.nr_returned + a.nr_ready + a.free_count[1][PAGEBLOCK_ORDER]
    pthread_mutex_unlock(&a.lock)
    return tuple([count[order] for order in range(NR_ORDERS)])


cdef object arena_stats(arena_t* a):
    cdef uint64_t used, blocks, returned, errors, reserved, ready, misses
    pthread_mutex_lock(&a.lock)
    # Under the lock, so that none of the frames counted here has left its pageblock yet.
    reserved = peek64(&a.reserved)
    used = a.frames_used
    blocks = a.pageblocks_in_use
    returned = a.bytes_returned
    errors = a.punch_errors
    ready = a.nr_ready
    misses = peek64(&a.reserve_misses)
    pthread_mutex_unlock(&a.lock)
    return ArenaStats(
        frames_used=used,
        frames_free=blocks * PAGEBLOCK_FRAMES - used,
        pageblocks_in_use=blocks,
        pageblocks_total=a.nr_pageblocks,
        resident=(blocks + ready) * PAGEBLOCK_SIZE - reserved * FRAME_SIZE,
        bytes_returned=returned,
        punch_errors=errors,
        reserve=ready * PAGEBLOCK_SIZE,
        reserve_target=peek64(&a.ready_target) * PAGEBLOCK_SIZE,
        reserve_misses=misses,
    )
