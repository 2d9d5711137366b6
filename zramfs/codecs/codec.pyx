# SPDX-License-Identifier: Apache-2.0
"""Compressors for pages: lz4, lz4hc, zstd, none.

A codec is an algorithm with a level and perhaps a dictionary; a context is one thread's workspace for
it. All memory of a context is one block made with the context, so compressing and decompressing
allocate nothing (one exception, inside liblz4: see lz4hc in _ALGORITHMS). The store uses the C interface in
codec.pxd; `Codec` is the same for Python.
"""
import threading

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport EINVAL, EIO, ENOMEM
from libc.limits cimport INT_MAX
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from allocator.prim cimport PAGE_BYTES, aligned_alloc, round_up
from zramfs.codecs.compressors cimport *
from zramfs.codecs.dictionary cimport DICTIONARY_MAX, dictionary_free, dictionary_new, dictionary_t
from zramfs.codecs.spec import (
    DEFAULT_LEVEL as _DEFAULT_LEVEL, LEVELS as _LEVELS, expect_algorithm as _expect_algorithm,
    expect_level as _expect_level, parse_level as _parse_level,
)


cdef extern from "<malloc.h>" nogil:
    size_t malloc_usable_size(void* p) noexcept

cdef enum:
    CACHE_LINE = 64

cdef struct Algorithm:
    const char* name
    int lowest
    int highest
    int standard        # the level taken when none is given

# By CODEC_* number. What a level means: lz4, the acceleration; lz4hc and zstd, the effort.
cdef Algorithm[4] _ALGORITHMS
_ALGORITHMS[<int>CODEC_NONE] = Algorithm(b"none", 0, 0, 0)
_ALGORITHMS[<int>CODEC_LZ4] = Algorithm(b"lz4", 1, 65537, 1)
# From level 10 on liblz4 takes 64 KiB from malloc for every call and gives it back; where that
# fails, the page counts as incompressible.
_ALGORITHMS[<int>CODEC_LZ4HC] = Algorithm(b"lz4hc", 1, 12, 9)
_ALGORITHMS[<int>CODEC_ZSTD] = Algorithm(b"zstd", -7, 22, 3)


# The head of the context's one block; the workspaces follow it.
cdef struct codec_ctx_t:
    codec_t codec
    void* lz4               # LZ4_stream_t or LZ4_streamHC_t
    ZSTD_CCtx* zstd
    ZSTD_DCtx* unzstd
    uint8_t* bounce
    size_t bounce_size


cdef size_t _zstd_cctx_size(int level, size_t dictionary) noexcept nogil:
    """Bytes that a compression of any length up to CODEC_MAX_INPUT needs: zstd takes its
    parameters by level and length, and those of a shorter input may need more."""
    cdef size_t most = 0
    cdef size_t need
    cdef unsigned long long n = 1024
    while n <= CODEC_MAX_INPUT:
        need = ZSTD_estimateCCtxSize_usingCParams(ZSTD_getCParams(level, n, dictionary))
        if need > most:
            most = need
        n *= 2
    return most


cdef int _zstd_start(codec_ctx_t* ctx, void* cctx, size_t cctx_size,
                     void* dctx, size_t dctx_size) noexcept nogil:
    cdef dictionary_t* d = ctx.codec.dictionary
    ctx.unzstd = ZSTD_initStaticDCtx(dctx, dctx_size)
    if (ctx.unzstd == NULL
            or ZSTD_isError(ZSTD_DCtx_setParameter(ctx.unzstd, ZSTD_d_format, ZSTD_f_zstd1_magicless))
            or d != NULL and ZSTD_isError(ZSTD_DCtx_refDDict(ctx.unzstd, d.unzstd))):
        return -EINVAL
    if cctx_size == 0:
        return 0
    ctx.zstd = ZSTD_initStaticCCtx(cctx, cctx_size)
    # The slot knows what a frame could say of itself. Without magic number, length and checksum
    # a page's frame has 5 bytes around its data instead of 11 to 15.
    if (ctx.zstd == NULL
            or ZSTD_isError(ZSTD_CCtx_setParameter(ctx.zstd, ZSTD_c_compressionLevel, ctx.codec.level))
            or ZSTD_isError(ZSTD_CCtx_setParameter(ctx.zstd, ZSTD_c_format, ZSTD_f_zstd1_magicless))
            or ZSTD_isError(ZSTD_CCtx_setParameter(ctx.zstd, ZSTD_c_contentSizeFlag, 0))
            or ZSTD_isError(ZSTD_CCtx_setParameter(ctx.zstd, ZSTD_c_checksumFlag, 0))
            or ZSTD_isError(ZSTD_CCtx_setParameter(ctx.zstd, ZSTD_c_dictIDFlag, 0))
            or d != NULL and (d.zstd == NULL or ZSTD_isError(ZSTD_CCtx_refCDict(ctx.zstd, d.zstd)))):
        return -EINVAL
    return 0


