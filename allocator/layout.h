/* SPDX-License-Identifier: Apache-2.0
 *
 * The layout of a pool: every persistent struct and bit width, in one place.
 *
 * All of it lies in one memory file, in flat arrays that are addressed by number, never by
 * pointer, so that a mapping at another address (or in another process) reads the same pool.
 *
 *   memory file
 *   +------------+--------+------------------+--------------+------------+-------------+---------------+
 *   | superblock | notes  | user region      | pageblock    | page       | zspage      | frames        |
 *   | 4 KiB      | 20 MiB | (the slot table) | descriptors  | descriptors| descriptors | 4 KiB each    |
 *   |            |        | 8 B a slot       | 16 B each    | 16 B each  | 64 B each   | 2 MiB aligned |
 *   +------------+--------+------------------+--------------+------------+-------------+---------------+
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
 *        (checked in zramfs/store/check.pyx). The objects of a unit of several pages belong to no slot:
 *        zramfs/store/units.pxd has their sums, [U1] to [U3]
 *
 * The process may be killed between any two instructions, and another one adopts the file. What it reads
 * there is persistent (P). All else in the file is volatile: it is rebuilt, whatever it says
 * (allocator/recovery.pyx).
 *   P  superblock_t but for the counts of [R3], the notes, and the user region with its slots
 *      (zramfs/store/slots.pxd)
 *   P  zspage_desc_t.magic; while that is ZSPAGE_MAGIC: frames, class_idx, huge_header
 *   P  headers and bytes of allocated objects
 *   P  PG_USED with OWNER_BALLOON of a page descriptor, and whether a pageblock has any flag
 *   -  everything else of the three descriptors, and the free chains inside zspages. Of two zspages that list
 *      one frame, which only a change of memory can bring about, ref of its descriptor names the right one.
 * These hold at every instruction, with locks held, too:
 *   [R1] A slot with an object names an allocated object of a zspage with ZSPAGE_MAGIC, and the object's tag
 *        is the slot. An object is complete before one store puts its location into the slot, and it is freed
 *        only after another such store has replaced that. An allocated object that its slot does not name is
 *        new or old: recovery frees it. So each page is the old one or the new one.
 *   [R2] A frame that a zspage with ZSPAGE_MAGIC lists is listed once, lies below fresh, and has its memory.
 *        The magic is stored last when a zspage is made, and cleared first when it is freed. A migration
 *        changes a zspage by one store of one frame's number, after the copy. A frame that is listed nowhere,
 *        and is not the balloon's, is free.
 *   [R3] fresh and next_number are raised before the first use of what lies below them, and never lowered.
 *   [R4] A pageblock without flags holds no memory: a flag is set before its first frame is populated, and the
 *        last one goes after the hole was punched.
 * A killed process leaves what its threads have executed, in the order of each thread. So only the compiler
 * has to be kept from changing the order: by an atomic store, a call of another module, or order_stores().
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

/* ---- superblock: what an adoption needs to find the arrays, and what it can't rebuild ----- */
#define SUPERBLOCK_MAGIC 0x30736672616d7a7aull /* "zzmarfs0", little endian */
#define LAYOUT_VERSION 3
/* Notes: bytes that the arena's user wants to find again. Each has two halves, one of which is valid; its
 * word says which one, and is the one store that replaces a note. */
#define NR_NOTES 2
#define NOTE_HALF (5ull << 20) /* bytes: four dictionaries of 1 MiB, and text */
/* What page migration has done since the arena was made; guarded by arena_t.migrate_lock. */
typedef struct {
	uint64_t runs;          /* compaction runs begun */
	uint64_t scanned;       /* frames looked at */
	uint64_t isolated;
	uint64_t migrated;
	uint64_t owner_gone;    /* freed by their owner after isolation */
	uint64_t unmovable;     /* ranges with a frame that no owner can move */
	uint64_t busy;          /* the page was locked, or its owner refused for now */
	uint64_t again;         /* -EAGAIN until the last pass */
	uint64_t refused;       /* any other error of the owner */
	uint64_t no_target;     /* no free frame to move to */
	uint64_t put_back;
	uint64_t blocks_freed;  /* pageblocks emptied by compaction */
	uint64_t deferred;      /* pageblocks passed by because they failed lately */
	uint64_t ns;            /* time in compaction runs */
} migrate_stats_t;

