# SPDX-License-Identifier: Apache-2.0
"""What is used of liblz4 and libzstd, and our numbers for their algorithms."""

cdef enum:
    CODEC_NONE = 0
    CODEC_LZ4 = 1
    CODEC_LZ4HC = 2
    CODEC_ZSTD = 3

cdef enum:
    # Longest input of codec_compress, in bytes: a page. Contexts are sized for it. Units of several pages
    # are compressed by codecs/stream.pyx.
    CODEC_MAX_INPUT = 4096

cdef extern from "<lz4.h>" nogil:
    ctypedef struct LZ4_stream_t:
        pass
    int LZ4_sizeofState()
    int LZ4_compressBound(int n)
    int LZ4_compress_fast_extState(void* state, const char* src, char* dst, int n, int cap, int acceleration)
    int LZ4_decompress_safe(const char* src, char* dst, int n, int cap)
    LZ4_stream_t* LZ4_initStream(void* block, size_t size)
    int LZ4_loadDict(LZ4_stream_t* stream, const char* dictionary, int n)
    int LZ4_compress_fast_continue(LZ4_stream_t* stream, const char* src, char* dst, int n, int cap,
                                   int acceleration)
    int LZ4_decompress_safe_usingDict(const char* src, char* dst, int n, int cap,
                                      const char* dictionary, int dictionary_size)

cdef extern from "<lz4hc.h>" nogil:
    ctypedef struct LZ4_streamHC_t:
        pass
    int LZ4_sizeofStateHC()
    int LZ4_compress_HC_extStateHC(void* state, const char* src, char* dst, int n, int cap, int level)
    LZ4_streamHC_t* LZ4_initStreamHC(void* block, size_t size)
    void LZ4_resetStreamHC_fast(LZ4_streamHC_t* stream, int level)
    int LZ4_loadDictHC(LZ4_streamHC_t* stream, const char* dictionary, int n)
    int LZ4_compress_HC_continue(LZ4_streamHC_t* stream, const char* src, char* dst, int n, int cap)

# The static contexts, their sizes and the magicless format belong to zstd's experimental part,
# which the shared library exports.
cdef extern from * nogil:
    """
    #define ZSTD_STATIC_LINKING_ONLY
    #include <zstd.h>
    """
    ctypedef struct ZSTD_CCtx:
        pass
    ctypedef struct ZSTD_DCtx:
        pass
    ctypedef struct ZSTD_CDict:
        pass
    ctypedef struct ZSTD_DDict:
        pass
    ctypedef struct ZSTD_compressionParameters:
        pass
    ctypedef enum ZSTD_cParameter:
        ZSTD_c_compressionLevel
        ZSTD_c_contentSizeFlag
        ZSTD_c_checksumFlag
        ZSTD_c_dictIDFlag
        ZSTD_c_format
    ctypedef enum ZSTD_dParameter:
        ZSTD_d_format
    ctypedef enum ZSTD_ResetDirective:
        ZSTD_reset_session_only
    ctypedef enum ZSTD_EndDirective:
        ZSTD_e_flush
        ZSTD_e_end
    ctypedef struct ZSTD_inBuffer:
        const void* src
        size_t size
        size_t pos
    ctypedef struct ZSTD_outBuffer:
        void* dst
        size_t size
        size_t pos
    ctypedef enum ZSTD_dictLoadMethod_e:
        ZSTD_dlm_byRef
    ctypedef enum ZSTD_dictContentType_e:
        ZSTD_dct_auto
    int ZSTD_f_zstd1_magicless
    ZSTD_compressionParameters ZSTD_getCParams(int level, unsigned long long n, size_t dict_size)
    size_t ZSTD_estimateCCtxSize_usingCParams(ZSTD_compressionParameters params)
    size_t ZSTD_estimateDCtxSize()
    size_t ZSTD_estimateCDictSize_advanced(size_t n, ZSTD_compressionParameters params,
                                           ZSTD_dictLoadMethod_e method)
    size_t ZSTD_estimateDDictSize(size_t n, ZSTD_dictLoadMethod_e method)
    ZSTD_CCtx* ZSTD_initStaticCCtx(void* block, size_t size)
    ZSTD_DCtx* ZSTD_initStaticDCtx(void* block, size_t size)
    const ZSTD_CDict* ZSTD_initStaticCDict(void* block, size_t size, const void* dictionary, size_t n,
                                           ZSTD_dictLoadMethod_e method, ZSTD_dictContentType_e kind,
                                           ZSTD_compressionParameters params)
    const ZSTD_DDict* ZSTD_initStaticDDict(void* block, size_t size, const void* dictionary, size_t n,
                                           ZSTD_dictLoadMethod_e method, ZSTD_dictContentType_e kind)
    size_t ZSTD_CCtx_setParameter(ZSTD_CCtx* ctx, ZSTD_cParameter parameter, int value)
    size_t ZSTD_DCtx_setParameter(ZSTD_DCtx* ctx, ZSTD_dParameter parameter, int value)
    size_t ZSTD_CCtx_loadDictionary_byReference(ZSTD_CCtx* ctx, const void* dictionary, size_t n)
    size_t ZSTD_CCtx_refCDict(ZSTD_CCtx* ctx, const ZSTD_CDict* dictionary)
    size_t ZSTD_DCtx_refDDict(ZSTD_DCtx* ctx, const ZSTD_DDict* dictionary)
    size_t ZSTD_compress2(ZSTD_CCtx* ctx, void* dst, size_t cap, const void* src, size_t n)
    size_t ZSTD_decompressDCtx(ZSTD_DCtx* ctx, void* dst, size_t cap, const void* src, size_t n)
    size_t ZSTD_compressBound(size_t n)
    ZSTD_CCtx* ZSTD_createCCtx()
    size_t ZSTD_freeCCtx(ZSTD_CCtx* ctx)
    size_t ZSTD_CCtx_reset(ZSTD_CCtx* ctx, ZSTD_ResetDirective what)
    size_t ZSTD_CCtx_setPledgedSrcSize(ZSTD_CCtx* ctx, unsigned long long n)
    size_t ZSTD_compressStream2(ZSTD_CCtx* ctx, ZSTD_outBuffer* out, ZSTD_inBuffer* into,
                                ZSTD_EndDirective end)
    # Block by block, into a buffer that holds everything before.
    size_t ZSTD_decompressBegin_usingDDict(ZSTD_DCtx* ctx, const ZSTD_DDict* dictionary)
    size_t ZSTD_nextSrcSizeToDecompress(ZSTD_DCtx* ctx)
    size_t ZSTD_decompressContinue(ZSTD_DCtx* ctx, void* dst, size_t cap, const void* src, size_t n)
    unsigned int ZSTD_isError(size_t result)
