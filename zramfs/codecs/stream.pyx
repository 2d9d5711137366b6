# SPDX-License-Identifier: Apache-2.0
"""Several pages compressed as one; see stream.pxd."""
from libc.errno cimport EINVAL, EIO
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport free, malloc

from zramfs.codecs.codec cimport Codec
from zramfs.codecs.compressors cimport *
from zramfs.codecs.dictionary cimport dictionary_t

from zramfs.codecs.spec import LEVELS as _LEVELS


cdef struct packer_t:
    ZSTD_CCtx* zstd


cdef packer_t* packer_new(int level, const dictionary_t* dictionary) noexcept nogil:
    cdef packer_t* p = <packer_t*>malloc(sizeof(packer_t))
    if p == NULL:
        return NULL
    p.zstd = ZSTD_createCCtx()
    if (p.zstd == NULL
            or ZSTD_isError(ZSTD_CCtx_setParameter(p.zstd, ZSTD_c_compressionLevel, level))
            or ZSTD_isError(ZSTD_CCtx_setParameter(p.zstd, ZSTD_c_format, ZSTD_f_zstd1_magicless))
            or ZSTD_isError(ZSTD_CCtx_setParameter(p.zstd, ZSTD_c_contentSizeFlag, 0))
            or ZSTD_isError(ZSTD_CCtx_setParameter(p.zstd, ZSTD_c_checksumFlag, 0))
            or ZSTD_isError(ZSTD_CCtx_setParameter(p.zstd, ZSTD_c_dictIDFlag, 0))
            # Its tables are made for this level, which need not be that of the dictionary's own.
            or dictionary != NULL and ZSTD_isError(
                ZSTD_CCtx_loadDictionary_byReference(p.zstd, dictionary.bytes, dictionary.size))):
        packer_free(p)
        return NULL
    return p


cdef void packer_free(packer_t* p) noexcept nogil:
    if p != NULL:
        ZSTD_freeCCtx(p.zstd)
        free(p)


cdef uint32_t packer_run(packer_t* p, const uint8_t* src, uint32_t n, uint8_t* dst,
                         uint32_t cap) noexcept nogil:
    cdef ZSTD_outBuffer out
    cdef ZSTD_inBuffer into
    cdef uint32_t at = 0, step
    cdef size_t left
    out.dst, out.size, out.pos = dst, cap, 0
    if (ZSTD_isError(ZSTD_CCtx_reset(p.zstd, ZSTD_reset_session_only))
            or ZSTD_isError(ZSTD_CCtx_setPledgedSrcSize(p.zstd, n))):
        return 0
    while at < n:
        step = min(n - at, <uint32_t>STREAM_STEP)
        into.src, into.size, into.pos = src + at, step, 0
        at += step
        # What is left does not fit into cap.
        left = ZSTD_compressStream2(p.zstd, &out, &into, ZSTD_e_end if at == n else ZSTD_e_flush)
        if left != 0 or into.pos != step:
            return 0
    return <uint32_t>out.pos


cdef size_t unpacker_memory() noexcept nogil:
    return ZSTD_estimateDCtxSize()


cdef int unpacker_init(unpacker_t* u, void* memory, size_t n) noexcept nogil:
    u.src = u.dst = NULL
    u.n = u.at = u.cap = u.filled = 0
    u.zstd = ZSTD_initStaticDCtx(memory, n)
    if (u.zstd == NULL
            or ZSTD_isError(ZSTD_DCtx_setParameter(u.zstd, ZSTD_d_format, ZSTD_f_zstd1_magicless))):
        return -EINVAL
    return 0


cdef void unpacker_begin(unpacker_t* u, const uint8_t* src, size_t n, uint8_t* dst, size_t cap,
                         const dictionary_t* dictionary) noexcept nogil:
    ZSTD_decompressBegin_usingDDict(u.zstd, dictionary.unzstd if dictionary != NULL else NULL)
    u.src, u.n, u.at = src, n, 0
    u.dst, u.cap, u.filled = dst, cap, 0


cdef int unpacker_reach(unpacker_t* u, size_t upto) noexcept nogil:
    cdef size_t need, got
    while u.filled < upto:
        # Of a header, or of a block: what is asked for is given whole.
        need = ZSTD_nextSrcSizeToDecompress(u.zstd)
        if need == 0 or need > u.n - u.at:
            return -EIO
        got = ZSTD_decompressContinue(u.zstd, u.dst + u.filled, u.cap - u.filled, u.src + u.at, need)
        if ZSTD_isError(got):
            return -EIO
        u.at += need
        u.filled += got
    return 0


# ---- Python -----------------------------------------------------------------------------------

cdef class Packer:
    """For whoever wants to know how large a stream would be. level: of zstd; codec: one whose dictionary it
    has, None = none. For one thread at a time. ValueError (level; the codec has no dictionary of zstd's),
    MemoryError."""
    cdef packer_t* packer
    cdef Codec codec            # keeps the dictionary

    def __cinit__(self, int level, Codec codec=None):
        cdef const dictionary_t* dictionary = NULL
        lowest, highest = _LEVELS["zstd"]
        if level == 0 or not lowest <= level <= highest:
            raise ValueError(f"a level of {lowest} to {highest} but 0 expected, got {level}")
        if codec is not None:
            if codec.codec.algo != CODEC_ZSTD or codec.codec.dictionary == NULL:
                raise ValueError(f"a codec with a dictionary of zstd's expected, got {codec!r}")
            dictionary = codec.codec.dictionary
        self.codec = codec
        self.packer = packer_new(level, dictionary)
        if self.packer == NULL:
            raise MemoryError(f"no memory for a stream of level {level}")

    def __dealloc__(self):
        packer_free(self.packer)

    def size(self, const uint8_t[::1] data not None):
        """Bytes of the stream of 1 byte to 1 MiB; as many as there are, if it is not smaller."""
        cdef uint32_t n = <uint32_t>data.shape[0], size
        cdef uint8_t* stream
        if not 1 <= data.shape[0] <= 1 << 20:
            raise ValueError(f"1 byte to 1 MiB expected, got {data.shape[0]} bytes")
        stream = <uint8_t*>malloc(n)
        if stream == NULL:
            raise MemoryError(f"no memory for a stream of {n} bytes")
        with nogil:
            size = packer_run(self.packer, &data[0], n, stream, n)
        free(stream)
        return size if size else n
