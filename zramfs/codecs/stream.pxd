# SPDX-License-Identifier: Apache-2.0
"""Several pages compressed as one, so that they can be read from the beginning up to any place.

What packer_run() makes is one zstd frame without magic number, length and checksum, in steps: each step ends
a block, so that unpacker_reach() can stop behind it and go on later. A packer belongs to one thread and makes
memory for itself. An unpacker is made in memory that the caller has, and allocates nothing.

Both may have a dictionary of zstd's, which stays where it is until they are through. Of 64 KiB of text a
dictionary of 64 KiB, trained on 1024 pages, saves 8 % at level 9 and 5 % at level 3; of a file system 3 and
2 %. One of 110 KiB saves 2 % more, one that was trained on pieces of 64 KiB 0 to 1 %."""
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t

from zramfs.codecs.compressors cimport ZSTD_DCtx
from zramfs.codecs.dictionary cimport dictionary_t

cdef enum:
    # Bytes of a step. Of 64 KiB of C headers and manual pages with zstd 3, steps of 4, 8, 16, 32 and 64 KiB
    # take .2068, .2005, .1970, .1952 and .1947 of the original (programs: .3552 to .3457). Up to a page that
    # is chosen by lot 8 KiB take 42 us to read, 16 KiB 46, 32 KiB 48, and 64 KiB 55.
    STREAM_STEP = 32768

cdef struct packer_t            # opaque: see stream.pyx

cdef struct unpacker_t:
    ZSTD_DCtx* zstd
    const uint8_t* src          # the stream
    size_t n                    # its bytes
    size_t at                   # that were read
    uint8_t* dst
    size_t cap
    size_t filled               # bytes of dst that are whole

# NULL when memory is short. level: one of zstd's but 0. dictionary: for zstd, or NULL.
cdef packer_t* packer_new(int level, const dictionary_t* dictionary) noexcept nogil
cdef void packer_free(packer_t* p) noexcept nogil
# Bytes written to dst, or 0 if they would be more than cap.
cdef uint32_t packer_run(packer_t* p, const uint8_t* src, uint32_t n, uint8_t* dst,
                         uint32_t cap) noexcept nogil

# Bytes of memory, aligned to 8, that unpacker_init() needs.
cdef size_t unpacker_memory() noexcept nogil
# 0 or -EINVAL.
cdef int unpacker_init(unpacker_t* u, void* memory, size_t n) noexcept nogil
# Begins a stream. Both buffers stay the unpacker's until the next one, and so does the dictionary (for zstd,
# or NULL) that the packer had.
cdef void unpacker_begin(unpacker_t* u, const uint8_t* src, size_t n, uint8_t* dst, size_t cap,
                         const dictionary_t* dictionary) noexcept nogil
# Goes on until at least `upto` bytes of dst are whole: 0, or -EIO for bytes that no packer made.
cdef int unpacker_reach(unpacker_t* u, size_t upto) noexcept nogil
