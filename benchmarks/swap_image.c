/* SPDX-License-Identifier: Apache-2.0
 * A program whose memory is an image, used as programs use theirs.
 *
 *   swap_image IMAGE MIB USES
 *
 * Reads MIB of the image into memory, says "filled", and waits for a line. Then uses pages at random: nine of
 * ten uses go to a fifth of the memory (runs of 8 pages), one to any page. A use reads the whole page and
 * verifies its sum. Every fourth writes: one word of the page gets the value of another, so that it stays of its
 * kind. After that it says "used", waits for a line, verifies all pages in order, and says "verified". Behind
 * each of these words stand the seconds that it took. A wrong page ends it with 1 and the number of the page. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096u
#define WORDS (PAGE / 8)
#define RUN 8u
#define STEP (1u << 20)

static uint64_t state = 12;

static uint64_t draw(void)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state;
}

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* The place counts, so that pages that changed places are found too. */
static uint64_t page_sum(const uint64_t *page)
{
	uint64_t sum = 0;
	for (unsigned i = 0; i < WORDS; i++)
		sum = (sum ^ page[i]) * 0x9e3779b97f4a7c15ull;
	return sum;
}

static void page_verify(const uint64_t *page, uint64_t sum, uint64_t number)
{
	if (page_sum(page) == sum)
		return;
	fprintf(stderr, "page %llu is not what was written\n", (unsigned long long)number);
	exit(1);
}

/* Each page is touched once, and not again before all others are there: what comes back from swap may keep its
 * place there. */
static void image_read(const char *name, uint64_t *memory, uint64_t *sums, uint64_t size)
{
	uint8_t *to = (uint8_t *)memory;
	int fd = open(name, O_RDONLY | O_CLOEXEC);
	if (fd < 0) {
		perror(name);
		exit(1);
	}
	for (uint64_t at = 0; at < size; at += STEP) {
		if (pread(fd, to + at, STEP, (off_t)at) != STEP) {
			fprintf(stderr, "%s is shorter than %llu bytes\n", name, (unsigned long long)size);
			exit(1);
		}
		for (uint64_t i = at / PAGE; i < (at + STEP) / PAGE; i++)
			sums[i] = page_sum(memory + i * WORDS);
		/* The page cache would take room in the cgroup. */
		posix_fadvise(fd, (off_t)at, STEP, POSIX_FADV_DONTNEED);
	}
	close(fd);
}

/* A program that nobody speaks to any more ends. */
static void line_wait(void)
{
	char line[8];
	if (!fgets(line, sizeof line, stdin))
		exit(1);
}

static void said(const char *word, double began)
{
	printf("%s %.3f\n", word, now() - began);
	fflush(stdout);
}

static void pages_use(uint64_t *memory, uint64_t *sums, uint64_t pages, uint64_t uses)
{
	uint64_t runs = pages / RUN, hot = runs / 5;
	for (uint64_t i = 0; i < uses; i++) {
		/* The hot runs lie apart: 5 k + something that depends on k. */
		uint64_t k = draw() % hot;
		uint64_t run = draw() % 10 ? 5 * k + k * 7919 % 5 : draw() % runs;
		uint64_t number = run * RUN + draw() % RUN;
		uint64_t *page = memory + number * WORDS;
		page_verify(page, sums[number], number);
		if (i % 4 == 0) {
			page[draw() % WORDS] = page[draw() % WORDS];
			sums[number] = page_sum(page);
		}
	}
}

int main(int argc, char **argv)
{
	uint64_t size, pages, uses;
	if (argc != 4 || atoi(argv[2]) < 1) {
		fprintf(stderr, "usage: swap_image IMAGE MIB USES\n");
		return 2;
	}
	size = strtoull(argv[2], NULL, 10) << 20;
	uses = strtoull(argv[3], NULL, 10);
	pages = size / PAGE;
	uint64_t *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t *sums = calloc(pages, sizeof *sums);
	if (memory == MAP_FAILED || !sums) {
		perror("memory");
		return 1;
	}
	/* Huge pages would come and go as a whole. */
	madvise(memory, size, MADV_NOHUGEPAGE);
	double began = now();
	image_read(argv[1], memory, sums, size);
	said("filled", began);
	line_wait();
	began = now();
	pages_use(memory, sums, pages, uses);
	said("used", began);
	line_wait();
	began = now();
	for (uint64_t i = 0; i < pages; i++)
		page_verify(memory + i * WORDS, sums[i], i);
	said("verified", began);
	return 0;
}
