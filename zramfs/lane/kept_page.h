/* SPDX-License-Identifier: Apache-2.0
 * What outlives a daemon beside its memory file: the requests in hand, and what the lane must know of a
 * connection that a predecessor has opened. A memory file of KEPT_BYTES. The keeper has the head mapped, reads
 * the hands, and counts own_ends while no daemon serves. All else belongs to the lane. */
#ifndef ZRAMFS_KEPT_PAGE_H
#define ZRAMFS_KEPT_PAGE_H

#include <stddef.h>
#include <stdint.h>

#define KEPT_MAGIC	0x31657061676b657aULL	/* "zekpage1" */
#define KEPT_VERSION	1			/* the last character of the magic */
#define KEPT_HEAD	8192			/* the keeper maps only this much */
#define KEPT_BYTES	69632
#define KEPT_HANDS	68			/* lane threads at most, and slow threads */
#define KEPT_REFUSED	32
#define KEPT_OPENS	1024
#define KEPT_GROUPS	3			/* reads, writes, discards */
#define KEPT_BUCKETS	26			/* of latency: worker.pxd */
#define FUSE_RESENT	(1ULL << 63)		/* in the unique number of a request that comes again */

/* One thread of the lane. unique: of the request that it works on, without FUSE_RESENT; 0 = none.
 * waits: 1 while it may wait for the backing store. steps: moves on while a long request does. A cache line,
 * written for each request. */
struct kept_hand {
	uint64_t unique, waits, steps, unused[5];
};

/* A request that was in hand when a daemon died by its own fault, this many times in a row. */
struct kept_suspect {
	uint64_t unique, deaths;
};

/* What one thread has counted, and goes on counting in the next daemon. Only the thread itself writes. */
struct kept_counts {
	uint64_t ios[KEPT_GROUPS][KEPT_BUCKETS];	/* requests by the time they took */
	uint64_t nbytes[KEPT_GROUPS];
	uint64_t ns[KEPT_GROUPS];
	uint64_t longest_ns;
	uint64_t protocol_errors;
	uint64_t reply_errors;			/* replies that the kernel refused for an unexpected reason */
	uint64_t refused_sizes;			/* truncations to more than the device's size, */
	uint64_t busy_truncations;		/* and to 0 while others had it open */
	uint64_t helped;			/* pieces done of other threads' requests */
	uint64_t unused[6];
};

struct kept_page {
	uint64_t magic;
	uint64_t refused_count;			/* requests so far that are answered EIO, unread */
	uint64_t own_ends;			/* ends of daemons so far, but for a SIGKILL from elsewhere */
	uint64_t own_ends_seen;			/* by the lane */
	uint64_t unused[4];
	struct kept_hand hands[KEPT_HANDS];

	/* Of the lane. */
	struct kept_suspect suspects[KEPT_HANDS];
	uint64_t refused[KEPT_REFUSED];		/* the latest of them, a ring */

	/* All are read and written with atomics. */
	uint64_t minor, flags;			/* agreed on with the kernel at INIT; minor 0 = before it */
	uint64_t mode, uid, gid;		/* attributes of the file */
	uint64_t atime, mtime, ctime;		/* ns since 1970, as int64 */
	uint64_t io_ns;				/* time with at least one request in flight */
	uint64_t more_opens;			/* open files that have no place below */
	uint64_t opens[KEPT_OPENS];		/* by handle: the OPEN request of an open file; 0 = free */
	uint64_t pad[6];
	struct kept_counts counts[KEPT_HANDS];	/* by hand */
};

_Static_assert(KEPT_MAGIC >> 56 == '0' + KEPT_VERSION, "one version");
_Static_assert(sizeof(struct kept_hand) == 64, "a cache line");
_Static_assert(offsetof(struct kept_page, suspects) <= KEPT_HEAD, "the keeper has all of its part");
_Static_assert(sizeof(struct kept_counts) == 12 * 64, "cache lines of one thread");
_Static_assert(offsetof(struct kept_page, counts) % 64 == 0, "cache lines of one thread");
_Static_assert(sizeof(struct kept_page) <= KEPT_BYTES, "the page has room");

#endif
