# SPDX-License-Identifier: Apache-2.0
# Lock order: see balloon.pxd.
"""The balloon: a second owner of movable pages.

A frame in the balloon holds no data and no memory: it is punched out of the memory file, and the
pool can't have it. Frames that lie in its way are migrated by compaction like any others, which
costs a system call and no copy. arena_t.reserved counts its frames; a pool with a limit takes them
off what it may use.
"""
cimport cython
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from allocator.arena cimport Arena
from allocator.buddy cimport arena_alloc_frames, arena_free_block
from allocator.frames cimport arena_t, frame_ptr, page_owner_t
from allocator.layout cimport *
from allocator.migrate cimport (
    clear_page_movable, owner_register, owner_unregister, page_lock, page_unlock, set_page_movable,
)
from allocator.prim cimport *

from allocator.stats import BalloonStats

cdef enum:
    LISTED = 1              # page_desc_t.ref of a frame in the balloon's list


cdef void insert_locked(balloon_t* b, uint32_t frame) noexcept nogil:
    cdef page_desc_t* page = &b.arena.pages[frame]
    page.ref = LISTED
    page.prev = NONE32
    page.next = b.head
    if b.head != NONE32:
        b.arena.pages[b.head].prev = frame
    b.head = frame


cdef void remove_locked(balloon_t* b, uint32_t frame) noexcept nogil:
    cdef page_desc_t* page = &b.arena.pages[frame]
    if page.prev != NONE32:
        b.arena.pages[page.prev].next = page.next
    else:
        b.head = page.next
    if page.next != NONE32:
        b.arena.pages[page.next].prev = page.prev
    page.ref = 0


cdef void punch(arena_t* a, uint32_t frame) noexcept nogil:
    # A frame that the OS does not take back stays resident, which the balloon can't help.
    fallocate(a.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
              <int64_t>(a.sb.frames_off + (<uint64_t>frame << FRAME_SHIFT)), FRAME_SIZE)


cdef void fill_hole(arena_t* a, uint32_t frame) noexcept nogil:
    """In an arena with a reserve every free frame is resident ([A5]): those that leave the balloon too."""
    if load64(&a.ready_target) != 0:
        make_resident(frame_ptr(a, frame), FRAME_SIZE)


# ---- owner of movable pages: see migrate.pyx for the contracts --------------------------------------

cdef bint balloon_isolate(void* ctx, uint32_t frame) noexcept nogil:
    cdef balloon_t* b = <balloon_t*>ctx
    cdef bint taken
    pthread_mutex_lock(&b.lock)
    # A frame off the list is about to be given back to the arena.
    taken = b.arena.pages[frame].ref == LISTED
    if taken:
        remove_locked(b, frame)
        b.isolated += 1
    pthread_mutex_unlock(&b.lock)
    return taken


cdef int balloon_migrate(void* ctx, uint32_t new, uint32_t old) noexcept nogil:
    cdef balloon_t* b = <balloon_t*>ctx
    punch(b.arena, new)
    set_page_movable(b.arena, new, OWNER_BALLOON, 0)
    pthread_mutex_lock(&b.lock)
    insert_locked(b, new)
    b.isolated -= 1
    b.migrated += 1
    pthread_mutex_unlock(&b.lock)
    fill_hole(b.arena, old)
    clear_page_movable(b.arena, old)
    return 0


cdef void balloon_putback(void* ctx, uint32_t frame) noexcept nogil:
    cdef balloon_t* b = <balloon_t*>ctx
    pthread_mutex_lock(&b.lock)
    insert_locked(b, frame)
    b.isolated -= 1
    pthread_mutex_unlock(&b.lock)


# ---- inflate, deflate -----------------------------------------------------------------------------

cdef uint32_t inflate(balloon_t* b, uint32_t n) noexcept nogil:
    """Takes up to n frames: how many were to be had."""
    cdef uint32_t frame, done = 0
    while done < n and arena_alloc_frames(b.arena, 1, OWNER_BALLOON, 0, &frame) == 0:
        punch(b.arena, frame)
        add64(&b.arena.reserved, 1)
        # Movable before it is listed: until then isolate() refuses it, and no deflate() can find it.
        set_page_movable(b.arena, frame, OWNER_BALLOON, 0)
        pthread_mutex_lock(&b.lock)
        insert_locked(b, frame)
        b.pages += 1
        pthread_mutex_unlock(&b.lock)
        done += 1
    return done


cdef uint32_t deflate(balloon_t* b, uint32_t n) noexcept nogil:
    """Gives up to n frames back to the pool; those under migration stay."""
    cdef uint32_t frame, done = 0
    while done < n:
        pthread_mutex_lock(&b.lock)
        frame = b.head
        if frame != NONE32:
            remove_locked(b, frame)
            b.pages -= 1
        pthread_mutex_unlock(&b.lock)
        if frame == NONE32:
            break
        # Off the list it can't be isolated any more; the core may just be finding that out.
        page_lock(b.arena, frame)
        clear_page_movable(b.arena, frame)
        page_unlock(b.arena, frame)
        # Before the frame is free: what is reserved is part of the pageblocks in use at any moment.
        sub64(&b.arena.reserved, 1)
        fill_hole(b.arena, frame)
        arena_free_block(b.arena, frame, 0)
        done += 1
    return done


# The collector must not take the arena away before __dealloc__ has used it.
@cython.no_gc_clear
cdef class Balloon:
    """Takes frames out of a pool so that the host has their memory, and gives them back.

    Any thread may call it; the pool and migration go on meanwhile. An arena takes one balloon at a
    time: ValueError.
    """

    def __cinit__(self, Arena arena not None):
        cdef page_owner_t owner
        self.arena = arena
        self.target = 0
        self.b.arena = arena.open()
        self.b.head = NONE32
        pthread_mutex_init(&self.b.lock, NULL)
        owner.ctx = &self.b
        owner.isolate = balloon_isolate
        owner.migrate = balloon_migrate
        owner.putback = balloon_putback
        self.registered = owner_register(self.b.arena, OWNER_BALLOON, &owner)
        if not self.registered:
            raise ValueError("this arena has a balloon already")

    def __dealloc__(self):
        if self.registered and self.arena.a != NULL:
            with nogil:
                owner_unregister(self.b.arena, OWNER_BALLOON)
                deflate(&self.b, NONE32)
        pthread_mutex_destroy(&self.b.lock)

    def set_target(self, pages):
        """How many pages the balloon shall hold; adjust() works towards it. Raises ValueError."""
        cdef arena_t* a = self.arena.open()
        if not 0 <= pages <= a.nr_frames:
            raise ValueError(f"a target of 0 to {a.nr_frames} pages expected, got {pages}")
        self.target = pages

    def adjust(self, most, room=None):
        """One step of at most `most` pages towards the target; with room, no more than that many
        frames are taken. Returns by how many pages the balloon grew (negative: shrank)."""
        cdef uint32_t n
        wanted = self.target - self.stats().pages
        if wanted > 0:
            n = max(0, min(wanted, most, wanted if room is None else room))
            with nogil:
                n = inflate(&self.b, n)
            return n
        n = max(0, min(-wanted, most))
        with nogil:
            n = deflate(&self.b, n)
        return -<int64_t>n

    def stats(self):
        cdef uint64_t pages, isolated, migrated
        self.arena.open()
        pthread_mutex_lock(&self.b.lock)
        pages, isolated, migrated = self.b.pages, self.b.isolated, self.b.migrated
        pthread_mutex_unlock(&self.b.lock)
        return BalloonStats(target=self.target, pages=pages, isolated=isolated, migrated=migrated)
