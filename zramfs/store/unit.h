/* SPDX-License-Identifier: Apache-2.0
 *
 * A unit: up to 16 neighbouring pages compressed as one. The pages are those of a group: 16 slots whose first
 * one has a multiple of 16 as its number. A group has at most one unit.
 *
 *   slots of a group            word of the group              objects in the pool
 *   +------+------+-  -+------+  +-----------------+----+--+--+   +------------------------------------+
 *   | UNIT | OBJ  | .. | UNIT |  | location of the |live|MK|LK|-->| unit_head_t | part[..] | the rest  |
 *   +------+------+-  -+------+  | head            |    |  |  |   +------------------|-----------------+
 *     0      1           15      +-----------------+----+--+--+        +-------------+---------+
 *                                 63             24 23  8 1  0         v             v
 *                                                                  +--------+    +--------+  pages of the
 *                                                                  | 4 KiB  |    | 4 KiB  |  stream, in order
 *                                                                  +--------+    +--------+
 *
 * The words are an array in the user region of the memory file (record.h). Persistent of a word is the location
 * alone: 0 without a slot of type UNIT in the group, else that of a whole head, whose parts are whole. One store
 * replaces a unit by another that has the same bytes for each page which is in use.
 *   live   bit k: slot k of the group has the type UNIT. Rebuilt from the slots.
 *   MK     bit 1: the unit is being made: it stays, even if no slot has the type UNIT
 *   LK     bit 0: the lock
 * Bits 2 to 7 are marks of upkeep (unit_making.pyx), which are cleared when a page joins or leaves: TRIED, the
 * pages that are left take no less memory by themselves; WORN, a pass has seen dead places; and bits 4 to 7, the
 * way in which that was tried, 0 = with less effort than that of units_t.way.
 * The stream is what zramfs/codecs/stream.pxd makes of the members' pages, one behind the other, with the
 * dictionary of the secondary algorithm `prio`.
 */
#ifndef ZRAMFS_UNIT_H
#define ZRAMFS_UNIT_H

#include <stddef.h>
#include <stdint.h>

#define UNIT_SHIFT_PAGES 4
#define UNIT_PAGES 16
#define UNIT_MAGIC 0x7502 /* the low byte is the version */
#define UNIT_MAGIC_PLAIN 0x7501 /* without dictionary and level: `size` had 32 bits, the upper ones were 0 */

typedef struct {
	uint16_t magic;
	uint16_t members;  /* bit k: the page of slot k is in the stream */
	uint16_t size;     /* bytes of the stream */
	uint8_t prio;      /* 0: without a dictionary */
	int8_t level;      /* of zstd; 0: not known */
	uint64_t serial;   /* a number that no other unit of this memory file has had */
} unit_head_t;
_Static_assert(sizeof(unit_head_t) == 16 && offsetof(unit_head_t, members) == 2 &&
	       offsetof(unit_head_t, size) == 4 && offsetof(unit_head_t, prio) == 6 &&
	       offsetof(unit_head_t, level) == 7 && offsetof(unit_head_t, serial) == 8,
	       "the head is read by another build: see UNIT_MAGIC");
/* Behind it: the locations of the parts, 8 bytes each, and the rest of the stream. */

/* On the backing store (back_units.pxd) this head stands before the stream. Its slots have the priority. */
#define BACK_UNIT_MAGIC 0x7511 /* the low byte is the version */

typedef struct {
	uint64_t sum;      /* of the rest of the head and of the stream: back_sum() with the head's tag as slot */
	uint16_t magic;
	uint16_t members;
	uint32_t size;     /* bytes of the stream */
} back_unit_t;
_Static_assert(sizeof(back_unit_t) == 16 && offsetof(back_unit_t, magic) == 8 &&
	       offsetof(back_unit_t, members) == 10 && offsetof(back_unit_t, size) == 12,
	       "the head is read by another build: see BACK_UNIT_MAGIC");

/* Tags of a unit's objects (48 bits). The number of a slot has at most 36.
 *   47   46            37 36      32 31                0
 *   +---+----------------+----------+------------------+
 *   | 1 | 0              | 0 = head,| group            |
 *   |   |                | k = part |                  |
 *   +---+----------------+----------+------------------+ */
#define UNIT_TAG (1ull << 47)
#define UNIT_TAG_PART 32
#define UNIT_TAG_GROUP 0xffffffffull

#endif
