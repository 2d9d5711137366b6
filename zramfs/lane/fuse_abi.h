/* SPDX-License-Identifier: Apache-2.0
 * The kernel's FUSE protocol, plus what is newer than the oldest <linux/fuse.h> this builds on
 * (7.31, Debian 11; Debian 12 has 7.38). Values are kernel ABI and never change. */
#ifndef ZRAMFS_FUSE_ABI_H
#define ZRAMFS_FUSE_ABI_H

#include <stddef.h>
#include <stdint.h>
#include <linux/fuse.h>
#include <linux/falloc.h>

#ifndef FUSE_INIT_EXT			/* 7.36: flags2 carries bits 32 to 63 */
#define FUSE_INIT_EXT			(1 << 30)
#endif
#ifndef FOPEN_PARALLEL_DIRECT_WRITES	/* 7.38 */
#define FOPEN_PARALLEL_DIRECT_WRITES	(1 << 6)
#endif
#ifndef FUSE_DIRECT_IO_ALLOW_MMAP	/* 7.39, first called FUSE_DIRECT_IO_RELAX */
#define FUSE_DIRECT_IO_ALLOW_MMAP	(1ULL << 36)
#endif
#ifndef FUSE_HAS_RESEND			/* 7.40 */
#define FUSE_HAS_RESEND			(1ULL << 39)
#define FUSE_NOTIFY_RESEND		7
#endif

/* The minor version answered to INIT: the last one whose changes the lane knows. */
#define ZRAMFS_FUSE_MINOR		40
/* Before 7.23 the INIT reply is shorter and FALLOCATE, LSEEK and large writes are missing. */
#define ZRAMFS_FUSE_MINOR_MIN		23

/* Heads of fuse_init_in and fuse_init_out as of 7.36: older headers end before flags2, and older
 * kernels send only the first 16 bytes. */
struct zramfs_init_in {
	uint32_t major, minor, max_readahead, flags, flags2, unused[11];
};
struct zramfs_init_out {
	uint32_t major, minor, max_readahead, flags;
	uint16_t max_background, congestion_threshold;
	uint32_t max_write, time_gran;
	uint16_t max_pages, map_alignment;
	uint32_t flags2, unused[7];
};

_Static_assert(sizeof(struct fuse_in_header) == 40, "request header");
_Static_assert(sizeof(struct fuse_out_header) == 16, "reply header");
_Static_assert(sizeof(struct fuse_write_in) == 40, "a write's payload starts at byte 80");
_Static_assert(sizeof(struct zramfs_init_out) == 64, "INIT reply since 7.23");
_Static_assert(offsetof(struct zramfs_init_in, flags2) == 16, "INIT request before 7.36");

#endif
