/* SPDX-License-Identifier: Apache-2.0
 *
 * The record of a store: the small values of it that outlive the process, in superblock_t.user_record of the
 * memory file (allocator/layout.h). The file's user region has the slots, and behind them the access times, the
 * words of the units (unit.h) and the cells of shared objects (shared.h):
 *
 *   +------------------------+--------------------------+--------------------+-------------------+
 *   | slot table, 8 B a slot | access times, 4 B a slot | words, 8 B a group | cells, 8 B a slot |
 *   +------------------------+--------------------------+--------------------+-------------------+
 *   each has room for whole chunks of 512 slots that hold most_slots. The first ones are the device's
 *   (size). The words and the cells begin with a page of their own.
 *
 * Note 0 of the arena has the algorithms with their dictionaries (record.pyx), and is replaced when a store in use
 * takes another one or drops one (secondary.pxd). Note 1 is the device's.
 * Counters are atomic and relaxed: a killed process may have counted what it did not do any more, or not have
 * counted what it did, by one for each thread.
 */
#ifndef ZRAMFS_RECORD_H
#define ZRAMFS_RECORD_H

#include <stddef.h>
#include <stdint.h>

#include "layout.h"

#define RECORD_MAGIC 0x64726f6365727a7aull /* "zzrecord", little endian */
#define RECORD_VERSION 2
#define RECORD_OLDEST 1 /* that can be read: units have no dictionary, and all of them are in memory. A pass that
			 * makes units or writes pages back raises it. */

/* What no scan of the slots tells of a backing store (zramfs/store/backing.pxd). */
typedef struct {
	uint64_t key;           /* constant */
	uint64_t high;          /* blocks from here on were never taken; never lowered */
	uint64_t reads;         /* blocks read */
	uint64_t writes;        /* blocks written */
	uint64_t read_errors;   /* reads that failed or whose data was not what had been written */
	uint64_t write_errors;  /* writes that failed */
} backing_record_t;

typedef struct {
	uint64_t magic;         /* stored last when a store is made: then it can be adopted */
	uint32_t version;
	uint32_t wipe;          /* constant, as has_backing and most_slots */
	uint64_t size;          /* record_size() of the number of slots; recovery empties what lies behind them */
	uint64_t most_slots;    /* that the device may grow to */
	uint32_t has_backing;
	uint32_t atime_on;      /* whether access times are kept */
	uint32_t atime_since;   /* when that was switched on, in seconds since boot */
	uint32_t unused;        /* 0 */
	uint64_t huge_pages_since;
	uint64_t failed_reads;
	uint64_t failed_writes;
	uint64_t notify_free;
	uint64_t recoveries;    /* times that the store was adopted */
	uint64_t pages_lost;    /* by all of them */
	backing_record_t backing;
	uint64_t unit_serial;   /* units made since creation; atomic */
} store_record_t;
_Static_assert(sizeof(store_record_t) <= USER_RECORD, "the superblock has room for it");
_Static_assert(offsetof(store_record_t, size) == 16 && offsetof(store_record_t, huge_pages_since) == 48 &&
	       offsetof(store_record_t, backing) == 96 && offsetof(store_record_t, unit_serial) == 144 &&
	       sizeof(store_record_t) == 152,
	       "the record is read by another build: see RECORD_VERSION");

/* The number of slots, at most 2^36, in the low bits. The bits above are a check of it and of what is constant: a
 * size that has changed by itself would cost all pages behind it, and one store has to change both. */
#define SIZE_BITS 37

static inline uint64_t record_size(const store_record_t *record, uint64_t nr_slots)
{
	uint64_t words[] = {nr_slots, record->most_slots, (uint64_t)record->has_backing << 32 | record->wipe,
			    record->backing.key};
	uint64_t h = 0;
	for (unsigned i = 0; i < sizeof(words) / sizeof(words[0]); i++) {
		h = (h ^ words[i]) * 0x9e3779b97f4a7c15ull;
		h ^= h >> 32;
	}
	return nr_slots | h >> SIZE_BITS << SIZE_BITS;
}

/* 0 for a record that is damaged. */
static inline uint64_t record_slots(const store_record_t *record)
{
	uint64_t nr_slots = record->size & ((1ull << SIZE_BITS) - 1);
	return nr_slots <= record->most_slots && record->size == record_size(record, nr_slots) ? nr_slots : 0;
}

#endif
