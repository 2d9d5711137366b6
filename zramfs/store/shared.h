/* SPDX-License-Identifier: Apache-2.0
 *
 * Shared objects: pages with equal contents are one object in the pool. A cell stands between them and it, so
 * that the object can move: object compaction changes one word, however many slots share.
 *
 *   slots                               cell 7                                    pool
 *   +--------+-------+------+           +--------------------+-------+-+--+--+    +-------------------+
 *   | cell 7 | check | prio |--\        | location           | users |0|US|LK|--->| tag of cell 7 ... |
 *   +--------+-------+------+   \       +--------------------+-------+-+--+--+    +-------------------+
 *   +--------+-------+------+    +----->63                 24 23    8   1  0
 *   | cell 7 | check | prio |---/
 *   +--------+-------+------+
 *   63     24 23   10     4
 *
 * The cells are an array in the user region of the memory file (record.h), as many as the device can have slots.
 * Each one in use has a slot of its own that names it. So there is a free one whenever two pages that do not share
 * yet turn out to be equal. Persistent of a cell is the location alone, and whether it is used:
 *   US     used: the word names a whole object. A cell that is free is 0.
 *   users  slots of type SHARED that name the cell, and one more while a sharing holds it. Rebuilt from the slots.
 *   LK     the lock
 * prio is the priority of the algorithm that has compressed the object, the same in all its slots. An object of a
 * whole page is raw. check is a sum of the slot's number, the cell and prio. For an object of its own the tag is
 * proof that a slot names the right one. An object that many slots share can't have all of them in its tag. So a
 * slot whose cell has changed by itself shows that by its check, but for one of 16384.
 *
 * Sums that hold at rest (zramfs/store/check.pyx):
 *   [H1] each cell that is not 0 <-> one object, tagged with the cell
 *   [H2] users = the slots that name the cell, at least one
 *   [H3] objects, pages and bytes of shared_t are the sums over all cells
 */
#ifndef ZRAMFS_SHARED_H
#define ZRAMFS_SHARED_H

#include <stdint.h>

#define CELL_LOCK 1ull
#define CELL_USED 2ull
#define CELL_USERS_SHIFT 8
#define CELL_MOST_USERS 0xffffull
#define CELL_LOC_SHIFT 24

/* Tags of shared objects (48 bits). The number of a slot or a cell has at most 36. A unit's has bit 47. */
#define SHARED_TAG (1ull << 46)

/* 14 bits. */
static inline uint64_t shared_check(uint64_t slot, uint64_t cell, uint32_t prio)
{
	uint64_t h = (slot + 1) * 0x9e3779b97f4a7c15ull ^ (cell << 2 | prio);
	h ^= h >> 29;
	return h * 0xbf58476d1ce4e5b9ull >> 50;
}

#endif