#define USER_RECORD 1024       /* bytes for small values that the arena's user changes in place */
typedef struct {
	uint64_t magic;           /* stored last when the file is made */
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
	uint64_t note_off;        /* char[NR_NOTES][2][NOTE_HALF] */
	uint64_t note[NR_NOTES];  /* length in bytes << 1 | valid half; 0: empty */
	/* [R3] guarded by arena_t.lock */
	uint32_t fresh;           /* pageblocks from here on were never used */
	uint32_t described;       /* the descriptors of pageblocks below this have their memory */
	/* [R3] guarded by pool_t.number_lock */
	uint32_t next_number;     /* zspage numbers from here on were never used */
	uint32_t numbers_described; /* zspage descriptors below this have their memory */
	/* since creation; guarded by arena_t.lock */
	uint64_t bytes_returned;
	uint64_t punch_errors;    /* pageblocks that the OS did not take back */
	/* atomic */
	uint64_t refused;         /* times that the OS refused memory */
	uint64_t reserve_misses;  /* allocations that found the reserve empty */
	uint64_t max_pages;       /* pool pages: their peak */
	uint64_t limit_pages;     /* 0 = none */
	uint64_t pages_compacted; /* pool pages freed by object compaction */
	uint64_t balloon_target;  /* pages that the balloon shall hold */
	migrate_stats_t migration;
	uint64_t reserved[89];    /* 0 */
	uint64_t user_record[USER_RECORD / 8];
} superblock_t;
_Static_assert(sizeof(superblock_t) <= FRAME_SIZE, "the superblock is one page");
_Static_assert(offsetof(superblock_t, note_off) == 80 && offsetof(superblock_t, fresh) == 104 &&
	       offsetof(superblock_t, bytes_returned) == 120 && offsetof(superblock_t, user_record) == 1008,
	       "the superblock is read by another build: see LAYOUT_VERSION");

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
_Static_assert(offsetof(page_desc_t, flags) == 0 && offsetof(page_desc_t, owner) == 3,
	       "what is persistent is read by another build: see LAYOUT_VERSION");

#define OWNER_NONE 0
#define OWNER_ZSMALLOC 1
#define OWNER_BALLOON 2
#define NR_OWNERS 3

/* ---- pageblock descriptor: guarded by the arena lock ----------------------------------- */
#define PB_IN_USE 0x01u   /* has frames handed out, or free ones that are still resident */
#define PB_ISOLATED 0x02u /* being emptied: its free blocks stand in lists of their own */
#define PB_HELD 0x04u     /* whole and free, and holds memory all the same: see [R4] */
typedef struct {
	uint16_t nr_free;     /* free frames inside */
	uint16_t flags;
	uint16_t skip;        /* compaction runs that still pass it by after a failure */
	uint16_t defer;       /* skip of the last failure: doubles up to 64, 0 after a success */
	uint32_t next;        /* list of whole free pageblocks that were in use before */
	uint32_t ready;       /* bit k: unit k (frames 16 k to 16 k + 15) has its memory; see [A6] */
} pageblock_desc_t;
_Static_assert(sizeof(pageblock_desc_t) == 16, "16 bytes a pageblock");
_Static_assert(offsetof(pageblock_desc_t, flags) == 2, "what is persistent is read by another build");

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
_Static_assert(offsetof(zspage_desc_t, frames) == 0 && offsetof(zspage_desc_t, magic) == 44 &&
	       offsetof(zspage_desc_t, class_idx) == 46 && offsetof(zspage_desc_t, huge_header) == 56,
	       "what is persistent is read by another build: see LAYOUT_VERSION");

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
