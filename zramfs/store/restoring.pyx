# SPDX-License-Identifier: Apache-2.0
# No locks of its own: the store is new, and no other thread knows it yet.
"""A new store filled with the pages of an image, which may be damaged or made by an enemy.

An object goes in as it is where the store has an algorithm that reads it, else it is compressed anew. Each
one is decompressed before it counts as restored. What the image should have and does not, or not so that it
can be read, is lost (slot_lost()): reading that page is EIO until it is written or discarded.
"""
cimport cython
from libc.errno cimport EINVAL, EIO, ENOSPC
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from allocator.prim cimport *
from zramfs.codecs.codec cimport (
    Codec, codec_ctx_free, codec_ctx_new, codec_ctx_t, codec_decompress,
)
from zramfs.store.image_entry cimport *
from zramfs.store.page cimport fill_words
from zramfs.store.slots cimport *
from zramfs.store.store cimport Store

import os

cdef enum:
    CHUNK_WORDS = CHUNK_SLOTS // 64
    MAP_CHUNK = 8 + 8 * CHUNK_WORDS
    NO_PRIO = NR_PRIO           # none of the store's algorithms


cdef struct restoring_t:
    store_t* st
    store_ctx_t* ctx
    uint64_t nr_slots
    uint64_t* wanted            # a bit for each slot: the image has the page
    uint64_t* got               # and it is in the store
    bint known[NR_PRIO]         # the image says what the priority's algorithm is
    uint32_t prio[NR_PRIO]      # of the same algorithm in the store
    codec_ctx_t* codec[NR_PRIO]     # of the image's algorithm
    uint64_t pages
    uint64_t restored


cdef inline bint bit(const uint64_t* bits, uint64_t slot) noexcept nogil:
    return bits[slot >> 6] >> (slot & 63) & 1


# ---- what an image says ---------------------------------------------------------------------------

cdef bint entry_is_sound(restoring_t* run, uint64_t entry) noexcept nogil:
    cdef uint64_t slot = entry_slot(entry)
    cdef uint32_t size = entry_size(entry), kind = entry_kind(entry), prio = entry_prio(entry)
    if slot >= run.nr_slots or not bit(run.wanted, slot) or bit(run.got, slot):
        return False
    if kind == IMAGE_OBJECT:
        return 0 < size < PAGE and run.known[prio]
    if prio != 0:
        return False
    return (kind == IMAGE_SAME and size == 8 or kind == IMAGE_RAW and size == PAGE
            or kind == IMAGE_LOST and size == 0)


cdef bint part_is_sound(restoring_t* run, const uint64_t* entries, uint64_t count,
                        uint64_t nbytes) noexcept nogil:
    cdef uint64_t i, total = 0
    for i in range(count):
        if not entry_is_sound(run, entries[i]):
            return False
        total += entry_size(entries[i])
    return total == nbytes


# ---- one page ---------------------------------------------------------------------------------------

cdef int object_put(restoring_t* run, uint64_t slot, const uint8_t* data, uint32_t size,
                    uint32_t prio) noexcept nogil:
    """A compressed object, in an open chunk. 0; -EIO: it is damaged; -ENOSPC."""
    cdef store_t* st = run.st
    cdef store_ctx_t* ctx = run.ctx
    cdef uint32_t own = run.prio[prio]
    cdef prepared_t page
    cdef int r
    r = codec_decompress(run.codec[prio], data, <int>size, ctx.page, PAGE)
    if r != PAGE:
        return -EIO
    if own == NO_PRIO or size > st.max_object:
        return page_write(st, ctx, slot, ctx.page)
    page.type, page.size, page.data, page.word = OBJ, size, data, 0
    page.bits = <uint64_t>own << PRIO_SHIFT
    page.over = 0
    return commit_locked(st, slot, slot_lock(st, slot), &page)


