# SPDX-License-Identifier: Apache-2.0
# Store.saving_run, which the GIL guards, keeps a second save away. Other locks: save_pages.pxd.
"""A save of a store, for Python; save_pages.pxd says how it works."""
cimport cython
from libc.errno cimport EBUSY, ENOSPC
from libc.stdint cimport uint64_t

from allocator.prim cimport *
from zramfs.store.save_pages cimport *
from zramfs.store.slots cimport *
from zramfs.store.store cimport Store

cdef enum:
    LOOK_SLOTS = 2048           # scanned between two looks at the clock, about 4 us


# The collector must not take the store away before __dealloc__ has used it.
@cython.no_gc_clear
@cython.final
cdef class SaveRun:
    """One save of a store, in this order: start(), scan() until it answers False, chunks(), then fill() and
    take() until `done`, and in any case finish(), before the store is closed. Each gives the GIL up and may
    be called in another thread than the last one. It takes 2 bits for each page of the device's size and
    17 MiB.

    Raises ValueError for a store with a reserve (swap), OSError(EBUSY) beside another save, MemoryError.
    """
    cdef saving_t* run
    cdef Store store            # None once finished
    cdef bint complete

    def __cinit__(self, Store store not None):
        store.check_range(0, 0)
        if store.st.stays_ready:
            raise ValueError("a device for swap is not saved: its pages belong to programs of this boot")
        if store.saving_run:
            raise OSError(EBUSY, "another save is under way on this device")
        with nogil:
            self.run = saving_new(store.st)
        if self.run == NULL:
            raise MemoryError("no memory for a save: 2 bits a page of the device and 17 MiB are needed")
        store.saving_run = True
        self.store = store
        self.run.ctx = store.take_ctx()

    def __dealloc__(self):
        self.finish()

    cdef int expect_open(self) except -1:
        if self.store is None:
            raise ValueError("this save is finished")
        self.store.check_range(0, 0)
        if load32(&self.run.failed):
            raise OSError(
                ENOSPC, "pages were overwritten faster than they could be saved, and there was no more room "
                "to keep what they held: save to a faster disk, or while less is written")
        return 0

    def start(self):
        """The instant."""
        self.expect_open()
        saving_start(self.run)

    def scan(self, uint64_t ns):
        """Finds the pages, for about ns nanoseconds. True if there is more to look at."""
        cdef saving_t* run = self.run
        cdef uint64_t until = now_ns() + ns, chunks, chunk
        self.expect_open()
        chunks = chunks_of(run.nr_slots)
        with nogil:
            chunk = run.scanned
            while chunk < chunks:
                chunk_scan(run, chunk)
                chunk += 1
                if chunk % (LOOK_SLOTS // CHUNK_SLOTS) == 0 and now_ns() >= until:
                    break
            if chunk == chunks:
                run.pages = pages_count(run)
        return chunk < chunks

    def chunks(self):
        """Which pages there are, for the image: for each chunk of 512 pages with any, its number and a bit
        for each page."""
        cdef saving_t* run = self.run
        cdef uint64_t chunk
        self.expect_open()
        found = []
        for chunk in range(chunks_of(run.nr_slots)):
            if chunk_is_used(run, chunk):
                found.append((<char*>&chunk)[:8] + (<char*>&run.used[chunk * CHUNK_WORDS])[:8 * CHUNK_WORDS])
        return b"".join(found)

    def fill(self, uint64_t ns):
        """Takes pages for about ns nanoseconds. True: take() has a part, which is the last one if `done`."""
        cdef bint full
        self.expect_open()
        with nogil:
            full = fill_slice(self.run, now_ns() + ns)
        self.expect_open()
        self.complete = full and part_has_room(self.run)
        return full

    def take(self):
        """The part: its directory of 8 bytes a page, and their data."""
        cdef saving_t* run = self.run
        self.expect_open()
        part = (<char*>run.directory)[:run.count * 8], (<char*>run.data)[:run.bytes]
        run.count = 0
        run.bytes = 0
        return part

    def finish(self):
        """Ends it, whatever has happened."""
        store, self.store = self.store, None
        if store is None:
            return
        with nogil:
            saving_end(self.run)
        (<Store>store).put_ctx(self.run.ctx)
        (<Store>store).saving_run = False
        with nogil:
            saving_free(self.run)
        self.run = NULL

    @property
    def done(self):
        return bool(self.complete)

    @property
    def pages(self):
        """There were at the instant; known after scan()."""
        return self.run.pages if self.run != NULL else 0

    @property
    def taken(self):
        return self.run.taken if self.run != NULL else 0

    @property
    def waiting(self):
        """Bytes that writers have handed over, and that are not taken yet."""
        cdef saving_t* run = self.run
        if run == NULL:
            return 0
        return peek64(&run.side[0].fill) + peek64(&run.side[1].fill) - run.drained

    @property
    def kept(self):
        """Of those taken: handed over by writers."""
        return self.run.kept if self.run != NULL else 0

    @property
    def lost(self):
        """Of those taken: could not be read."""
        return self.run.lost if self.run != NULL else 0

    @property
    def disksize(self):
        """Bytes, at the instant."""
        return self.run.nr_slots << PAGE_SHIFT if self.run != NULL else 0
