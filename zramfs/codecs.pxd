# SPDX-License-Identifier: Apache-2.0
"""C interface of the codecs. A codec_t is immutable and shared; a codec_ctx_t is one thread's
workspace for it, made once: nothing is allocated per page."""
from libc.stdint cimport uint8_t

cdef enum:
    CODEC_NONE = 0
    CODEC_LZ4 = 1
    CODEC_LZ4HC = 2
    CODEC_ZSTD = 3

cdef enum:
    # Longest input of codec_compress, in bytes: a page. Contexts are sized for it, so units of
    # several pages need a larger number here and no other change.
    CODEC_MAX_INPUT = 4096

cdef struct codec_t:
    int algo
    int level       # lz4: acceleration

cdef struct codec_ctx_t     # opaque: see codecs.pyx

# Sets *c for a name and level given as C values; -EINVAL (unknown algo, level out of range).
cdef int codec_init(codec_t* c, int algo, int level) noexcept nogil
cdef codec_ctx_t* codec_ctx_new(const codec_t* c) noexcept nogil
cdef void codec_ctx_free(codec_ctx_t* ctx) noexcept nogil
# Bytes written to dst, or 0 if the result does not fit into cap (the page counts as incompressible).
cdef int codec_compress(codec_ctx_t* ctx, const uint8_t* src, int n, uint8_t* dst, int cap) noexcept nogil
# Bytes written to dst (exactly what was compressed), or -EIO for bytes that no compressor made.
cdef int codec_decompress(codec_ctx_t* ctx, const uint8_t* src, int n, uint8_t* dst, int cap) noexcept nogil


cdef class Codec:
    cdef codec_t codec
    cdef codec_ctx_t* ctx
    cdef object lock
