/* SPDX-License-Identifier: Apache-2.0
 * What the keeper makes of the requests in hand: which one is stuck, and which one ends every daemon. */
#ifndef ZRAMFS_KEEPER_HANDS_H
#define ZRAMFS_KEEPER_HANDS_H

#include <stdbool.h>
#include <string.h>

#include "../lane/kept_page.h"

enum { BLAMED = 3 };	/* deaths in a row with a request in hand, and it is refused */

struct hand_watch {
	uint64_t last[KEPT_HANDS];
	unsigned int same[KEPT_HANDS];
};

/* For how many looks in a row the same request has been in hand, the longest one. A request that may wait for
 * the backing store does not count. */
static unsigned int watch_hands(struct hand_watch *w, struct kept_page *page)
{
	unsigned int longest = 0;
	for (int i = 0; i < KEPT_HANDS; i++) {
		uint64_t unique = __atomic_load_n(&page->hands[i].unique, __ATOMIC_RELAXED);
		bool waits = __atomic_load_n(&page->hands[i].waits, __ATOMIC_RELAXED);
		w->same[i] = unique && !waits && unique == w->last[i] ? w->same[i] + 1 : 0;
		w->last[i] = unique;
		if (w->same[i] > longest)
			longest = w->same[i];
	}
	return longest;
}

static uint64_t deaths_with(const struct kept_page *page, uint64_t unique)
{
	for (int i = 0; i < KEPT_HANDS; i++)
		if (page->suspects[i].unique == unique)
			return page->suspects[i].deaths;
	return 0;
}

/* The daemon is dead; clears what it had in hand. by_itself: not by a SIGKILL from elsewhere, which says
 * nothing about a request. Returns how many requests are refused from here on. */
static unsigned int blame_hands(struct kept_page *page, bool by_itself)
{
	struct kept_suspect found[KEPT_HANDS];
	unsigned int n = 0, refused = 0;
	for (int i = 0; i < KEPT_HANDS; i++) {
		uint64_t unique = page->hands[i].unique;
		page->hands[i].unique = page->hands[i].waits = 0;
		if (!unique || !by_itself)
			continue;
		found[n].unique = unique;
		found[n].deaths = 1 + deaths_with(page, unique);
		if (found[n].deaths < BLAMED) {
			n++;
			continue;
		}
		page->refused[page->refused_count % KEPT_REFUSED] = unique;
		page->refused_count++;
		refused++;
	}
	if (by_itself) {
		memset(page->suspects, 0, sizeof(page->suspects));
		memcpy(page->suspects, found, n * sizeof(found[0]));
	}
	return refused;
}

#endif
