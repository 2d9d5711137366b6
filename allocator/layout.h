/* SPDX-License-Identifier: Apache-2.0
 *
 * The layout of a pool: every persistent struct and bit width, in one place.
 *
 * All of it lies in one memory file, in flat arrays that are addressed by number, never by
 * pointer, so that a mapping at another address (or in another process) reads the same pool.
 *
 *   memory file
 *   +------------+------------------+--------------+------------+--------------+---------------+
 *   | superblock | user region      | pageblock    | page       | zspage       | frames        |
 *   | 4 KiB      | (the slot table) | descriptors  | descriptors| descriptors  | 4 KiB each    |
 *   |            | 8 B a slot       | 16 B each    | 16 B each  | 64 B each    | 2 MiB aligned |
 *   +------------+------------------+--------------+------------+--------------+---------------+
 *   The file is sparse: an array costs memory only where it was touched.
 *
 *   slot ----------> zspage descriptor ----------> page frames (1 to 8, need not be neighbours)
 *   | location |     | frames[8], class, inuse |   | object | object | obj...|...ect | object |
 *        ^                                         | header + data |  an object may straddle two
 *        |                                                |
 *        +------- header.tag (the slot's number) <--------+
 *
 *   pageblock (2 MiB) = 512 frames; buddy blocks of order 0 (one frame) to 9 (a whole pageblock):
 *   |P|P|.0.|P|..1..|P P|....2....|P|P|...|  P in use, .k. a free block of order k
 *
 * Sums that hold whenever no lock is held and no migration is under way (allocator/check.pyx):
 *   [A1] frames used + frames free = frames of all pageblocks in use
 *   [A2] pageblock.nr_free = sum of 2^order over the free blocks inside it
 *   [A3] a pageblock whose 512 frames are free is whole (order 9) and holds no memory
 *   [A4] no two free buddies of one order lie side by side in one pageblock (they would have merged)
 *   [A5] a pageblock in reserve is whole and resident, counts as free and not as in use; with a
 *        reserve every free frame of a pageblock in use is resident too
 *   [A6] in a pageblock in use every frame of a unit that is marked ready holds memory, unless the
 *        balloon has the frame; a unit is marked ready before a frame of it is handed out
 *   [Z1] for each zspage: inuse + length of its free chain = objects per zspage of its class
 *   [Z2] for each class: sum of zspages over the fullness groups + isolated = zspages
 *   [Z3] for each class: sum of inuse over its zspages = objects used
 *   [Z4] sum over classes of zspages * pages per zspage = pool pages = page descriptors owned
 *   [Z5] a zspage stands in the list of the fullness group that its inuse asks for; only the thread that
 *        frees a zspage sees it with inuse 0
 *   [S1] each slot with an object <-> exactly one allocated object whose tag is that slot
 *        (checked in zramfs/store/check.pyx)
 */
#ifndef ZRAMFS_LAYOUT_H
#define ZRAMFS_LAYOUT_H

#include <stdint.h>
#include <stddef.h>

#include "prim.h"

#define FRAME_SHIFT 12
#define FRAME_SIZE 4096
_Static_assert(FRAME_SIZE == PAGE_BYTES, "a frame is a page");
#define PAGEBLOCK_ORDER 9
#define PAGEBLOCK_FRAMES 512
/* 64 bits: what is multiplied by it is a number of bytes in memory files of up to 16 TiB. */
#define PAGEBLOCK_SIZE (2ull << 20)
/* Memory is taken from the OS by so many frames at once. 512 frames take 1.46 ms so, 1.44 ms in one
 * piece, 1.54 ms by eights, 2.05 ms singly. */
#define UNIT_FRAMES 16
#define NR_ORDERS 10
#define NONE32 0xffffffffu

/* ---- superblock: what a recovery needs to find the arrays ------------------------------- */
#define SUPERBLOCK_MAGIC 0x30736672616d7a7aull /* "zzmarfs0", little endian */
#define LAYOUT_VERSION 2
typedef struct {
	uint64_t magic;
	uint32_t version;
	uint32_t chain_max;       /* frames of the longest zspage; 0: no pool in the arena yet */
	uint64_t user_off;        /* byte offset of the user region */
	uint64_t user_size;       /* its length in bytes */
	uint64_t pageblock_off;   /* pageblock_desc_t[nr_pageblocks] */
	uint64_t page_off;        /* page_desc_t[nr_pageblocks * 512] */
	uint64_t zspage_off;      /* zspage_desc_t[nr_pageblocks * 512] */
	uint64_t frames_off;      /* frames, a multiple of 2 MiB */
	uint64_t nr_pageblocks;
	uint64_t file_size;
} superblock_t;
_Static_assert(sizeof(superblock_t) <= FRAME_SIZE, "the superblock is one page");

