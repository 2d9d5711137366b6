# SPDX-License-Identifier: Apache-2.0
# Locks: see balloon.pxd.
"""The balloon: a second owner of movable pages, which keeps frames from the pool.

A frame in the balloon holds no data and no memory, because it is punched out of the memory file. The
memory is the host's then. Compaction migrates such a frame like any other, which costs a system call and
no copy. arena_t.reserved counts the frames of the balloon; a pool with a limit takes them off what it may
use. A frame that leaves the balloon gets its memory again when it is needed (populate.pyx).
"""
cimport cython
from libc.stdint cimport int64_t, uint32_t, uint64_t

from allocator.arena cimport Arena
from allocator.buddy cimport arena_alloc_frames, arena_free_block
from allocator.frames cimport arena_t, page_owner_t
from allocator.layout cimport *
from allocator.lists cimport page_list_push, page_list_remove
from allocator.migrate cimport (
    clear_page_movable, owner_register, owner_unregister, page_lock, page_unlock, set_page_movable,
)
from allocator.populate cimport arena_fill_hole, arena_punch_hole
from allocator.prim cimport *

from allocator.stats import BalloonStats

cdef enum:
    LISTED = 1              # page_desc_t.ref of a frame in the balloon's list


cdef void balloon_list_locked(balloon_t* b, uint32_t frame) noexcept nogil:
    b.arena.pages[frame].ref = LISTED
    page_list_push(b.arena.pages, &b.head, frame)


cdef void balloon_unlist_locked(balloon_t* b, uint32_t frame) noexcept nogil:
    page_list_remove(b.arena.pages, &b.head, frame)
    b.arena.pages[frame].ref = 0


# ---- owner of movable pages: see migrate.pyx for the contracts --------------------------------------

cdef bint balloon_isolate(void* ctx, uint32_t frame) noexcept nogil:
    cdef balloon_t* b = <balloon_t*>ctx
    cdef bint taken
    pthread_mutex_lock(&b.lock)
    # A frame off the list is about to be given back to the arena.
    taken = b.arena.pages[frame].ref == LISTED
    if taken:
        balloon_unlist_locked(b, frame)
        b.isolated += 1
    pthread_mutex_unlock(&b.lock)
    return taken


cdef int balloon_migrate(void* ctx, uint32_t new, uint32_t old) noexcept nogil:
    cdef balloon_t* b = <balloon_t*>ctx
    set_page_movable(b.arena, new, OWNER_BALLOON, 0)
    arena_punch_hole(b.arena, new)
    pthread_mutex_lock(&b.lock)
    balloon_list_locked(b, new)
    b.isolated -= 1
    b.migrated += 1
    pthread_mutex_unlock(&b.lock)
    clear_page_movable(b.arena, old)
    arena_fill_hole(b.arena, old)
    return 0


cdef void balloon_putback(void* ctx, uint32_t frame) noexcept nogil:
    cdef balloon_t* b = <balloon_t*>ctx
    pthread_mutex_lock(&b.lock)
    balloon_list_locked(b, frame)
    b.isolated -= 1
    pthread_mutex_unlock(&b.lock)


# ---- inflate, deflate -----------------------------------------------------------------------------

cdef void balloon_push(balloon_t* b, uint32_t frame) noexcept nogil:
    pthread_mutex_lock(&b.lock)
    balloon_list_locked(b, frame)
    b.pages += 1
    pthread_mutex_unlock(&b.lock)


cdef uint32_t balloon_inflate(balloon_t* b, uint32_t n) noexcept nogil:
    """Takes up to n frames: how many were to be had."""
    cdef uint32_t frame, done = 0
    while done < n and arena_alloc_frames(b.arena, 1, OWNER_BALLOON, 0, &frame) == 0:
        add64(&b.arena.reserved, 1)
        arena_punch_hole(b.arena, frame)
        # Movable before it is listed: until then isolate() refuses it, and balloon_pop() can't find it.
        set_page_movable(b.arena, frame, OWNER_BALLOON, 0)
        balloon_push(b, frame)
        done += 1
    return done


