# SPDX-License-Identifier: Apache-2.0
# Lock order: see worker.pxd.
"""Large requests, cut into pieces that several threads of a lane work on."""
from libc.stdint cimport uint64_t

from allocator.prim cimport add32, cas64, load32, load64, peek64, relax, store32, store64
from zramfs.store.ranges cimport store_read, store_write
from zramfs.store.slots cimport store_ctx_t
from zramfs.lane.worker cimport SHARED_BYTES, add_count, job_t, worker_lock, worker_t, worker_unlock

cdef enum:
    # A piece of a shared request: 8 pages, 5 to 15 us to read and 15 to 40 us to write.
    PIECE_SHIFT = 15
    # Where pages lie in units, one thread reads all of a unit: 50 to 80 us. With 32 KiB two threads unpacked
    # each unit 1.3 to 1.7 times in all.
    UNIT_PIECE_SHIFT = 16
    BYTES_A_HELPER = 262144     # one helper more for each of these


cdef inline bint take_piece(job_t* job, uint64_t* piece) noexcept nogil:
    cdef uint64_t word = load64(&job.word)
    while (word & 0xffff) < (word >> 16 & 0xffff):
        if cas64(&job.word, word, word + 1):
            piece[0] = word & 0xffff
            return True
        word = load64(&job.word)
    return False


cdef uint64_t run_pieces(job_t* job, store_ctx_t* ctx) noexcept nogil:
    """How many pieces it took."""
    cdef uint64_t piece = 0, done, taken = 0, off, end, base
    cdef int r
    while take_piece(job, &piece):
        base = job.off >> job.shift
        # Nothing that follows an error is done: pieces taken after it are only counted.
        if load64(&job.error) == 0:
            off = max(job.off, (base + piece) << job.shift)
            end = min(job.end, (base + piece + 1) << job.shift)
            if job.writes:
                done = 0
                r = store_write(job.st, ctx, off, job.data + (off - job.off), end - off, &done)
            else:
                r = store_read(job.st, ctx, off, job.data + (off - job.off), end - off)
            if r < 0:
                store64(&job.error, <uint64_t> -r)
        taken += 1
        # A release, unlike add64: the owner then reads what the piece has brought.
        add32(&job.done, 1)
    return taken


cdef int64_t transfer_range(worker_t* w, uint64_t off, uint64_t n, bint writes) noexcept nogil:
    """Between the device and w.data: 0 or a negative errno."""
    cdef job_t* job = &w.job
    cdef uint64_t pieces
    cdef unsigned int round = 0
    # Helpers may not wait for the backing store, so what was put off is not shared again. What they had
    # written of it is written a second time.
    if n < SHARED_BYTES or w.may_wait:
        if writes:
            return store_write(w.st, w.ctx, off, w.data, n, &w.done)
        return store_read(w.st, w.ctx, off, w.data, n)
    # Which pages are in units is not known before they are looked at.
    job.shift = UNIT_PIECE_SHIFT if not writes and peek64(&w.st.units.pages) != 0 else PIECE_SHIFT
    pieces = ((off + n - 1) >> job.shift) - (off >> job.shift) + 1
    job.st = w.st
    job.data = w.data
    job.off = off
    job.end = off + n
    job.writes = writes
    store32(&job.done, 0)
    store64(&job.error, 0)
    store64(&job.word, ((load64(&job.word) >> 32) + 1) << 32 | pieces << 16)
    w.shared.wake_workers(w.shared.lane, (n + BYTES_A_HELPER - 1) // BYTES_A_HELPER)
    run_pieces(job, w.ctx)
    # Another thread is in the middle of a piece, which waits for nothing that we hold.
    while load32(&job.done) != pieces:
        relax(round)
        round += 1
    return -<int64_t> load64(&job.error)


cdef bint help_with_pieces(worker_t* w, worker_t* owner) noexcept nogil:
    cdef job_t* job = &owner.job
    cdef uint64_t word = load64(&job.word), taken = 0
    if (word & 0xffff) >= (word >> 16 & 0xffff):
        return False
    worker_lock(w)
    # The store is everybody's or nobody's: it is replaced only while no request is served.
    if w.ctx != NULL:
        w.ctx.may_wait = False
        taken = run_pieces(job, w.ctx)
        add_count(&w.counts.helped, taken)
    worker_unlock(w)
    return taken != 0