/* ---- page descriptor ------------------------------------------------------------------- */
/* flags: without PG_MOVABLE they change under the arena lock only, or are changed by the thread that has
 * allocated the frame. With PG_MOVABLE every change is an atomic read-modify-write: the page
 * lock is taken by a compare-and-swap that must still see PG_MOVABLE, and PG_MOVABLE goes away
 * under the page lock. */
#define PG_FREE     0x01u /* head of a free buddy block; order is valid */
#define PG_USED     0x02u /* handed out to an owner */
#define PG_MOVABLE  0x04u /* has, or had, an owner that can move it */
#define PG_ISOLATED 0x08u /* taken by the migration core */
#define PG_LOCKED   0x10u /* the page lock */
typedef struct {
	uint16_t flags;
	uint8_t order;  /* of a free block's head */
	uint8_t owner;  /* an OWNER_ number, 0 = none; page lock while movable */
	uint32_t ref;   /* the owner's own number for it: zsmalloc's zspage */
	uint32_t next;  /* free list of its order: frame numbers, NONE32 ends */
	uint32_t prev;
} page_desc_t;
_Static_assert(sizeof(page_desc_t) == 16, "16 bytes a frame: 0.4 % of the pool");

#define OWNER_NONE 0
#define OWNER_ZSMALLOC 1
#define OWNER_BALLOON 2
#define NR_OWNERS 3

/* ---- pageblock descriptor: guarded by the arena lock ----------------------------------- */
#define PB_IN_USE 0x01u   /* has frames handed out, or free ones that are still resident */
#define PB_ISOLATED 0x02u /* being emptied: its free blocks stand in lists of their own */
typedef struct {
	uint16_t nr_free;     /* free frames inside */
	uint16_t flags;
	uint16_t skip;        /* compaction runs that still pass it by after a failure */
	uint16_t defer;       /* skip of the last failure: doubles up to 64, 0 after a success */
	uint32_t next;        /* list of whole free pageblocks that were in use before */
	uint32_t ready;       /* bit k: unit k (frames 16 k to 16 k + 15) has its memory; see [A6] */
} pageblock_desc_t;
_Static_assert(sizeof(pageblock_desc_t) == 16, "16 bytes a pageblock");

/* ---- zspage descriptor ----------------------------------------------------------------- */
#define CHAIN_MAX 8
#define ZSPAGE_MAGIC 0x7a73u
typedef struct {
	uint32_t frames[CHAIN_MAX]; /* written under class lock + zspage write lock */
	uint32_t next;              /* fullness list: zspage numbers; class lock */
	uint32_t prev;
	uint16_t inuse;             /* objects in use; class lock */
	uint16_t freeobj;           /* index of the first free object, objs_per_zspage ends; class lock */
	uint16_t magic;             /* ZSPAGE_MAGIC while it exists, else 0 */
	uint8_t class_idx;          /* constant while it exists */
	uint8_t fullness;           /* fullness group, or FULLNESS_OFF_LIST; class lock */
	int32_t rwlock;             /* readers, or -1 with a writer; atomic */
	uint32_t isolated;          /* frames taken by the migration core; class lock */
	uint64_t huge_header;       /* header of the one object of a huge zspage */
} zspage_desc_t;
_Static_assert(sizeof(zspage_desc_t) == 64, "one cache line a zspage");

#define NR_FULLNESS 12
#define FULLNESS_EMPTY 0
#define FULLNESS_99 10
#define FULLNESS_FULL 11
#define FULLNESS_OFF_LIST 255

/* ---- size classes ---------------------------------------------------------------------- */
#define ZS_MIN_ALLOC 32
#define ZS_MAX_ALLOC 4096
#define ZS_CLASS_DELTA 16
#define NR_RAW_CLASSES 255
#define OBJ_HEADER 8 /* bytes before the data of every object that is not huge */

/* ---- location: (zspage, object index), never an address --------------------------------
 *   39                                8 7             0
 *   +----------------------------------+---------------+
 *   | zspage number                    | object index  |   at most 256 objects a zspage
 *   +----------------------------------+---------------+   (class 48: 3 * 4096 / 48)
 */
#define LOC_IDX_BITS 8
#define LOC_BITS 40
#define LOC_MASK ((1ull << LOC_BITS) - 1)
#define LOC_NONE LOC_MASK /* names no object on purpose: that of a page that was lost */

/* ---- object header ---------------------------------------------------------------------
 *   63                           16 15 14            1  0
 *   +------------------------------+--+---------------+---+
 *   | tag: the user's 48-bit number|0 | size in bytes | 1 |  allocated
 *   | 0                            |0 | next free idx | 0 |  free
 *   +------------------------------+--+---------------+---+
 */
#define HDR_ALLOCATED 1ull
#define HDR_TAG_SHIFT 16
#define HDR_SIZE_MASK 0x3fffull
#define TAG_BITS 48

#endif
