# SPDX-License-Identifier: Apache-2.0
# Lock order: slots.pxd; arena_t.lock for a few words, alone. The GIL guards what only Python changes.
"""The store of a device, for Python."""
cimport cython
from libc.errno cimport EBUSY, EINVAL
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize

from allocator.arena cimport Arena, arena_buddyinfo
from allocator.balloon cimport Balloon
from allocator.compaction cimport Migration
from allocator.headroom cimport Headroom
from allocator.layout cimport PAGEBLOCK_FRAMES
from allocator.pool cimport pool_classes
from allocator.prim cimport *
from allocator.reserve cimport Reserve
from allocator.zscompact cimport zs_compact, zs_compact_slice
from allocator.zsmalloc cimport zs_flush_deferred, zs_wake_after
from zramfs.store.access_times cimport keep_access_times, mark_idle
from zramfs.store.backing cimport Backing
from zramfs.codecs.codec cimport CODEC_NONE, Codec
from zramfs.store.check cimport check_store
from zramfs.store.ranges cimport (
    store_disksize, store_read, store_seek, store_set_overdraft, store_write, store_zero,
)
from zramfs.store.record cimport codecs_packed, kept_arguments
from zramfs.store.recovery cimport store_recover
from zramfs.store.slots cimport *
from zramfs.store.tables cimport (
    clear_memory_file, record_finish, store_ctx_free, store_ctx_new, store_delete, store_new, store_stats,
    store_stay_ready, store_winnable,
)

import os

from zramfs.model.config import MAX_DISKSIZE as _MAX_DISKSIZE
from zramfs.model.kernel_pages import expect_kernel_pages

# A pool can need eight times the device's size (every zspage holding one object), but never more
# than the machine's memory; 8 TiB of address space is the most that is asked for.
MAX_PAGEBLOCKS = 4 << 20
SPARE_PAGEBLOCKS = 64


