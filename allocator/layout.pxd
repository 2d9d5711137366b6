# SPDX-License-Identifier: Apache-2.0
"""Cython's names for layout.h, where every struct is drawn and explained."""
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "layout.h" nogil:
    enum:
        FRAME_SHIFT, FRAME_SIZE, PAGEBLOCK_ORDER, PAGEBLOCK_FRAMES, UNIT_FRAMES, NR_ORDERS
        LAYOUT_VERSION, NR_NOTES, USER_RECORD, CHAIN_MAX, ZSPAGE_MAGIC
        PG_FREE, PG_USED, PG_MOVABLE, PG_ISOLATED, PG_LOCKED, PB_IN_USE, PB_ISOLATED, PB_HELD
        OWNER_NONE, OWNER_ZSMALLOC, OWNER_BALLOON, NR_OWNERS
        NR_FULLNESS, FULLNESS_EMPTY, FULLNESS_99, FULLNESS_FULL, FULLNESS_OFF_LIST
        ZS_MIN_ALLOC, ZS_MAX_ALLOC, ZS_CLASS_DELTA, NR_RAW_CLASSES, OBJ_HEADER
        LOC_IDX_BITS, LOC_BITS, HDR_TAG_SHIFT, TAG_BITS
    const uint32_t NONE32
    const uint64_t SUPERBLOCK_MAGIC, LOC_MASK, LOC_NONE, HDR_ALLOCATED, HDR_SIZE_MASK
    const uint64_t PAGEBLOCK_SIZE, NOTE_HALF

    ctypedef struct migrate_stats_t:
        uint64_t runs
        uint64_t scanned
        uint64_t isolated
        uint64_t migrated
        uint64_t owner_gone
        uint64_t unmovable
        uint64_t busy
        uint64_t again
        uint64_t refused
        uint64_t no_target
        uint64_t put_back
        uint64_t blocks_freed
        uint64_t deferred
        uint64_t ns

    ctypedef struct superblock_t:
        uint64_t magic
        uint32_t version
        uint32_t chain_max
        uint64_t user_off
        uint64_t user_size
        uint64_t pageblock_off
        uint64_t page_off
        uint64_t zspage_off
        uint64_t frames_off
        uint64_t nr_pageblocks
        uint64_t file_size
        uint64_t note_off
        uint64_t note[2]
        uint32_t fresh
        uint32_t described
        uint32_t next_number
        uint32_t numbers_described
        uint64_t bytes_returned
        uint64_t punch_errors
        uint64_t refused
        uint64_t reserve_misses
        uint64_t max_pages
        uint64_t limit_pages
        uint64_t pages_compacted
        uint64_t balloon_target
        migrate_stats_t migration
        uint64_t user_record[128]

    ctypedef struct page_desc_t:
        uint16_t flags
        uint8_t order
        uint8_t owner
        uint32_t ref
        uint32_t next
        uint32_t prev

    ctypedef struct pageblock_desc_t:
        uint16_t nr_free
        uint16_t flags
        uint16_t skip
        uint16_t defer
        uint32_t next
        uint32_t ready

    ctypedef struct zspage_desc_t:
        uint32_t frames[8]
        uint32_t next
        uint32_t prev
        uint16_t inuse
        uint16_t freeobj
        uint16_t magic
        uint8_t class_idx
        uint8_t fullness
        int32_t rwlock
        uint32_t isolated
        uint64_t huge_header
