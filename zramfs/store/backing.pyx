# SPDX-License-Identifier: Apache-2.0
"""The backing store; see backing.pxd."""
cimport cython
from libc.errno cimport EINTR, EIO, ENOSPC, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from allocator.prim cimport *

import errno as errors
import os
import stat

from allocator.check import CheckError
from zramfs.errors import ZramfsError
from zramfs.store.open_backing import open_backing as _open_backing
from zramfs.model.stats import BackingStats

cdef extern from "<unistd.h>" nogil:
    ssize_t pwrite(int fd, const void* buf, size_t n, int64_t offset)

cdef enum:
    LIVE = 0xffff
    PIN = 1 << 16
    GROUP_BLOCKS = 1 << GROUP_SHIFT
    TRIM_RUN = 512              # blocks a hole: 2 MiB
    ZERO_BLOCKS = 64            # blocks of zeros that are written at once

# A slot's field of 40 bits: 16 TiB.
MAX_BLOCKS = 1 << 32


# ---- sums -------------------------------------------------------------------------------------

cdef inline uint64_t sum_mix(uint64_t h, uint64_t word) noexcept nogil:
    """A bijection of each of the two."""
    h = (h ^ word) * <uint64_t>0x9e3779b97f4a7c15
    return h ^ h >> 29


cdef inline uint64_t word_at(const uint8_t* p) noexcept nogil:
    cdef uint64_t word
    memcpy(&word, p, sizeof(word))
    return word


cdef uint64_t back_sum(const backing_t* b, uint64_t slot, const uint8_t* data, uint32_t size) noexcept nogil:
    """A change within 8 bytes is always seen by all 64 bits; the last two steps spread it over each of
    them, since a slot keeps only some. Four rows, because each step waits for the last one of its row:
    1.1 us for a page instead of 3.7."""
    cdef uint64_t h = b.record.key ^ (slot << 16 | size), h1 = h + 1, h2 = h + 2, h3 = h + 3, word = 0
    cdef const uint8_t* end = data + size
    while end - data >= 32:
        h = sum_mix(h, word_at(data))
        h1 = sum_mix(h1, word_at(data + 8))
        h2 = sum_mix(h2, word_at(data + 16))
        h3 = sum_mix(h3, word_at(data + 24))
        data += 32
    while end - data >= 8:
        h = sum_mix(h, word_at(data))
        data += 8
    memcpy(&word, data, end - data)
    h = sum_mix(sum_mix(sum_mix(sum_mix(h, word), h1), h2), h3)
    h = (h ^ h >> 32) * <uint64_t>0xd6e8feb86659fd93
    h = (h ^ h >> 32) * <uint64_t>0xd6e8feb86659fd93
    return h ^ h >> 32


cdef uint64_t back_place(uint64_t offset, uint32_t size, uint64_t total) noexcept nogil:
    if size == BLOCK:
        return (BACK_HUGE | (offset >> BLOCK_SHIFT) << 32 | (total & 0xff) << BACK_LOC_SHIFT
                | (total >> 8 & BACK_SIZE_MASK) << BACK_SIZE_SHIFT)
    return (offset >> UNIT_SHIFT) << BACK_LOC_SHIFT | <uint64_t>size << BACK_SIZE_SHIFT


cdef inline uint64_t place_bits(uint64_t v) noexcept nogil:
    return v >> BACK_SIZE_SHIFT << BACK_SIZE_SHIFT


# ---- blocks -----------------------------------------------------------------------------------

cdef bint backing_try_take(backing_t* b, uint64_t block) noexcept nogil:
    cdef uint32_t word
    if block >= b.nr_blocks:
        return False
    word = load32(&b.blocks[block])
    max64(&b.record.high, block + 1)
    if word & COUNTS or not cas32(&b.blocks[block], word, STALE | PIN):
        return False
    if word & STALE:
        sub32(&b.groups[block >> GROUP_SHIFT], GROUP_STALE)
        sub64(&b.stale, 1)
        add64(&b.reuses, 1)
    add32(&b.groups[block >> GROUP_SHIFT], 1)
    add64(&b.used, 1)
    return True


cdef void block_put(backing_t* b, uint64_t block, uint32_t amount) noexcept nogil:
    """Takes a live count or a pin off; the last to do so frees the block."""
    if sub32(&b.blocks[block], amount) & COUNTS:
        return
    # Somebody else may have taken it by now: the sums are right again when both have counted.
    add32(&b.groups[block >> GROUP_SHIFT], GROUP_STALE - 1)
    add64(&b.stale, 1)
    sub64(&b.used, 1)


