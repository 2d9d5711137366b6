# SPDX-License-Identifier: Apache-2.0
# Locks: see frames.pxd.
"""The arena: 4 KiB page frames in 2 MiB pageblocks of one memory file.

Its making and its end, its statistics, and the class Arena for Python. How frames are taken and given
back is in buddy.pyx, how they get their memory in populate.pyx.
"""
from libc.errno cimport EINVAL, ENOMEM
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset

from allocator.buddy cimport arena_alloc_block, arena_free_block
from allocator.frames cimport arena_t, frame_ptr
from allocator.layout cimport *
from allocator.prim cimport *

from allocator.stats import ArenaStats

cdef enum:
    # Frame numbers have 32 bits and NONE32 is taken: 16 TiB less one pageblock.
    MAX_BLOCKS = (1 << 23) - 1
    ARRAYS = 9 * 8          # bytes of the superblock that say where the arrays lie, from user_off on

MAX_PAGEBLOCKS = MAX_BLOCKS


cdef void superblock_fill(superblock_t* sb, uint64_t user_size, uint64_t nr_pageblocks) noexcept nogil:
    """Where each array lies: one behind the other, the frames from a multiple of 2 MiB on."""
    cdef uint64_t nr_frames = nr_pageblocks * PAGEBLOCK_FRAMES
    memset(sb, 0, sizeof(superblock_t))
    sb.magic = SUPERBLOCK_MAGIC
    sb.version = LAYOUT_VERSION
    sb.note_off = FRAME_SIZE
    sb.user_off = sb.note_off + NR_NOTES * 2 * NOTE_HALF
    sb.user_size = round_up(user_size, FRAME_SIZE)
    sb.pageblock_off = sb.user_off + sb.user_size
    sb.page_off = round_up(sb.pageblock_off + nr_pageblocks * sizeof(pageblock_desc_t), FRAME_SIZE)
    sb.zspage_off = round_up(sb.page_off + nr_frames * sizeof(page_desc_t), FRAME_SIZE)
    sb.frames_off = round_up(sb.zspage_off + nr_frames * sizeof(zspage_desc_t), PAGEBLOCK_SIZE)
    sb.nr_pageblocks = nr_pageblocks
    sb.file_size = sb.frames_off + nr_pageblocks * PAGEBLOCK_SIZE


cdef int superblock_read(int fd, superblock_t* sb) noexcept nogil:
    """Of a file that another process has left: 0, or -EINVAL for one whose arrays lie elsewhere than this
    build puts them."""
    cdef superblock_t ours
    if pread(fd, sb, sizeof(sb[0]), 0) != sizeof(sb[0]):
        return -EINVAL
    if (sb.magic != SUPERBLOCK_MAGIC or sb.version != LAYOUT_VERSION or sb.nr_pageblocks == 0
            or sb.nr_pageblocks > <uint64_t>MAX_BLOCKS or sb.user_size >> 46 != 0):
        return -EINVAL
    superblock_fill(&ours, sb.user_size, sb.nr_pageblocks)
    if memcmp(&ours.user_off, &sb.user_off, ARRAYS) != 0:
        return -EINVAL
    if lseek(fd, 0, SEEK_END) != <int64_t>sb.file_size:
        return -EINVAL
    return 0


cdef int arena_map(arena_t* a, const superblock_t* sb, bint made) noexcept nogil:
    """Maps the memory file a.fd. made: it is an empty one, which gets its size and its superblock. 0, or
    -ENOMEM."""
    cdef void* base
    # Cut first: a process may have been killed here before the magic was stored.
    if made and (ftruncate(a.fd, 0) != 0 or ftruncate(a.fd, <int64_t>sb.file_size) != 0):
        return -ENOMEM
    base = map_sparse(sb.file_size, a.fd)
    if base == NULL or try_populate(base, sizeof(superblock_t)) != 0:
        if base != NULL:
            munmap(base, sb.file_size)
        return -ENOMEM
    # A core dump must not carry what users stored.
    madvise(base, sb.file_size, MADV_DONTDUMP)
    a.base = <uint8_t*>base
    a.file_size = sb.file_size
    a.sb = <superblock_t*>base
    if made:
        memcpy(&a.sb.version, &sb.version, sizeof(sb[0]) - sizeof(sb.magic))
        store64(&a.sb.magic, sb.magic)
    a.user = a.base + sb.user_off
    a.pageblocks = <pageblock_desc_t*>(a.base + sb.pageblock_off)
    a.pages = <page_desc_t*>(a.base + sb.page_off)
    a.zspages = <zspage_desc_t*>(a.base + sb.zspage_off)
    a.frames = a.base + sb.frames_off
    a.nr_pageblocks = <uint32_t>sb.nr_pageblocks
    a.nr_frames = a.nr_pageblocks * PAGEBLOCK_FRAMES
    # Where the machine lets memory files have huge pages (shmem_enabled: advise), a pageblock is one of
    # them: 4 KiB random reads take 0.9 us of user time instead of 1.1, by their TLB misses. Not for the
    # arrays before the frames, which are used sparsely.
    madvise(a.frames, sb.nr_pageblocks * PAGEBLOCK_SIZE, MADV_HUGEPAGE)
    return 0