cdef int codec_init(codec_t* c, int algo, int level) noexcept nogil:
    if algo < 0 or algo > CODEC_ZSTD:
        return -EINVAL
    if level < _ALGORITHMS[algo].lowest or level > _ALGORITHMS[algo].highest:
        return -EINVAL
    # zstd would take its default for 0, and the device would show a level that it does not use.
    if algo == CODEC_ZSTD and level == 0:
        return -EINVAL
    c.algo = algo
    c.level = level
    c.dictionary = NULL
    return 0


cdef inline bint codec_compresses(const codec_t* c) noexcept nogil:
    """False: its dictionary was prepared only to decompress."""
    return c.algo != CODEC_ZSTD or c.dictionary == NULL or c.dictionary.zstd != NULL


cdef codec_ctx_t* codec_ctx_new(const codec_t* c, bint compresses) noexcept nogil:
    cdef size_t head = round_up(sizeof(codec_ctx_t), CACHE_LINE)
    cdef size_t lz4 = 0
    cdef size_t bounce = 0
    cdef size_t cctx = 0
    cdef size_t dctx = 0
    cdef uint8_t* block
    cdef codec_ctx_t* ctx
    if c.algo == CODEC_LZ4 and compresses:
        lz4 = <size_t>LZ4_sizeofState()
    elif c.algo == CODEC_LZ4HC and compresses:
        lz4 = <size_t>LZ4_sizeofStateHC()
    elif c.algo == CODEC_ZSTD:
        dctx = ZSTD_estimateDCtxSize()
        if compresses:
            bounce = round_up(ZSTD_compressBound(CODEC_MAX_INPUT), CACHE_LINE)
            cctx = round_up(
                _zstd_cctx_size(c.level, c.dictionary.size if c.dictionary != NULL else 0), CACHE_LINE)
    # Whole pages of its own, so that the block can be locked into memory and unlocked again
    # without a word about its neighbours.
    block = <uint8_t*>aligned_alloc(PAGE_BYTES, round_up(head + lz4 + bounce + cctx + dctx, PAGE_BYTES))
    if block == NULL:
        return NULL
    ctx = <codec_ctx_t*>block
    memset(ctx, 0, sizeof(codec_ctx_t))
    ctx.codec = c[0]
    if lz4 > 0:
        ctx.lz4 = block + head
    if dctx > 0:
        ctx.bounce = block + head
        ctx.bounce_size = bounce
        if _zstd_start(ctx, block + head + bounce, cctx, block + head + bounce + cctx, dctx) != 0:
            free(block)
            return NULL
    return ctx


cdef void codec_ctx_free(codec_ctx_t* ctx) noexcept nogil:
    free(ctx)


cdef size_t codec_ctx_bytes(codec_ctx_t* ctx) noexcept nogil:
    return malloc_usable_size(ctx)


cdef size_t codec_bytes(const codec_t* c) noexcept nogil:
    return malloc_usable_size(c.dictionary) if c.dictionary != NULL else 0


cdef int _zstd_compress(codec_ctx_t* ctx, const uint8_t* src, int n, uint8_t* dst, int cap) noexcept nogil:
    cdef size_t done
    # zstd needs 8 bytes of slack behind its output and takes other choices where they are short.
    # Through the bounce buffer the result is the same for every cap, and one that just fits does
    # fit. At level 1 a page takes 12 to 15 us either way.
    if <size_t>cap >= ZSTD_compressBound(<size_t>n):
        done = ZSTD_compress2(ctx.zstd, dst, <size_t>cap, src, <size_t>n)
        return 0 if ZSTD_isError(done) else <int>done
    done = ZSTD_compress2(ctx.zstd, ctx.bounce, ctx.bounce_size, src, <size_t>n)
    if ZSTD_isError(done) or done > <size_t>cap:
        return 0
    memcpy(dst, ctx.bounce, done)
    return <int>done


