# SPDX-License-Identifier: Apache-2.0
"""A dictionary, prepared once for one algorithm and level, immutable, shared by all contexts."""
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t

from zramfs.codecs.compressors cimport LZ4_stream_t, LZ4_streamHC_t, ZSTD_CDict, ZSTD_DDict

cdef enum:
    # Bytes. zstd's trainer makes 110 KiB by default, lz4 looks at the last 64 KiB only, and each
    # context's searches get slower with more; the kernel reads whatever it is given.
    DICTIONARY_MAX = 1 << 20

cdef struct dictionary_t:       # the head of one block; what it points to follows it
    const uint8_t* bytes
    size_t size
    const LZ4_stream_t* lz4
    const LZ4_streamHC_t* lz4hc
    const ZSTD_CDict* zstd      # NULL: only to decompress
    const ZSTD_DDict* unzstd

# One block of memory, pages of its own. compresses: False for one that zstd is only to decompress with,
# without the tables of the other way (of 64 KiB at level 9: 0.9 MiB). 0 and *d; -EINVAL: the algorithm takes
# no dictionary, the length is not 1 to DICTIONARY_MAX, or zstd finds its own kind of dictionary damaged;
# -ENOMEM.
cdef int dictionary_new(dictionary_t** d, int algo, int level, const uint8_t* bytes, size_t n,
                        bint compresses) noexcept nogil
cdef void dictionary_free(dictionary_t* d) noexcept nogil
