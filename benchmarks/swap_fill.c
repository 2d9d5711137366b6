/* SPDX-License-Identifier: Apache-2.0
 * Fills memory with a known pattern and verifies it, over and over.
 *
 *   swap_fill MIB PASSES [random] [WORDS]
 *
 * Of the pages a third is incompressible, a third half random, a third one repeated word; with WORDS, 2 to
 * 512, the first have so many random words of 8 bytes, the second half as many. Writes all
 * pages, and verifies them in order PASSES times; with PASSES 0 again and again until stdin ends, each time
 * with new content. With `random` a pass also verifies a quarter of them in a random order. After each
 * pass a line: its number, and seconds for writing, verifying, verifying at random. A wrong byte ends it
 * with 1 and its place. */
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define PAGE 4096u

static uint64_t mix(uint64_t x)
{
	x ^= x >> 30;
	x *= 0xbf58476d1ce4e5b9ull;
	x ^= x >> 27;
	x *= 0x94d049bb133111ebull;
	return x ^ x >> 31;
}

static unsigned words = 512;

static void pattern(uint64_t *page, uint64_t number, uint64_t content)
{
	uint64_t seed = mix(number * 1000003 + content);
	unsigned random_words = number % 3 == 0 ? words : number % 3 == 1 ? words / 2 : 0;
	for (unsigned i = 0; i < random_words; i++)
		page[i] = seed = seed * 6364136223846793005ull + 1442695040888963407ull;
	for (unsigned i = random_words; i < 512; i++)
		page[i] = seed;
}

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void verify(const unsigned char *memory, uint64_t number, uint64_t content)
{
	static uint64_t expected[512];
	pattern(expected, number, content);
	if (memcmp(memory + number * PAGE, expected, PAGE) != 0) {
		printf("page %llu of content %llu is wrong\n", (unsigned long long)number,
		       (unsigned long long)content);
		exit(1);
	}
}

int main(int argc, char **argv)
{
	uint64_t pages = argc > 2 ? strtoull(argv[1], NULL, 10) * 256 : 0;
	uint64_t passes = argc > 2 ? strtoull(argv[2], NULL, 10) : 0;
	unsigned char *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct pollfd input = {0, POLLIN, 0};
	int in_random = argc > 3 && strcmp(argv[3], "random") == 0;
	if (argc > 3 + in_random)
		words = (unsigned)atoi(argv[3 + in_random]);
	if (pages == 0 || memory == MAP_FAILED || words < 2 || words > 512)
		return 2;
	for (uint64_t pass = 1; passes ? pass <= passes : poll(&input, 1, 0) == 0; pass++) {
		double start = now(), written, verified;
		uint64_t content = passes ? 1 : pass;
		for (uint64_t i = 0; i < pages && content == pass; i++)
			pattern((uint64_t *)(memory + i * PAGE), i, content);
		written = now();
		for (uint64_t i = 0; i < pages; i++)
			verify(memory, i, content);
		verified = now();
		if (in_random)
			for (uint64_t i = 0; i < pages / 4; i++)
				verify(memory, mix(i + pass) % pages, content);
		printf("%llu %.3f %.3f %.3f\n", (unsigned long long)pass, written - start, verified - written,
		       now() - verified);
		fflush(stdout);
	}
	return 0;
}
