/* SPDX-License-Identifier: Apache-2.0
 * One page of a device: whether it is the same everywhere, how such a page is made, a sum of its bytes, and the
 * clock of its access times. */
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

/* A sum to find equal bytes by; not one that proves anything. Four lanes, so that the multiplications do not wait
 * for each other. */
static inline void sum_block(uint64_t lane[4], const unsigned char *p)
{
	for (unsigned k = 0; k < 4; k++) {
		uint64_t word;
		memcpy(&word, p + 8 * k, 8);
		lane[k] = (lane[k] ^ word) * 0x9fb21c651e98df25ull;
		lane[k] ^= lane[k] >> 31;
	}
}

static inline uint64_t bytes_sum(const unsigned char *p, uint32_t n, uint64_t seed)
{
	uint64_t lane[4] = {seed, seed ^ 0x9e3779b97f4a7c15ull, seed ^ 0xbf58476d1ce4e5b9ull,
			    seed ^ 0x94d049bb133111ebull};
	uint32_t i;
	for (i = 0; i + 32 <= n; i += 32)
		sum_block(lane, p + i);
	if (i < n) {
		/* The length as well, so that zeros at the end count. */
		unsigned char rest[32] = {0};
		memcpy(rest, p + i, n - i);
		lane[0] ^= n;
		sum_block(lane, rest);
	}
	uint64_t h = lane[0];
	for (unsigned k = 1; k < 4; k++)
		h = ((h << 23 | h >> 41) ^ lane[k]) * 0x9e3779b97f4a7c15ull;
	return h ^ h >> 32;
}

static inline uint64_t page_sum(const unsigned char *page, uint64_t seed)
{
	return bytes_sum(page, PAGE_BYTES, seed);
}

static inline void fill_words(unsigned char *page, uint64_t word)
{
	for (unsigned i = 0; i < PAGE_BYTES / 8; i++)
		memcpy(page + 8 * i, &word, 8);
}

#endif