cdef int entry_put(restoring_t* run, uint64_t entry, const uint8_t* data) noexcept nogil:
    """0, also for a page that the image has lost; -EIO, -ENOSPC."""
    cdef uint64_t slot = entry_slot(entry), word
    cdef uint32_t kind = entry_kind(entry)
    cdef int r
    if kind == IMAGE_LOST:
        return -EIO
    r = chunk_open(run.st, slot >> CHUNK_SHIFT)
    if r != 0:
        return r
    if kind == IMAGE_OBJECT:
        r = object_put(run, slot, data, entry_size(entry), entry_prio(entry))
    elif kind == IMAGE_SAME:
        memcpy(&word, data, sizeof(word))
        fill_words(run.ctx.page, word)
        r = page_write(run.st, run.ctx, slot, run.ctx.page)
    else:
        r = page_write(run.st, run.ctx, slot, data)
    chunk_unpin(run.st, slot >> CHUNK_SHIFT)
    return r


cdef int part_put(restoring_t* run, const uint64_t* entries, uint64_t count, const uint8_t* data,
                  uint64_t nbytes) noexcept nogil:
    """0; -EINVAL: nothing is put, because the part is not what an image has; -ENOSPC."""
    cdef uint64_t i, slot
    cdef int r
    if not part_is_sound(run, entries, count, nbytes):
        return -EINVAL
    for i in range(count):
        slot = entry_slot(entries[i])
        # A part may name a slot twice.
        r = entry_put(run, entries[i], data) if not bit(run.got, slot) else -EIO
        if r == 0:
            run.got[slot >> 6] |= <uint64_t>1 << (slot & 63)
            run.restored += 1
        elif r != -EIO:
            return r
        data += entry_size(entries[i])
    return 0


cdef int slot_lose(store_t* st, uint64_t slot) noexcept nogil:
    cdef int r = chunk_open(st, slot >> CHUNK_SHIFT)
    if r != 0:
        return r
    slot_lock(st, slot)
    add32(&st.chunks[slot >> CHUNK_SHIFT], 1)
    add64(&st.pages_stored, 1)
    slot_unlock(st, slot, OBJ << TYPE_SHIFT | LOC_NONE << LOC_SHIFT)
    chunk_unpin(st, slot >> CHUNK_SHIFT)
    return 0


# ---- Python -------------------------------------------------------------------------------------------

