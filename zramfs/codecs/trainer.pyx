# SPDX-License-Identifier: Apache-2.0
# Locks: none.
"""A dictionary of zstd's own kind from sample pages, by libzstd's fast cover algorithm, in bounded memory.

The library does it in one call, which takes about 0.1 s of CPU and can't be interrupted. The thread that
makes it keeps its priority: one that has only what the CPU has left over (SCHED_IDLE) would be slow to end
when the process is killed, and the next daemon waits for the end of all its threads (S96 in
docs/concurrency.md).
"""
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset

from cpython.bytes cimport PyBytes_FromStringAndSize

from zramfs.codecs.compressors cimport CODEC_MAX_INPUT

from zramfs.codecs.codec import MAX_DICTIONARY as _MOST

# Its parameters belong to the experimental part of the library, which the shared one exports.
cdef extern from * nogil:
    """
    #define ZDICT_STATIC_LINKING_ONLY
    #include <zdict.h>
    """
    ctypedef struct ZDICT_params_t:
        int compressionLevel
        unsigned int notificationLevel
        unsigned int dictID
    ctypedef struct ZDICT_fastCover_params_t:
        unsigned int k
        unsigned int d
        unsigned int f
        unsigned int steps
        unsigned int nbThreads
        double splitPoint
        unsigned int accel
        unsigned int shrinkDict
        unsigned int shrinkDictMaxRegression
        ZDICT_params_t zParams
    size_t ZDICT_trainFromBuffer_fastCover(void* dictionary, size_t capacity, const void* samples,
                                           const size_t* sizes, unsigned int count,
                                           ZDICT_fastCover_params_t parameters)
    unsigned int ZDICT_isError(size_t result)
    const char* ZDICT_getErrorName(size_t result)

cdef enum:
    # Bytes of a piece of the dictionary, of a substring that is counted, and the logarithm of the number of
    # counters. The library's own search tries five lengths of pieces, and takes five times as long and four
    # times as much memory. Of 1024 pages of documents it finds a dictionary that makes others 0.3 % smaller
    # than the one with these, and of programs none that is better, in 0.32 to 0.39 s instead of 0.06, and in
    # 12 MiB instead of 3.
    SEGMENT = 200
    SUBSTRING = 8
    COUNTERS = 18
    MOST_BYTES = 64 << 20       # of samples


cdef ZDICT_fastCover_params_t parameters(int level) noexcept nogil:
    cdef ZDICT_fastCover_params_t wanted
    memset(&wanted, 0, sizeof(wanted))
    wanted.k, wanted.d, wanted.f, wanted.accel = SEGMENT, SUBSTRING, COUNTERS, 1
    wanted.splitPoint = 1.0
    wanted.zParams.compressionLevel = level
    return wanted


def train(const uint8_t[::1] samples not None, size, level):
    """A dictionary of at most size bytes (256 to MAX_DICTIONARY) from whole pages, one behind the other, for
    zstd at a level. Without the GIL. It takes 0.06 ms of CPU a page at level 3 and 0.15 at 9, and besides the
    samples 3 MiB of memory, which it frees.

    Raises ValueError: too few pages, or pages that have nothing in common; MemoryError.
    """
    cdef size_t count = <size_t>samples.shape[0] // CODEC_MAX_INPUT, capacity, i, r
    cdef const uint8_t* data
    cdef ZDICT_fastCover_params_t wanted
    cdef size_t* sizes
    cdef char* made
    if not 256 <= size <= _MOST:
        raise ValueError(f"a dictionary of 256 to {_MOST} bytes expected, got {size}")
    if count == 0 or samples.shape[0] % CODEC_MAX_INPUT or samples.shape[0] > MOST_BYTES:
        raise ValueError(
            f"whole pages of {CODEC_MAX_INPUT} bytes, at most {MOST_BYTES}, expected, got {samples.shape[0]}")
    wanted = parameters(level)
    capacity = size
    data = &samples[0]
    sizes = <size_t*>calloc(count, sizeof(size_t))
    made = <char*>malloc(capacity)
    try:
        if sizes == NULL or made == NULL:
            raise MemoryError(f"no memory to train a dictionary on {count} pages")
        with nogil:
            for i in range(count):
                sizes[i] = CODEC_MAX_INPUT
            r = ZDICT_trainFromBuffer_fastCover(made, capacity, data, sizes, <unsigned int>count, wanted)
        if ZDICT_isError(r):
            reason = ZDICT_getErrorName(r).decode()
            if "memory" in reason:
                raise MemoryError(f"no memory to train a dictionary on {count} pages")
            raise ValueError(f"no dictionary of {size} bytes comes of {count} pages: {reason}")
        return PyBytes_FromStringAndSize(made, <Py_ssize_t>r)
    finally:
        free(sizes)
        free(made)
