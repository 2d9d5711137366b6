/* SPDX-License-Identifier: Apache-2.0
 * What the keeper keeps for the next daemon, and what it sees in the shared page of that. */
#ifndef ZRAMFS_KEEPER_KEPT_H
#define ZRAMFS_KEEPER_KEPT_H

#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../lane/kept_page.h"
#include "messages.h"

enum { PAGE_AT = 1 };			/* of kept_page.h, among what is kept */

static int kept[KEPT], nr_kept;
static struct kept_page *page;
static uint64_t seen[KEPT_HANDS][2];	/* of each hand, at the last look */
static unsigned int same[KEPT_HANDS];	/* looks in a row that have found it so */

static void drop_kept(void)
{
	if (page)
		munmap(page, KEPT_HEAD);
	page = NULL;
	while (nr_kept)
		close(kept[--nr_kept]);
}

static void take_kept(const int *fds, int count)
{
	drop_kept();
	memcpy(kept, fds, (size_t)count * sizeof(int));
	nr_kept = count;
	/* Locked at once, by MCL_FUTURE. */
	page = mmap(NULL, KEPT_HEAD, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
		    count > PAGE_AT ? kept[PAGE_AT] : -1, 0);
	if (page == MAP_FAILED)
		page = NULL;
}

/* For how many looks in a row the same hand has had the same request and moved nothing in it, the longest
 * one. One that may wait for the backing store does not count. */
static unsigned int look_at_hands(void)
{
	unsigned int longest = 0;
	for (int i = 0; i < KEPT_HANDS; i++) {
		uint64_t unique = __atomic_load_n(&page->hands[i].unique, __ATOMIC_RELAXED);
		uint64_t steps = __atomic_load_n(&page->hands[i].steps, __ATOMIC_RELAXED);
		bool waits = __atomic_load_n(&page->hands[i].waits, __ATOMIC_RELAXED);
		same[i] = unique && !waits && unique == seen[i][0] && steps == seen[i][1] ? same[i] + 1 : 0;
		seen[i][0] = unique;
		seen[i][1] = steps;
		if (same[i] > longest)
			longest = same[i];
	}
	return longest;
}

static void forget_hands(void)
{
	memset(same, 0, sizeof(same));
}

#endif