# The collector must not take the store away before __dealloc__ has used it.
@cython.no_gc_clear
@cython.final
cdef class RestoreRun:
    """store: a new one, of at least the size of the image, that nobody uses. codecs: the image's, by
    priority, None where it has none. chunks: which pages it has, as SaveRun.chunks() says it.

    Raises ValueError for chunks that no image has, or beyond the end; MemoryError.
    """
    cdef restoring_t run
    cdef Store store            # None once finished
    cdef tuple codecs

    def __cinit__(self, Store store not None, codecs, bytes chunks not None):
        cdef restoring_t* run = &self.run
        cdef uint64_t nbytes
        cdef Codec codec
        store.check_range(0, 0)
        self.store = store
        self.codecs = tuple(codecs)
        run.st = store.st
        run.nr_slots = slot_count(store.st)
        nbytes = chunks_of(run.nr_slots) * CHUNK_WORDS * 8
        run.wanted = <uint64_t*>map_sparse(nbytes, -1)
        run.got = <uint64_t*>map_sparse(nbytes, -1)
        if run.wanted == NULL or run.got == NULL:
            raise MemoryError("no memory to restore an image: 2 bits for each page of the device are needed")
        run.ctx = store.take_ctx()
        for prio, each in enumerate(self.codecs):
            run.prio[prio] = NO_PRIO
            if each is not None:
                codec = each
                run.known[prio] = True
                run.codec[prio] = codec_ctx_new(&codec.codec, False)
                if run.codec[prio] == NULL:
                    raise MemoryError(f"no memory for a context of {codec!r}")
                run.prio[prio] = own_priority(store, codec)
        self.take_chunks(chunks)

    def __dealloc__(self):
        self.finish()

    cdef int take_chunks(self, bytes chunks) except -1:
        cdef restoring_t* run = &self.run
        cdef const char* p = chunks
        cdef uint64_t i, k, chunk, before = 0, total = <uint64_t>len(chunks)
        if total % MAP_CHUNK:
            raise ValueError("the list of pages is not made of whole chunks")
        for i in range(0, total, MAP_CHUNK):
            memcpy(&chunk, p + i, 8)
            if chunk >= chunks_of(run.nr_slots) or i and chunk <= before:
                raise ValueError(f"the list of pages has chunk {chunk} where none can be")
            before = chunk
            memcpy(&run.wanted[chunk * CHUNK_WORDS], p + i + 8, 8 * CHUNK_WORDS)
            for k in range(chunk << CHUNK_SHIFT, (chunk + 1) << CHUNK_SHIFT):
                if not bit(run.wanted, k):
                    continue
                if k >= run.nr_slots:
                    raise ValueError(f"the list of pages has page {k}, beyond the end")
                run.pages += 1
        return 0

    cdef int expect_open(self) except -1:
        if self.store is None:
            raise ValueError("this restoration is finished")
        self.store.check_range(0, 0)
        return 0

    def put(self, bytes directory not None, bytes data not None):
        """The pages of a part. Raises ValueError, and nothing is put, for a part that no image has;
        OSError(ENOSPC) when the store has no room."""
        cdef const char* entries = directory
        cdef const char* p = data
        cdef uint64_t count = <uint64_t>len(directory) // 8, nbytes = <uint64_t>len(data)
        cdef int r
        self.expect_open()
        if len(directory) % 8:
            raise ValueError("a directory of whole entries expected")
        with nogil:
            r = part_put(&self.run, <const uint64_t*>entries, count, <const uint8_t*>p, nbytes)
        if r == -EINVAL:
            raise ValueError("the part has pages that the image does not have, or with impossible lengths")
        if r != 0:
            raise OSError(-r, f"the pages do not fit into the device: {os.strerror(-r)}")

    def lose_rest(self):
        """Marks what the image should have and was not put as lost. Returns it as (first, last) pages.
        OSError(ENOSPC)."""
        cdef restoring_t* run = &self.run
        cdef uint64_t slot = 0, word, first = 0
        cdef bint inside = False
        cdef int r = 0
        self.expect_open()
        found = []
        while slot < run.nr_slots:
            word = run.wanted[slot >> 6] & ~run.got[slot >> 6]
            if word == 0 and not inside:
                slot = (slot | 63) + 1
                continue
            if word >> (slot & 63) & 1:
                if not inside:
                    first = slot
                inside = True
                r = slot_lose(run.st, slot)
                if r != 0:
                    raise OSError(ENOSPC, "the system refuses the memory of the slot table")
            elif inside:
                found.append((first, slot - 1))
                inside = False
            slot += 1
        if inside:
            found.append((first, slot - 1))
        return found

    def finish(self):
        """To be called whatever has happened."""
        cdef restoring_t* run = &self.run
        cdef uint64_t nbytes = chunks_of(run.nr_slots) * CHUNK_WORDS * 8
        cdef int prio
        store, self.store = self.store, None
        if store is None:
            return
        for prio in range(NR_PRIO):
            if run.codec[prio] != NULL:
                codec_ctx_free(run.codec[prio])
        if run.wanted != NULL:
            munmap(run.wanted, nbytes)
        if run.got != NULL:
            munmap(run.got, nbytes)
        if run.ctx != NULL:
            (<Store>store).put_ctx(run.ctx)

    @property
    def pages(self):
        """Of the image."""
        return self.run.pages

    @property
    def restored(self):
        return self.run.restored


cdef uint32_t own_priority(Store store, Codec codec) except? 255:
    """The priority of the store's algorithm that reads what the codec made; NO_PRIO if it has none."""
    # lz4hc makes what lz4 reads.
    families = {"lz4hc": "lz4"}
    for prio, own in enumerate(store.codecs):
        if (own is not None and families.get(own.algo, own.algo) == families.get(codec.algo, codec.algo)
                and own.dictionary == codec.dictionary and codec.algo != "none"):
            return prio
    return NO_PRIO