# The collector must not take the arena away before __dealloc__ has used it.
@cython.no_gc_clear
cdef class Store:
    """The pages of one device.

    disksize: bytes, 1 to 2^48, rounded up to 4096. grows_to: bytes up to which resize.resize() can make it
    larger, which costs address space. algo, level, dictionary: the primary algorithm, see
    zramfs.codecs.codec. secondary: Codecs (or None) of priority 1 to 3, whose objects `recompress` makes.
    mem_limit: bytes of pool memory, rounded up to 4096, 0 = none. backing: an open Backing,
    which belongs to the store from then on, or None. reserve: bytes of memory that is kept ready
    (allocator/reserve.pyx), rounded up to 2 MiB, 0 = none; with one the slot table (disksize / 512) is
    resident too, and no read, write or discard makes memory resident. wipe: what goes away or moves is
    zeroed in the memory file at once. headroom: the store, its one user, asks it before the pool takes
    memory; None = nobody is asked. fd: an empty memory file that the store lies in, which others may hold
    too, so that the store outlives this process; -1 = one of its own. adopted: an arena with a store, see
    adopt(). Raises ValueError for a bad argument, OSError if the reserve's thread can't be had, and
    MemoryError when address space is short. Any thread may call any method; data moves without the GIL.
    """

    def __cinit__(self, disksize, *, str algo="lz4", level=None, dictionary=None, secondary=(), mem_limit=0,
                  Backing backing=None, reserve=0, bint wipe=False, Headroom headroom=None, grows_to=0,
                  int fd=-1, Arena adopted=None, tuple generations=(0,) * NR_PRIO):
        """Long: one step for each part of a store, and the way back from each."""
        cdef uint64_t nr_slots, most_slots
        cdef Codec codec
        cdef int prio
        expect_kernel_pages()
        self.generations = generations
        self.codecs = (Codec(algo, level, dictionary), *secondary, *(None,) * (NR_PRIO - 1 - len(secondary)))
        if len(self.codecs) != NR_PRIO:
            raise ValueError(f"at most {NR_PRIO - 1} secondary algorithms expected, got {len(secondary)}")
        if not 1 <= disksize <= _MAX_DISKSIZE:
            raise ValueError(f"a disk size of 1 to {_MAX_DISKSIZE} bytes expected, got {disksize}")
        nr_slots = (disksize + PAGE - 1) >> PAGE_SHIFT
        most_slots = max(nr_slots, min(grows_to, _MAX_DISKSIZE) >> PAGE_SHIFT)
        nr_pageblocks = min(
            (8 * most_slots + PAGEBLOCK_FRAMES - 1) // PAGEBLOCK_FRAMES + SPARE_PAGEBLOCKS, MAX_PAGEBLOCKS)
        self.arena = adopted
        if adopted is None:
            clear_memory_file(fd)
            self.arena = Arena(user_bytes(most_slots), nr_pageblocks, fd)
        self.migration = Migration(self.arena)
        self.st = store_new(self.arena.a, nr_slots, most_slots)
        if self.st == NULL:
            raise MemoryError(f"no memory for the tables of a device of {disksize} bytes")
        if reserve and store_stay_ready(self.st) != 0:
            raise MemoryError(f"the system refuses the slot table of a device of {disksize} bytes")
        for prio in range(NR_PRIO):
            if self.codecs[prio] is not None:
                codec = self.codecs[prio]
                if prio and codec.codec.algo == CODEC_NONE:
                    raise ValueError("none makes nothing smaller, and is no secondary algorithm")
                self.st.codec[prio] = codec.codec
        self.st.pool.wipe = wipe
        self.algo, self.level = algo, self.codecs[0].level
        if backing is not None:
            if backing.b == NULL or backing.taken:
                raise ValueError("expected an open backing store that no other store has")
            backing.taken = True
            self.backing = backing
            self.st.backing = backing.b
        if adopted is not None:
            self.recovered = store_recover(self.st, (reserve + (1 << 21) - 1) >> 21)
        else:
            self.arena.set_note(0, codecs_packed(self.codecs, generations))
            self.set_mem_limit(mem_limit)
        self.balloon = Balloon(self.arena)
        if reserve:
            self.reserve = Reserve(self.arena, reserve)
        if headroom is not None:
            self.headroom = headroom
            self.st.pool.headroom = &headroom.h
            headroom.look(0)
        record_finish(self.st)

    @staticmethod
    def adopt(place, *, backing=None, reserve=0, headroom=None):
        """The store that a killed process has left, recovered; `recovered` says what that took. place: the
        memory file, of which a duplicate is kept, or what Arena.adopt() made of it beforehand. backing: its
        backing store, by Backing(kept=...), if it had one. Raises ValueError, and changes nothing, for a file
        without a store of this version or a backing store that is missing; else as the constructor."""
        arena = place if isinstance(place, Arena) else Arena.adopt(place)
        if not arena.current:
            raise ValueError("the memory file was made anew since it was adopted: adopt it again")
        return Store(**kept_arguments(arena, backing), backing=backing, reserve=reserve, headroom=headroom,
                     adopted=arena)

    def __dealloc__(self):
        # Whoever holds the memory file may adopt the store.
        self.end(self.arena is not None and self.arena.a != NULL and self.arena.a.lent)

    def close(self):
        """Gives all memory back: a memory file that was given to the store is empty afterwards. No other
        call, and no lane, may be at work on the store."""
        self.end(False)

    def leave(self):
        """As close(), but the memory file and the backing store keep what is stored, to be adopted."""
        self.end(True)

    cdef int end(self, bint left) except -1:
        cdef store_t* st = self.st
        cdef int i
        # Closed before the GIL is released, so that a second close() or a late call finds no store.
        self.st = NULL
        for i in range(self.nr_idle_ctx):
            store_ctx_free(self.idle_ctx[i])
        self.nr_idle_ctx = 0
        if st != NULL:
            for fd in {st.pool.wake_fd, st.change_fd} - {-1}:
                os.close(fd)
        if self.reserve is not None:
            self.reserve.close()
        with nogil:
            store_delete(st)
        for part in (self.arena, self.backing):
            if part is not None:
                part.leave() if left else part.close()

    @property
    def note(self):
        """At most 5 MiB of bytes that the device keeps with the store, to find them again after adopt(); b""
        before they are set. MemoryError, and the old ones stay, when the system refuses the memory."""
        self.check_range(0, 0)
        return self.arena.note(1)

    @note.setter
    def note(self, bytes content not None):
        self.check_range(0, 0)
        self.arena.set_note(1, content)

    cdef store_ctx_t* take_ctx(self) except NULL:
        cdef store_ctx_t* ctx
        if self.st == NULL:
            raise ValueError("the store is closed")
        if self.nr_idle_ctx:
            self.nr_idle_ctx -= 1
            return self.idle_ctx[self.nr_idle_ctx]
        ctx = store_ctx_new(self.st)
        if ctx == NULL:
            raise MemoryError("no memory for a codec's workspace")
        ctx.may_wait = True
        return ctx

    cdef int put_ctx(self, store_ctx_t* ctx) except -1:
        if self.nr_idle_ctx < 8:
            self.idle_ctx[self.nr_idle_ctx] = ctx
            self.nr_idle_ctx += 1
        else:
            store_ctx_free(ctx)
        return 0

    cdef int begin_post(self) except -1:
        self.check_range(0, 0)
        if self.post_processing:
            raise OSError(EBUSY, "another recompression, making of units, sharing or write-back is under way")
        self.post_processing = True
        return 0

    cdef int end_post(self) except -1:
        self.post_processing = False
        return 0

    cdef int check_range(self, off, n) except -1:
        if self.st == NULL:
            raise ValueError("the store is closed")
        if off < 0 or n < 0 or off + n > store_disksize(self.st):
            raise OSError(EINVAL, f"a range inside {store_disksize(self.st)} bytes expected, "
                                  f"got {n} bytes at {off}")
        return 0

    @property
    def disksize(self):
        """Bytes."""
        return store_disksize(self.st) if self.st != NULL else 0

    def read(self, off, n):
        """n bytes at off. Raises OSError: EINVAL outside the device, EIO for a damaged page."""
        cdef uint64_t start, count
        cdef uint8_t* p
        cdef store_ctx_t* ctx
        cdef int r
        self.check_range(off, n)
        start, count = off, n
        out = PyBytes_FromStringAndSize(NULL, n)
        p = <uint8_t*><char*>out
        ctx = self.take_ctx()
        with nogil:
            r = store_read(self.st, ctx, start, p, count)
        self.put_ctx(ctx)
        if r != 0:
            raise OSError(-r, f"{n} bytes at {off} can't be read: {os.strerror(-r)}")
        return out

    def peek(self, page):
        """The 4096 bytes of a page, by its number, without using it: idle mark, access time and a
        post-processing under way stay. None for a page that is written back or beyond the end. Raises
        OSError(EIO) for a damaged one."""
        cdef uint64_t slot, v = 0
        cdef store_ctx_t* ctx
        cdef int r = 0
        cdef uint8_t* p
        self.check_range(0, 0)
        if not 0 <= page < slot_count(self.st):
            return None
        slot = page
        out = PyBytes_FromStringAndSize(NULL, PAGE)
        p = <uint8_t*><char*>out
        ctx = self.take_ctx()
        with nogil:
            r = page_peek(self.st, ctx, slot, p, &v)
        self.put_ctx(ctx)
        if r != 0:
            raise OSError(-r, f"page {page} can't be read: {os.strerror(-r)}")
        return None if slot_type(v) == WRITTEN_BACK else out

    def write(self, off, data):
        """Writes a buffer at off and returns its length in bytes.

        Raises OSError: EINVAL outside the device, ENOSPC when the pool is full. Then a first part
        may be on the device (the exception's `written`, bytes); the rest holds its old data.
        """
        cdef Py_buffer view
        cdef uint64_t start, done = 0
        cdef store_ctx_t* ctx
        cdef int r
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            self.check_range(off, view.len)
            start = off
            ctx = self.take_ctx()
            with nogil:
                r = store_write(self.st, ctx, start, <const uint8_t*>view.buf, <uint64_t>view.len, &done)
            self.put_ctx(ctx)
            if r != 0:
                error = OSError(-r, f"{view.len} bytes at {off} can't be written: {os.strerror(-r)}")
                error.written = done
                raise error
            return view.len
        finally:
            PyBuffer_Release(&view)

    def zero(self, off, n):
        """Discards n bytes at off: whole pages are freed, a partial head and tail are zeroed.
        Raises OSError as write() does."""
        cdef uint64_t start, count, done = 0
        cdef store_ctx_t* ctx
        cdef int r
        self.check_range(off, n)
        start, count = off, n
        ctx = self.take_ctx()
        with nogil:
            r = store_zero(self.st, ctx, start, count, &done)
        self.put_ctx(ctx)
        if r != 0:
            raise OSError(-r, f"{n} bytes at {off} can't be zeroed: {os.strerror(-r)}")

    def seek(self, off, bint hole):
        """Offset of the next data or hole at or after off; the device's end is a hole.
        Raises OSError(ENXIO) where there is none, as lseek(2) does."""
        cdef uint64_t start
        cdef int64_t r
        self.check_range(0, 0)
        # A negative offset lies past every end, as for lseek(2).
        start = off if 0 <= off < _MAX_DISKSIZE else _MAX_DISKSIZE
        with nogil:
            r = store_seek(self.st, start, hole)
        if r < 0:
            raise OSError(<int>-r, f"no {'hole' if hole else 'data'} at or after {off}")
        return r

    def set_mem_limit(self, nbytes):
        """Bytes of pool memory, rounded up to 4096; 0 = no limit. What is stored stays."""
        self.check_range(0, 0)
        if not 0 <= nbytes < 1 << 64:
            raise ValueError(f"a limit of 0 to 2^64 - 1 bytes expected, got {nbytes}")
        store64(&self.st.arena.sb.limit_pages, (nbytes + PAGE - 1) >> PAGE_SHIFT)

    def reset_mem_used_max(self):
        """The peak starts anew from what is in use."""
        self.check_range(0, 0)
        store64(&self.st.arena.sb.max_pages, peek64(&self.st.pool.pages))

    @property
    def access_times(self):
        """Whether the time of the last access of each page is kept; settable. It takes 4 bytes for
        each page of the device that was used since. MemoryError when address space is short."""
        self.check_range(0, 0)
        return bool(load32(&self.st.atime_on))

    @access_times.setter
    def access_times(self, bint on):
        self.check_range(0, 0)
        keep_access_times(self.st, on)

    def mark_idle(self, age=None, first=0, uint64_t ns=0):
        """Marks idle what was not accessed for more than age seconds (None: everything), and takes the
        mark from the rest; same-filled and written-back pages are never idle. Any access clears it.

        Goes on for about ns nanoseconds (0: to the end), from the chunk of 512 pages with the number
        first. Returns the chunk where the next call goes on, or None at the end. ValueError for an age
        while access times are not kept.
        """
        cdef uint64_t chunk
        cdef uint32_t seconds = 0
        self.check_range(0, 0)
        if age is not None:
            if not self.access_times:
                raise ValueError("access times are not kept: only all pages can be marked idle")
            seconds = min(max(age, 0), (1 << 32) - 1)
        chunk = first
        with nogil:
            chunk = mark_idle(self.st, chunk, seconds, ns)
        return chunk if chunk < chunk_count(self.st) else None

    def compact(self):
        """Object compaction, to the end: pool pages freed."""
        cdef uint64_t freed
        self.check_range(0, 0)
        with nogil:
            freed = zs_compact(self.st.pool)
            zs_flush_deferred(self.st.pool)
        return freed

    def compact_slice(self, uint64_t ns):
        """Object compaction for about ns nanoseconds, going on where the last slice ended. False when
        it has been through all classes; the next slice begins anew."""
        self.check_range(0, 0)
        with nogil:
            self.compact_class = zs_compact_slice(self.st.pool, self.compact_class, now_ns() + ns)
            zs_flush_deferred(self.st.pool)
        if self.compact_class < self.st.pool.nr_classes:
            return True
        self.compact_class = 0
        return False

    def winnable(self):
        """What compaction could give back to the OS: (pageblocks, of how many in use)."""
        self.check_range(0, 0)
        return store_winnable(self.st)

    @property
    def frees(self):
        """Objects freed since creation."""
        return peek64(&self.st.pool.frees) if self.st != NULL else 0

    def wake_after(self, frees, fd):
        """Adds 1 to an eventfd, once, when so many more objects have been freed. The first call
        decides which; the store keeps a duplicate until close()."""
        self.check_range(0, 0)
        if self.st.pool.wake_fd < 0:
            self.st.pool.wake_fd = os.dup(fd)
        zs_wake_after(self.st.pool, frees)

    def set_overdraft(self, uint32_t pages, uint32_t reserve):
        """Pool pages beyond the limit that writes may take; the last of them are a reserve. Past its first
        quarter writes are slow. Its last is not for pages that do not compress: a file system's own do."""
        self.check_range(0, 0)
        store_set_overdraft(self.st, pages, reserve)

    def wake_after_change(self, nbytes, fd):
        """As wake_after, with another eventfd, for bytes written or discarded; 0 ends that."""
        self.check_range(0, 0)
        if self.st.change_fd < 0:
            self.st.change_fd = os.dup(fd)
        store64(&self.st.change_at, peek64(&self.st.changed) + nbytes if nbytes else 0)
        store32(&self.st.watched, 1 if nbytes else 0)

    def room(self):
        """Pages that the balloon may take before the pool's limit is reached; None without a limit."""
        self.check_range(0, 0)
        limit = peek64(&self.st.arena.sb.limit_pages)
        taken = peek64(&self.st.pool.pages) + peek64(&self.st.arena.reserved)
        return max(0, limit - taken) if limit else None

    def stats(self):
        self.check_range(0, 0)
        return store_stats(self.st)

    def classes(self):
        """ClassStats of every class that was not merged into a larger one, smallest first."""
        self.check_range(0, 0)
        return pool_classes(self.st.pool)

    def buddyinfo(self):
        """Free blocks of 2^k frames, k = 0 to 9; the last counts pageblocks given back to the OS."""
        self.check_range(0, 0)
        return arena_buddyinfo(self.st.arena)

    def check(self, int level=1):
        """Raises CheckError if a sum of allocator/layout.h does not hold. At rest only.

        Level 1: counters and lists; 2: every frame, object and slot; 3: every page decompresses.
        """
        cdef store_ctx_t* ctx = self.take_ctx()
        try:
            check_store(self.st, ctx, self.backing, level)
        finally:
            self.put_ctx(ctx)

    def inject_failure(self, after):
        """The after-th frame allocation from now fails as if memory were short (0 = none does)."""
        self.check_range(0, 0)
        self.arena.inject_failure(after)