cdef int64_t backing_take(backing_t* b, uint64_t wanted) noexcept nogil:
    cdef uint64_t _turn, group, block, end
    if backing_try_take(b, wanted):
        return <int64_t>wanted
    # From where the last search ended, once around: one group more than there are, for the part of
    # the first one that lies before the cursor.
    block = b.cursor if b.cursor < b.nr_blocks else 0
    for _turn in range(b.nr_groups + 1):
        group = block >> GROUP_SHIFT
        end = min((group + 1) << GROUP_SHIFT, b.nr_blocks)
        if load32(&b.groups[group]) & LIVE < GROUP_BLOCKS:
            while block < end:
                if backing_try_take(b, block):
                    b.cursor = block + 1
                    return <int64_t>block
                block += 1
        block = end if end < b.nr_blocks else 0
    return -ENOSPC


cdef void backing_unpin_block(backing_t* b, uint64_t block) noexcept nogil:
    block_put(b, block, PIN)


cdef inline uint64_t last_block(uint64_t offset, uint32_t size) noexcept nogil:
    return (offset + back_extent(size) - 1) >> BLOCK_SHIFT


cdef void backing_add(backing_t* b, uint64_t offset, uint32_t size) noexcept nogil:
    cdef uint64_t block = offset >> BLOCK_SHIFT, last = last_block(offset, size)
    while block <= last:
        add32(&b.blocks[block], back_share(offset, size, block))
        block += 1


cdef void backing_remove(backing_t* b, uint64_t offset, uint32_t size) noexcept nogil:
    cdef uint64_t block = offset >> BLOCK_SHIFT, last = last_block(offset, size)
    while block <= last:
        block_put(b, block, back_share(offset, size, block))
        block += 1


cdef void backing_release(backing_t* b, uint64_t v) noexcept nogil:
    backing_remove(b, back_offset(v), back_size(v))


cdef void backing_pin(backing_t* b, uint64_t v) noexcept nogil:
    cdef uint64_t block = back_offset(v) >> BLOCK_SHIFT, last = last_block(back_offset(v), back_size(v))
    while block <= last:
        add32(&b.blocks[block], PIN)
        block += 1


cdef void backing_unpin(backing_t* b, uint64_t v) noexcept nogil:
    cdef uint64_t block = back_offset(v) >> BLOCK_SHIFT, last = last_block(back_offset(v), back_size(v))
    while block <= last:
        block_put(b, block, PIN)
        block += 1


# ---- the device -------------------------------------------------------------------------------

cdef int backing_write(backing_t* b, uint64_t first, uint64_t count, const uint8_t* data) noexcept nogil:
    cdef uint64_t left = count << BLOCK_SHIFT, offset = first << BLOCK_SHIFT
    cdef ssize_t done
    while left:
        done = pwrite(b.fd, data, left, <int64_t>offset)
        if done < 0 and errno == EINTR:
            continue
        if done <= 0:
            add64(&b.record.write_errors, 1)
            return -errno if done < 0 else -EIO
        data += done
        offset += <uint64_t>done
        left -= <uint64_t>done
    add64(&b.record.writes, count)
    return 0


cdef bint backing_read(backing_t* b, uint64_t offset, uint64_t n, uint8_t* io) noexcept nogil:
    cdef uint64_t had = 0
    cdef ssize_t got
    while had < n:
        got = pread(b.fd, io + had, n - had, <int64_t>(offset + had))
        if got < 0 and errno == EINTR:
            continue
        if got <= 0:                # 0: the file was cut
            add64(&b.record.read_errors, 1)
            return False
        had += <uint64_t>got
    add64(&b.record.reads, n >> BLOCK_SHIFT)
    return True


cdef const uint8_t* backing_fetch(backing_t* b, uint64_t slot, uint64_t v, uint8_t* io) noexcept nogil:
    cdef uint64_t offset = back_offset(v), total
    cdef uint32_t size = back_size(v), start = <uint32_t>(offset & (BLOCK - 1))
    cdef uint64_t n = (start + back_extent(size) + BLOCK - 1) & ~<uint64_t>(BLOCK - 1)
    cdef const uint8_t* data = io + start if size == BLOCK else io + start + BACK_HEADER
    if not backing_read(b, offset - start, n, io):
        return NULL
    total = back_sum(b, slot, data, size)
    if (place_bits(back_place(offset, size, total)) == place_bits(v) if size == BLOCK
            else (<const uint64_t*>(io + start))[0] == total):
        return data
    add64(&b.record.read_errors, 1)
    return NULL