cdef arena_t* arena_new(uint64_t user_size, uint64_t nr_pageblocks, int fd, int* err) noexcept nogil:
    """An arena costs a few pages of memory however large it is: everything else appears when it is first
    used."""
    cdef superblock_t sb
    superblock_fill(&sb, user_size, nr_pageblocks)
    return arena_open(&sb, fd, True, err)


cdef arena_t* arena_adopt(int fd, int* err) noexcept nogil:
    cdef superblock_t sb
    err[0] = superblock_read(fd, &sb)
    return arena_open(&sb, fd, False, err) if err[0] == 0 else NULL


cdef arena_t* arena_open(const superblock_t* sb, int fd, bint made, int* err) noexcept nogil:
    cdef arena_t* a = <arena_t*>calloc(1, sizeof(arena_t))
    cdef int order
    err[0] = -ENOMEM
    if a == NULL:
        return NULL
    a.lent = fd >= 0
    a.fd = fcntl(fd, F_DUPFD_CLOEXEC, 0) if a.lent else memfd_create(b"zramfs", MFD_CLOEXEC)
    if a.fd < 0 or arena_map(a, sb, made) != 0:
        if a.fd >= 0:
            close(a.fd)
        free(a)
        return NULL
    err[0] = 0
    for order in range(NR_ORDERS):
        a.free_head[0][order] = NONE32
        a.free_head[1][order] = NONE32
    a.returned = NONE32
    a.ready = NONE32
    a.left_frames = NONE32
    sem_init(&a.filler_wake, 0, 0)
    short_mutex_init(&a.lock)
    short_mutex_init(&a.populate_lock)
    pthread_mutex_init(&a.migrate_lock, NULL)
    return a


cdef void arena_delete(arena_t* a) noexcept nogil:
    if a == NULL:
        return
    munmap(a.base, a.file_size)
    close(a.fd)
    pthread_mutex_destroy(&a.lock)
    pthread_mutex_destroy(&a.populate_lock)
    pthread_mutex_destroy(&a.migrate_lock)
    sem_destroy(&a.filler_wake)
    free(a)


cdef bint is_made(int fd) noexcept nogil:
    """Whether a memory file holds an arena, of whatever layout: not an empty file, and not one whose making
    was cut short."""
    cdef uint64_t magic = 0
    return pread(fd, &magic, sizeof(magic), 0) == sizeof(magic) and magic == SUPERBLOCK_MAGIC


