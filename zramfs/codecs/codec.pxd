# SPDX-License-Identifier: Apache-2.0
"""C interface of the codecs. A codec_t is immutable and shared; a codec_ctx_t is one thread's
workspace for it, made once: nothing is allocated per page."""
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t

from zramfs.codecs.compressors cimport CODEC_LZ4, CODEC_LZ4HC, CODEC_MAX_INPUT, CODEC_NONE, CODEC_ZSTD
from zramfs.codecs.dictionary cimport dictionary_t

cdef struct codec_t:
    int algo
    int level       # lz4: acceleration
    dictionary_t* dictionary    # NULL = none; its owner keeps it for as long as a context exists

cdef struct codec_ctx_t     # opaque: see codec.pyx

# Sets *c for a name and level given as C values, without a dictionary; -EINVAL (unknown algo, level
# out of range).
cdef int codec_init(codec_t* c, int algo, int level) noexcept nogil
# compresses: False for one that is only to decompress, which takes a small part of the memory
# (zstd level 19: 156 KiB instead of 1.2 MiB).
cdef codec_ctx_t* codec_ctx_new(const codec_t* c, bint compresses) noexcept nogil
cdef void codec_ctx_free(codec_ctx_t* ctx) noexcept nogil
# Bytes of memory, of a context and of what a codec has prepared of its dictionary.
cdef size_t codec_ctx_bytes(codec_ctx_t* ctx) noexcept nogil
cdef size_t codec_bytes(const codec_t* c) noexcept nogil
# Bytes written to dst, or 0 if the result does not fit into cap (the page counts as incompressible).
cdef int codec_compress(codec_ctx_t* ctx, const uint8_t* src, int n, uint8_t* dst, int cap) noexcept nogil
# Bytes written to dst (exactly what was compressed), or -EIO for bytes that no compressor made.
cdef int codec_decompress(codec_ctx_t* ctx, const uint8_t* src, int n, uint8_t* dst, int cap) noexcept nogil


cdef class Codec:
    cdef codec_t codec
    cdef codec_ctx_t* ctx       # guarded by lock
    cdef object lock

    cdef int take_dictionary(self, bytes dictionary, bint compresses) except -1

# The codec itself, or where it was made only to decompress, another one like it.
cdef Codec codec_that_compresses(Codec codec)