cdef void blocks_give_back(backing_t* b, uint64_t first, uint64_t n) noexcept nogil:
    """Of blocks that nobody uses. A file system that can't take them back leaves them their data, and is not
    asked for them again."""
    cdef int64_t at = <int64_t>(first << BLOCK_SHIFT), length = <int64_t>(n << BLOCK_SHIFT)
    if b.wipe:
        blocks_zero(b, first, n)
    if b.is_file:
        fallocate(b.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, length)


cdef void blocks_zero(backing_t* b, uint64_t first, uint64_t n) noexcept nogil:
    """By writes into the same place, because a hole in a file leaves the data on the disk below. An error is
    counted as one of any other write."""
    cdef uint64_t count
    while n:
        count = min(n, <uint64_t>ZERO_BLOCKS)
        backing_write(b, first, count, b.zeros)
        first += count
        n -= count


cdef uint64_t trim_group(backing_t* b, uint64_t group, uint64_t most) noexcept nogil:
    cdef uint64_t block = group << GROUP_SHIFT, end = min((group + 1) << GROUP_SHIFT, b.nr_blocks)
    cdef uint64_t first, n, done = 0
    while block < end and done < most:
        first = block
        # Pinned while the hole is made, without being counted as used.
        while (block < end and block - first < TRIM_RUN
                and load32(&b.blocks[block]) == STALE and cas32(&b.blocks[block], STALE, STALE | PIN)):
            block += 1
        if block == first:
            block += 1
            continue
        blocks_give_back(b, first, block - first)
        n = block - first
        sub32(&b.groups[group], <uint32_t>n * GROUP_STALE)
        sub64(&b.stale, n)
        add64(&b.reuses, 1)
        done += n
        while first < block:
            store32(&b.blocks[first], 0)
            first += 1
    return done


cdef uint64_t backing_trim(backing_t* b, uint64_t most) noexcept nogil:
    cdef uint64_t group, done = 0
    if not b.is_file and not b.wipe:
        return 0
    for group in range(b.nr_groups):
        if done >= most:
            break
        if load32(&b.groups[group]) >> 16:
            done += trim_group(b, group, most - done)
    return done


cdef void written_zero(backing_t* b) noexcept nogil:
    """Zeroes every block that holds data of a page, used or not. For a store that is closed."""
    cdef uint64_t block = 0, first
    while block < b.nr_blocks:
        if load32(&b.groups[block >> GROUP_SHIFT]) == 0:
            block = ((block >> GROUP_SHIFT) + 1) << GROUP_SHIFT
            continue
        first = block
        while block < b.nr_blocks and load32(&b.blocks[block]) != 0:
            block += 1
        if block > first:
            blocks_zero(b, first, block - first)
        else:
            block += 1


# ---- Python -----------------------------------------------------------------------------------

cdef void backing_free(backing_t* b) noexcept nogil:
    if b.blocks != NULL:
        munmap(b.blocks, b.nr_blocks * sizeof(uint32_t))
    if b.groups != NULL:
        munmap(b.groups, b.nr_groups * sizeof(uint32_t))
    free(b.zeros)
    free(b)