cdef class Arena:
    """Page frames of 4096 bytes in one memory file.

    user_size: bytes of the user region, 0 to 2^46 - 1, which the arena keeps for its user and does not
    look at. nr_pageblocks: blocks of 2 MiB that it may hand out at most, 1 to MAX_PAGEBLOCKS. A large arena
    costs nothing until it is used. As a context manager it is closed at the end.
    fd: an empty memory file to lie in, of which the arena keeps a duplicate; -1 = one of its own. In a file
    that another process holds open too, the arena outlives this process: see adopt().
    Raises ValueError for sizes out of range or a file that is not empty, and MemoryError when the system
    gives no address space.
    """

    def __cinit__(self, user_size, nr_pageblocks, int fd=-1):
        cdef uint64_t user, blocks
        cdef int err = 0
        if user_size is None:
            with nogil:
                self.a = arena_adopt(fd, &err)
            if err == -EINVAL:
                raise ValueError(
                    f"expected a memory file with layout {LAYOUT_VERSION}, got {superblock_shown(fd)}")
            if self.a == NULL:
                raise MemoryError("the memory file can't be mapped: see `ulimit -v`")
            return
        if fd >= 0 and is_made(fd):
            raise ValueError("an empty memory file expected, got one that can be adopted")
        if not 0 <= user_size < 1 << 46:
            raise ValueError(f"user region of 0 to 64 TiB expected, got {user_size} bytes")
        if not 1 <= nr_pageblocks <= MAX_PAGEBLOCKS:
            raise ValueError(f"1 to {MAX_PAGEBLOCKS} pageblocks expected, got {nr_pageblocks}")
        user = user_size
        blocks = nr_pageblocks
        with nogil:
            self.a = arena_new(user, blocks, fd, &err)
        if self.a == NULL:
            raise MemoryError(
                f"no memory file with {nr_pageblocks} pageblocks of 2 MiB could be mapped; "
                "see `ulimit -v` and `sysctl vm.overcommit_memory`"
            )

    def __dealloc__(self):
        # A reserve that still ran would have kept this object alive.
        arena_delete(self.a)

    @staticmethod
    def adopt(fd):
        """The arena that another process has left in a memory file, of which a duplicate is kept. Until
        recovery (allocator/recovery.pyx) nothing in it may be used but the notes. Raises ValueError for
        another file or layout."""
        return Arena(None, None, fd)

    def __enter__(self):
        self.open()
        return self

    def __exit__(self, *exception):
        self.close()

    def __repr__(self):
        if self.a == NULL:
            return "<Arena, closed>"
        now = self.stats()
        return (f"<Arena of {now.pageblocks_total} pageblocks: {now.pageblocks_in_use} in use, "
                f"{now.frames_used} frames used, {now.frames_free} free>")

    def close(self):
        """Gives all memory back. No other call may be under way on the arena or on what was made on it;
        later calls raise ValueError. A second close() does nothing. Raises ValueError for an arena whose
        reserve is not closed. A memory file that was given to the arena is empty afterwards."""
        cdef arena_t* a = self.a
        if a != NULL and load64(&a.ready_target) != 0:
            raise ValueError("the arena has a reserve, whose thread works on it: close the reserve first")
        self.a = NULL
        with nogil:
            if a != NULL and a.lent:
                ftruncate(a.fd, 0)
            arena_delete(a)

    @property
    def current(self):
        """Whether the memory file still has the arena that was adopted, or another one of the same shape."""
        cdef arena_t* a = self.open()
        cdef superblock_t sb
        return superblock_read(a.fd, &sb) == 0 and sb.file_size == a.file_size

    def map_resident(self):
        """Makes page tables for what the memory file holds, so that recovery has no page faults, and answers
        how many bytes that are. For a process that waits to adopt the arena, again and again. It changes
        nothing and touches nothing, so another process may be at work. Raises OSError when the memory is
        refused."""
        cdef arena_t* a = self.open()
        cdef int64_t mapped
        with nogil:
            mapped = arena_map_resident(a)
        if mapped < 0:
            raise OSError(<int>-mapped, "the memory of the page tables is refused")
        return mapped

    def leave(self):
        """As close(), but the memory file stays as it is, for whoever holds it and adopts the arena."""
        cdef arena_t* a = self.a
        self.a = NULL
        arena_delete(a)

    cdef arena_t* open(self) except NULL:
        if self.a == NULL:
            raise ValueError("the arena is closed")
        return self.a

    def alloc(self, order=0):
        """The number of the first frame of a free block of 2^order frames, order 0 to 9. The block is aligned
        to its size. Raises MemoryError when no block is left, or the system refuses its memory."""
        cdef arena_t* a = self.open()
        cdef int k = order
        cdef uint32_t frame
        if not 0 <= k <= PAGEBLOCK_ORDER:
            raise ValueError(f"order 0 to {PAGEBLOCK_ORDER} expected, got {order}")
        with nogil:
            frame = arena_alloc_block(a, k, OWNER_NONE, 0)
        if frame == NONE32:
            raise MemoryError(f"no free block of order {order} in {a.nr_pageblocks} pageblocks, or the "
                              "system refuses its memory")
        return frame

    def free(self, frame, order=0):
        """Takes back what alloc(order) gave; a block may also be given back in aligned parts. Raises
        ValueError for anything else, and changes nothing then."""
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
        """The 4096 bytes of a frame in use, as a writable memoryview. It must not be used after free() or
        close(). Raises ValueError for a frame that is not in use."""
        cdef arena_t* a = self.open()
        cdef uint32_t n
        if not 0 <= frame < a.nr_frames or not a.pages[<uint32_t>frame].flags & PG_USED:
            raise ValueError(f"frame {frame} is not in use")
        n = frame
        return <uint8_t[:FRAME_SIZE]>frame_ptr(a, n)

    def inject_failure(self, after):
        """Fault injection: the after-th frame allocation from here on fails as if memory were short. 0: none
        does."""
        cdef arena_t* a = self.open()
        cdef uint64_t allocations = after
        pthread_mutex_lock(&a.lock)
        a.fail_after = allocations
        pthread_mutex_unlock(&a.lock)

    def fileno(self):
        """The descriptor of the memory file, which stays the arena's."""
        return self.open().fd

    def note(self, number):
        """The bytes of a note, 0 to NR_NOTES - 1; b"" before it is set."""
        cdef arena_t* a = self.open()
        cdef uint64_t word
        if not 0 <= number < NR_NOTES:
            raise ValueError(f"a note of 0 to {NR_NOTES - 1} expected, got {number}")
        word = load64(&a.sb.note[<int>number])
        if word >> 1 > NOTE_HALF:
            raise ValueError(f"expected note {number} to have at most {NOTE_HALF} bytes, got {word >> 1}")
        return (<const char*>note_half(a, number, word & 1))[:word >> 1]

    def set_note(self, number, bytes content not None):
        """Replaces a note by at most NOTE_HALF bytes (5 MiB), in one step: whoever adopts the arena finds the
        old one or the new one. One thread at a time. Raises ValueError, and MemoryError when the system
        refuses the memory."""
        cdef arena_t* a = self.open()
        cdef uint64_t n = len(content), half
        cdef char* to
        if not 0 <= number < NR_NOTES or n > NOTE_HALF:
            raise ValueError(
                f"at most {NOTE_HALF} bytes of note 0 to {NR_NOTES - 1} expected, got {n} of {number}")
        half = ~load64(&a.sb.note[<int>number]) & 1
        to = note_half(a, number, half)
        if n and try_populate(to, n) != 0:
            raise MemoryError(f"the system refuses {n} bytes of the memory file")
        memcpy(to, <const char*>content, n)
        store64(&a.sb.note[<int>number], n << 1 | half)

    def buddyinfo(self):
        """The number of free blocks of each order, 0 to 9. Order 9 counts whole pageblocks: given back to
        the system, or in the reserve."""
        return arena_buddyinfo(self.open())

    def stats(self):
        """ArenaStats of this moment."""
        return arena_stats(self.open())