cdef void balloon_take_left(balloon_t* b) noexcept nogil:
    """The frames that recovery has found in the arena, which counts them already."""
    cdef uint32_t frame
    b.head = b.arena.left_frames
    b.pages = b.arena.nr_left
    b.arena.left_frames = NONE32
    b.arena.nr_left = 0
    frame = b.head
    while frame != NONE32:
        b.arena.pages[frame].ref = LISTED
        frame = b.arena.pages[frame].next


cdef uint32_t balloon_pop(balloon_t* b) noexcept nogil:
    """A frame that is off the list, and so can't be isolated any more; NONE32 if none is listed."""
    cdef uint32_t frame
    pthread_mutex_lock(&b.lock)
    frame = b.head
    if frame != NONE32:
        balloon_unlist_locked(b, frame)
        b.pages -= 1
    pthread_mutex_unlock(&b.lock)
    return frame


cdef uint32_t balloon_deflate(balloon_t* b, uint32_t n) noexcept nogil:
    """Gives up to n frames back to the pool. Those under migration stay."""
    cdef uint32_t frame, done = 0
    while done < n:
        frame = balloon_pop(b)
        if frame == NONE32:
            break
        # The migration core may just be finding out that the frame can't be isolated any more.
        page_lock(b.arena, frame)
        clear_page_movable(b.arena, frame)
        page_unlock(b.arena, frame)
        # Before the frame is free: what is reserved is part of the pageblocks in use at any moment.
        sub64(&b.arena.reserved, 1)
        arena_fill_hole(b.arena, frame)
        arena_free_block(b.arena, frame, 0)
        done += 1
    return done


# The collector must not take the arena away before __dealloc__ has used it.
@cython.no_gc_clear
cdef class Balloon:
    """Takes frames out of an arena so that the host has their memory, and gives them back.

    Any thread may call it, and the arena's users go on meanwhile. In an arena that was recovered it begins
    with the frames and the target that the last balloon had. Raises ValueError for an arena that has a
    balloon already: it takes one at a time.
    """

    def __cinit__(self, Arena arena not None):
        cdef page_owner_t owner
        self.arena = arena
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
        balloon_take_left(&self.b)

    def __dealloc__(self):
        if self.registered and self.arena.a != NULL:
            with nogil:
                owner_unregister(self.b.arena, OWNER_BALLOON)
                self.b.arena.sb.balloon_target = 0
                balloon_deflate(&self.b, NONE32)
        pthread_mutex_destroy(&self.b.lock)

    def __repr__(self):
        if self.arena.a == NULL:
            return "<Balloon, its arena is closed>"
        now = self.stats()
        return f"<Balloon of {now.pages} pages, target {now.target}>"

    @property
    def target(self):
        """Pages that the balloon shall hold."""
        return self.arena.open().sb.balloon_target

    def set_target(self, pages):
        """The number of pages of 4096 bytes that the balloon shall hold; adjust() works towards it. Raises
        ValueError for more than the arena has."""
        cdef arena_t* a = self.arena.open()
        if not 0 <= pages <= a.nr_frames:
            raise ValueError(f"a target of 0 to {a.nr_frames} pages expected, got {pages}")
        a.sb.balloon_target = pages

    def adjust(self, most, room=None):
        """One step of at most `most` pages towards the target. room: how many frames it may take at most,
        None = no such bound. The number of pages by which the balloon grew; negative if it shrank."""
        cdef uint32_t n
        wanted = self.target - self.stats().pages
        if wanted > 0:
            n = max(0, min(wanted, most, wanted if room is None else room))
            with nogil:
                n = balloon_inflate(&self.b, n)
            return n
        n = max(0, min(-wanted, most))
        with nogil:
            n = balloon_deflate(&self.b, n)
        return -<int64_t>n

    def stats(self):
        """BalloonStats of this moment."""
        cdef uint64_t pages, isolated, migrated
        self.arena.open()
        pthread_mutex_lock(&self.b.lock)
        pages, isolated, migrated = self.b.pages, self.b.isolated, self.b.migrated
        pthread_mutex_unlock(&self.b.lock)
        return BalloonStats(target=self.target, pages=pages, isolated=isolated, migrated=migrated)