@cython.no_gc_clear
cdef class Backing:
    """A block device or regular file, opened for a store's pages; its data is lost.

    Its size is what it has: `truncate` makes a file that costs nothing until it is written. The store that
    it is given to closes it. wipe: a block is overwritten with zeros soon after its last page has gone
    (trim()), and all of them when it is closed.
    Raises OSError: what open(2) says (ENOENT, EACCES, EBUSY ...); ENOTBLK for anything but a block
    device or a regular file; EINVAL for less than 4096 bytes; EBUSY for a file in use. MemoryError.
    opener: opens the path with the flags that it gets, as os.open; for one that refuses some paths. kept: the
    descriptor (fileno()) of the Backing of a store that is to be adopted; nothing is opened then, a duplicate
    is kept, and only close() ends the data.
    """

    def __cinit__(self, path: str, bint wipe=False, opener=os.open, kept=None):
        cdef uint64_t nr_blocks
        self.path = os.path.abspath(path)
        self.kept = kept is not None
        fd = _open_backing(path, opener) if kept is None else os.dup(kept)
        try:
            nr_blocks = min(os.lseek(fd, 0, os.SEEK_END) >> BLOCK_SHIFT, MAX_BLOCKS)
            if nr_blocks == 0:
                raise ZramfsError(
                    errors.EINVAL,
                    f"{path} is empty; give it the size that pages may take there: truncate --size=4G {path}",
                )
            self.b = <backing_t*>calloc(1, sizeof(backing_t))
            if self.b == NULL:
                raise MemoryError
            self.b.nr_blocks = nr_blocks
            self.b.nr_groups = (nr_blocks + GROUP_BLOCKS - 1) >> GROUP_SHIFT
            self.b.blocks = <uint32_t*>map_sparse(nr_blocks * sizeof(uint32_t), -1)
            self.b.groups = <uint32_t*>map_sparse(self.b.nr_groups * sizeof(uint32_t), -1)
            if self.b.blocks == NULL or self.b.groups == NULL:
                raise MemoryError(f"no memory for the table of {nr_blocks} blocks")
            if wipe:
                self.b.zeros = <uint8_t*>aligned_alloc(BLOCK, ZERO_BLOCKS << BLOCK_SHIFT)
                if self.b.zeros == NULL:
                    raise MemoryError(f"no memory for {ZERO_BLOCKS} blocks")
                memset(self.b.zeros, 0, ZERO_BLOCKS << BLOCK_SHIFT)
            self.b.wipe = wipe
            self.b.own.key = int.from_bytes(os.urandom(8), "little")
            self.b.record = &self.b.own
            self.b.is_file = stat.S_ISREG(os.fstat(fd).st_mode)
            self.b.fd = fd
        except BaseException:
            if self.b != NULL:
                backing_free(self.b)
                self.b = NULL
            os.close(fd)
            raise

    def __dealloc__(self):
        # If the store is not adopted, its pages stay for another attempt.
        self.leave() if self.kept else self.close()

    def close(self):
        """Gives the space of a file back, and the descriptor. The store must have been closed. With wipe it
        takes as long as it takes to write as much as was stored."""
        cdef backing_t* b = self.b
        self.b = NULL
        if b == NULL:
            return
        with nogil:
            if b.wipe:
                written_zero(b)
            if b.is_file:
                fallocate(b.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
                          <int64_t>(b.nr_blocks << BLOCK_SHIFT))
            close(b.fd)
            backing_free(b)

    def fileno(self):
        if self.b == NULL:
            raise ValueError("the backing store is closed")
        return self.b.fd

    def leave(self):
        """As close(), but the blocks keep what they hold, for whoever holds the descriptor too."""
        cdef backing_t* b = self.b
        self.b = NULL
        if b != NULL:
            close(b.fd)
            backing_free(b)

    @property
    def closed(self):
        return self.b == NULL

    @property
    def trims(self):
        """Whether trim() has anything to do: for a file, and with wipe."""
        return bool(self.b.is_file or self.b.wipe) if self.b != NULL else False

    @property
    def is_file(self):
        return bool(self.b.is_file) if self.b != NULL else False

    def trim(self, uint64_t most=TRIM_RUN):
        """Gives the space of at most so many free blocks back to the file system; how many it were."""
        cdef uint64_t done
        if self.b == NULL:
            raise ValueError("the backing store is closed")
        with nogil:
            done = backing_trim(self.b, most)
        return done

    def stats(self):
        cdef backing_t* b = self.b
        if b == NULL:
            raise ValueError("the backing store is closed")
        return BackingStats(
            blocks=b.nr_blocks, used=peek64(&b.used), stale=peek64(&b.stale), reads=peek64(&b.record.reads),
            writes=peek64(&b.record.writes), read_errors=peek64(&b.record.read_errors),
            write_errors=peek64(&b.record.write_errors), unit_left=peek64(&b.unit_left),
        )

    cdef int check(self, const uint32_t* live) except -1:
        """[B1] and [B2]; live: what the slots say of each block. At rest only."""
        cdef backing_t* b = self.b
        cdef uint64_t group, block, used = 0, stale = 0
        cdef uint32_t word, found
        for group in range(b.nr_groups):
            found = 0
            for block in range(group << GROUP_SHIFT, min((group + 1) << GROUP_SHIFT, b.nr_blocks)):
                word = load32(&b.blocks[block])
                if word & COUNTS != live[block]:
                    raise CheckError(
                        f"[B1] block {block}: the slots count {live[block]}, its word {word:#x}")
                if word & COUNTS:
                    found += 1
                    used += 1
                elif word:
                    found += GROUP_STALE
                    stale += 1
            if found != load32(&b.groups[group]):
                raise CheckError(
                    f"[B2] group {group}: {found:#x} found, {load32(&b.groups[group]):#x} counted")
        if used != b.used or stale != b.stale:
            raise CheckError(f"[B2] {used} blocks in use and {stale} stale, {b.used} and {b.stale} counted")
        return 0