cdef int _lz4_compress(codec_ctx_t* ctx, const char* src, int n, char* dst, int cap) noexcept nogil:
    cdef dictionary_t* d = ctx.codec.dictionary
    if ctx.codec.algo == CODEC_LZ4HC:
        if d == NULL:
            return LZ4_compress_HC_extStateHC(ctx.lz4, src, dst, n, cap, ctx.codec.level)
        memcpy(ctx.lz4, d.lz4hc, sizeof(LZ4_streamHC_t))
        return LZ4_compress_HC_continue(<LZ4_streamHC_t*>ctx.lz4, src, dst, n, cap)
    if d == NULL:
        return LZ4_compress_fast_extState(ctx.lz4, src, dst, n, cap, ctx.codec.level)
    # A copy of the prepared state, 16 KiB (lz4hc: 256 KiB), as liblz4 exports a call that refers to
    # it only since 1.10; loading the dictionary anew would hash all of it for each page. It costs what
    # a call without a dictionary begins with, which clears as much (an incompressible page: lz4 0.9 us
    # with and 1.0 without, lz4hc 25.4 and 24.6).
    memcpy(ctx.lz4, d.lz4, sizeof(LZ4_stream_t))
    return LZ4_compress_fast_continue(<LZ4_stream_t*>ctx.lz4, src, dst, n, cap, ctx.codec.level)


cdef int codec_compress(codec_ctx_t* ctx, const uint8_t* src, int n, uint8_t* dst, int cap) noexcept nogil:
    if n < 0 or n > CODEC_MAX_INPUT or cap <= 0:
        return 0
    if ctx.lz4 != NULL:
        return _lz4_compress(ctx, <const char*>src, n, <char*>dst, cap)
    if ctx.zstd != NULL:
        return _zstd_compress(ctx, src, n, dst, cap)
    return 0


cdef bint _zstd_one_frame(const uint8_t* src, int n) noexcept nogil:
    """Whether the blocks of one frame without length, checksum and dictionary fill src exactly.

    libzstd goes on to a next frame, and looks there for a magic number even in the magicless
    format: of 1 to 3 bytes it reads 4, beyond src (1.5.4). It would also take skippable frames
    and those of its versions before 0.8."""
    cdef Py_ssize_t at = 2      # the header: a descriptor, 0 for ours, and the window's size
    cdef int header
    if src[0] != 0:
        return False
    while n - at >= 3:
        header = src[at] | src[at + 1] << 8 | src[at + 2] << 16
        at += 3 + (1 if header >> 1 & 3 == 1 else header >> 3)      # type 1 repeats one byte
        if header & 1:      # the last block
            return at == n
    return False


cdef int codec_decompress(codec_ctx_t* ctx, const uint8_t* src, int n, uint8_t* dst, int cap) noexcept nogil:
    cdef dictionary_t* d = ctx.codec.dictionary
    cdef int got
    cdef size_t done
    if n <= 0 or cap < 0:
        return -EIO
    if ctx.codec.algo == CODEC_LZ4 or ctx.codec.algo == CODEC_LZ4HC:
        if d == NULL:
            got = LZ4_decompress_safe(<const char*>src, <char*>dst, n, cap)
        else:
            got = LZ4_decompress_safe_usingDict(<const char*>src, <char*>dst, n, cap,
                                                <const char*>d.bytes, <int>d.size)
        return got if got >= 0 else -EIO
    if ctx.codec.algo == CODEC_ZSTD:
        if not _zstd_one_frame(src, n):
            return -EIO
        done = ZSTD_decompressDCtx(ctx.unzstd, dst, <size_t>cap, src, <size_t>n)
        return -EIO if ZSTD_isError(done) else <int>done
    if n > cap:
        return -EIO
    memcpy(dst, src, <size_t>n)
    return n


_NUMBERS = {_ALGORITHMS[i].name.decode(): i for i in range(4)}
assert {name: (_ALGORITHMS[i].lowest, _ALGORITHMS[i].highest) for name, i in _NUMBERS.items()} == _LEVELS
assert {name: _ALGORITHMS[i].standard for name, i in _NUMBERS.items()} == _DEFAULT_LEVEL
MAX_INPUT = CODEC_MAX_INPUT
MAX_DICTIONARY = DICTIONARY_MAX


def parse(str spec not None) -> Codec:
    """The codec of "zstd:9", "zstd:-3" or "lz4" (its default level).

    ValueError with a sentence that says what was expected; MemoryError.
    """
    name, level = _parse_level(spec)
    return Codec(name, level)


