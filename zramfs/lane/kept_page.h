/* SPDX-License-Identifier: Apache-2.0
 * What outlives a daemon beside its memory file: the requests in hand, and what the lane must know of a
 * connection that a predecessor has opened. A memfd of KEPT_BYTES that the keeper, the daemon and its
 * standby have mapped. The keeper reads and writes only the first part, while no daemon serves or with
 * atomics. The rest belongs to the lane. */
#ifndef ZRAMFS_KEPT_PAGE_H
#define ZRAMFS_KEPT_PAGE_H

#include <stddef.h>
#include <stdint.h>

#define KEPT_MAGIC	0x31657061676b657aULL	/* "zekpage1" */
#define KEPT_BYTES	20480
#define KEPT_HANDS	68			/* lane threads at most, and slow threads */
#define KEPT_REFUSED	32
#define KEPT_OPENS	1024
#define FUSE_RESENT	(1ULL << 63)		/* in the unique number of a request that comes again */

/* One thread of the lane. unique: of the request that it works on, without FUSE_RESENT; 0 = none.
 * waits: 1 while it may wait for the backing store. A cache line, written for each request. */
struct kept_hand {
	uint64_t unique, waits, unused[6];
};

/* A request that was in hand when a daemon died by its own fault, this many times in a row. */
struct kept_suspect {
	uint64_t unique, deaths;
};

struct kept_page {
	uint64_t magic;
	uint64_t refused_count;			/* requests so far that are answered EIO, unread */
	uint64_t unused[6];
	struct kept_hand hands[KEPT_HANDS];
	struct kept_suspect suspects[KEPT_HANDS];
	uint64_t refused[KEPT_REFUSED];		/* the latest of them, a ring */

	/* Of the lane; all are read and written with atomics. */
	uint64_t minor, flags;			/* agreed on with the kernel at INIT; minor 0 = before it */
	uint64_t mode, uid, gid;		/* attributes of the file */
	uint64_t atime, mtime, ctime;		/* ns since 1970, as int64 */
	uint64_t more_opens;			/* open files that have no place below */
	uint64_t opens[KEPT_OPENS];		/* by handle: the OPEN request of an open file; 0 = free */
};

_Static_assert(sizeof(struct kept_hand) == 64, "a cache line");
_Static_assert(sizeof(struct kept_page) <= KEPT_BYTES, "the page has room");

#endif