cdef int64_t arena_map_resident(arena_t* a) noexcept nogil:
    """Bytes, or -ENOMEM. A file that is cut meanwhile is no error."""
    cdef int64_t at = 0, end, mapped = 0
    while True:
        at = lseek(a.fd, at, SEEK_DATA)
        if at < 0 or <uint64_t>at >= a.file_size:
            return mapped
        end = min(lseek(a.fd, at, SEEK_HOLE), <int64_t>a.file_size)
        if end <= at:
            return mapped
        if try_map(a.base + at, <size_t>(end - at)) != 0:
            return -ENOMEM
        mapped += end - at
        at = end


cdef char* note_half(arena_t* a, uint64_t number, uint64_t half) noexcept nogil:
    return <char*>a.base + a.sb.note_off + (number * 2 + half) * NOTE_HALF


cdef str superblock_shown(int fd):
    cdef superblock_t sb
    if pread(fd, &sb, sizeof(sb), 0) != sizeof(sb) or sb.magic != SUPERBLOCK_MAGIC:
        return "something else"
    if sb.version != LAYOUT_VERSION:
        return f"layout {sb.version}: the version of zramfs that made it can read it"
    return "a damaged superblock"


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
    returned = a.sb.bytes_returned
    errors = a.sb.punch_errors
    ready = a.nr_ready
    misses = peek64(&a.sb.reserve_misses)
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
        refused=peek64(&a.sb.refused),
    )