cdef class Codec:
    """An algorithm at a level, with a context of its own. level None takes the default; dictionary:
    1 to MAX_DICTIONARY bytes, for lz4, lz4hc and zstd. only_decompresses: a dictionary of zstd's is prepared
    for decompress() alone.

    Threads may share one; they take turns. ValueError for a bad name, level or dictionary; MemoryError.
    """

    def __cinit__(self, str algo not None, level=None, bytes dictionary=None, *,
                  bint only_decompresses=False):
        cdef int number
        _expect_algorithm(algo)
        number = _NUMBERS[algo]
        if level is None:
            level = _ALGORITHMS[number].standard
        # Compared as Python's numbers, which have no width to overflow.
        _expect_level(algo, level)
        if codec_init(&self.codec, number, level) != 0:
            raise ValueError(f"the library refuses the level {level} of {algo}")
        self.lock = threading.Lock()
        if dictionary is not None:
            self.take_dictionary(dictionary, not only_decompresses)
        self.ctx = codec_ctx_new(&self.codec, codec_compresses(&self.codec))
        if self.ctx == NULL:
            raise MemoryError(f"no memory for a context of {self!r}")

    cdef int take_dictionary(self, bytes dictionary, bint compresses) except -1:
        cdef const uint8_t* p = dictionary
        cdef size_t n = <size_t>len(dictionary)
        cdef int r
        with nogil:
            r = dictionary_new(
                &self.codec.dictionary, self.codec.algo, self.codec.level, p, n, compresses)
        if r == -ENOMEM:
            raise MemoryError(f"no memory for a dictionary of {n} bytes")
        if r != 0:
            if self.codec.algo == CODEC_NONE:
                raise ValueError("none takes no dictionary")
            if not 1 <= n <= DICTIONARY_MAX:
                raise ValueError(f"a dictionary has 1 to {DICTIONARY_MAX} bytes, not {n}")
            raise ValueError(f"these {n} bytes begin like a dictionary of {self.algo}, and are damaged")
        return 0

    def __dealloc__(self):
        codec_ctx_free(self.ctx)
        dictionary_free(self.codec.dictionary)

    @property
    def algo(self) -> str:
        return _ALGORITHMS[self.codec.algo].name.decode()

    @property
    def level(self) -> int:
        return self.codec.level

    @property
    def dictionary(self) -> bytes | None:
        cdef dictionary_t* d = self.codec.dictionary
        return None if d == NULL else (<const char*>d.bytes)[:d.size]

    def __repr__(self):
        cdef dictionary_t* d = self.codec.dictionary
        extra = "" if d == NULL else f", <{d.size} bytes>"
        return f"Codec({self.algo!r}, {self.level}{extra})"

    def compress(self, data, cap=None):
        """The compressed bytes of `data` (a buffer of up to MAX_INPUT bytes), or None where they
        would be more than `cap`; without cap, only "none" answers None. ValueError."""
        cdef Py_buffer view
        cdef int n
        cdef int room
        cdef bytes out
        cdef uint8_t* dst
        if not codec_compresses(&self.codec):
            raise ValueError(f"{self!r} was made only to decompress")
        if cap is not None and cap < 0:
            raise ValueError(f"cap is a number of bytes, 0 or more, not {cap}")
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            if view.len > CODEC_MAX_INPUT:
                raise ValueError(f"data is at most {CODEC_MAX_INPUT} bytes, not {view.len}")
            n = <int>view.len
            room = max(LZ4_compressBound(n), <int>ZSTD_compressBound(<size_t>n))
            if cap is not None:
                room = min(room, cap)
            out = PyBytes_FromStringAndSize(NULL, room)
            dst = <uint8_t*><char*>out
            with self.lock:
                with nogil:
                    n = codec_compress(self.ctx, <const uint8_t*>view.buf, n, dst, room)
        finally:
            PyBuffer_Release(&view)
        return out[:n] if n > 0 else None

    def decompress(self, data, size):
        """The `size` bytes (0 to MAX_INPUT) that were compressed into `data`.

        OSError(EIO) if data is not what a compressor makes of `size` bytes. ValueError."""
        cdef Py_buffer view
        cdef Py_ssize_t n
        cdef int got
        cdef int cap
        cdef bytes out
        cdef uint8_t* dst
        if not 0 <= size <= CODEC_MAX_INPUT:
            raise ValueError(f"size is 0 to {CODEC_MAX_INPUT} bytes, not {size}")
        cap = size
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            n = view.len
            if n > INT_MAX:
                raise ValueError(f"data is at most {INT_MAX} bytes, not {n}")
            out = PyBytes_FromStringAndSize(NULL, cap)
            dst = <uint8_t*><char*>out
            with self.lock:
                with nogil:
                    got = codec_decompress(self.ctx, <const uint8_t*>view.buf, <int>n, dst, cap)
        finally:
            PyBuffer_Release(&view)
        if got != size:
            raise OSError(EIO, f"these {n} bytes are not {size} bytes compressed with {self.algo}")
        return out


cdef Codec codec_that_compresses(Codec codec):
    return codec if codec_compresses(&codec.codec) else Codec(codec.algo, codec.level, codec.dictionary)
