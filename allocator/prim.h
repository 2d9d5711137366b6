/* SPDX-License-Identifier: Apache-2.0
 *
 * What Cython has no words for: atomic operations, short waits, the clock, memory that is made
 * resident, and address space.
 *
 * All atomic operations are builtins of the C11 memory model, which the thread sanitizer
 * understands. load and store order what comes after and before them; peek, add and sub order
 * nothing; cas and swap do both.
 */
#ifndef ZRAMFS_PRIM_H
#define ZRAMFS_PRIM_H

#include <errno.h>
#include <stdint.h>
#include <stdbool.h>
#include <string.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <time.h>

#define PAGE_BYTES ((size_t)4096)

/* For n up to 2^64 - to. */
static inline uint64_t round_up(uint64_t n, uint64_t to) { return (n + to - 1) / to * to; }

static inline uint64_t load64(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void store64(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline uint64_t add64(uint64_t *p, uint64_t v) { return __atomic_add_fetch(p, v, __ATOMIC_RELAXED); }
static inline uint64_t sub64(uint64_t *p, uint64_t v) { return __atomic_sub_fetch(p, v, __ATOMIC_RELAXED); }
static inline uint64_t peek64(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
static inline bool cas64(uint64_t *p, uint64_t old, uint64_t v)
{
	return __atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}
static inline uint64_t swap64(uint64_t *p, uint64_t v) { return __atomic_exchange_n(p, v, __ATOMIC_ACQ_REL); }

static inline uint32_t load32(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void store32(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline uint32_t add32(uint32_t *p, uint32_t v) { return __atomic_add_fetch(p, v, __ATOMIC_ACQ_REL); }
static inline uint32_t sub32(uint32_t *p, uint32_t v) { return __atomic_sub_fetch(p, v, __ATOMIC_ACQ_REL); }
static inline uint32_t swap32(uint32_t *p, uint32_t v) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }
static inline bool cas32(uint32_t *p, uint32_t old, uint32_t v)
{
	return __atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}
static inline bool cas_i32(int32_t *p, int32_t old, int32_t v)
{
	return __atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}
static inline int32_t load_i32(const int32_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void store_i32(int32_t *p, int32_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline int32_t sub_i32(int32_t *p, int32_t v) { return __atomic_sub_fetch(p, v, __ATOMIC_RELEASE); }

static inline uint8_t load8(const uint8_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void store8(uint8_t *p, uint8_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline uint16_t load16(const uint16_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void store16(uint16_t *p, uint16_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline void set_bits16(uint16_t *p, uint16_t v) { __atomic_fetch_or(p, v, __ATOMIC_ACQ_REL); }
static inline void clear_bits16(uint16_t *p, uint16_t v) { __atomic_fetch_and(p, (uint16_t)~v, __ATOMIC_ACQ_REL); }
static inline void set_bits64(uint64_t *p, uint64_t v) { __atomic_fetch_or(p, v, __ATOMIC_ACQ_REL); }
static inline bool cas16(uint16_t *p, uint16_t old, uint16_t v)
{
	return __atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}

/* Keeps the compiler from moving a store across this place. A process that is killed leaves what each of its
 * threads has executed, so what the processor reorders is of no concern. */
static inline void order_stores(void) { __atomic_signal_fence(__ATOMIC_SEQ_CST); }

/* Raises *p to at least v. */
static inline void max64(uint64_t *p, uint64_t v)
{
	uint64_t old = __atomic_load_n(p, __ATOMIC_RELAXED);
	while (old < v && !__atomic_compare_exchange_n(p, &old, v, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
		;
}

static inline uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

/* The first lines of an object, fetched at once: its header is read next, and what the processor fetches
 * ahead by itself begins only some lines later. Random 4 KiB reads at depth 16 take 7 % less CPU with it,
 * and 10 % more of them are done. */
static inline void fetch_object(const void *p)
{
	for (unsigned off = 0; off < 512; off += 64)
		__builtin_prefetch((const char *)p + off);
}

static inline void fetch_line(const void *p) { __builtin_prefetch(p); }

/* One round of waiting for a lock that is held for a few microseconds. The holder may have been
 * preempted, so after 64 pauses (about 2 us) the CPU is given away, and after 256 rounds the
 * waiter sleeps 50 us a time, which costs nothing while a stopped holder is stopped. */
static inline void relax(unsigned round)
{
	if (round < 64) {
#if defined(__x86_64__) || defined(__i386__)
		__builtin_ia32_pause();
#elif defined(__aarch64__)
		__asm__ __volatile__("yield");
#endif
	} else if (round < 256) {
		sched_yield();
	} else {
		struct timespec t = {0, 50000};
		nanosleep(&t, NULL);
	}
}

/* A mutex for holds of well under a microsecond: a thread that waits for it spins a little before it
 * sleeps. Two threads that write pages of one size class slept and woke each other twice for each MiB
 * without that. */
static inline void short_mutex_init(pthread_mutex_t *m)
{
	pthread_mutexattr_t attr;
	pthread_mutexattr_init(&attr);
#ifdef __GLIBC__ /* musl's mutexes spin by themselves */
	pthread_mutexattr_settype(&attr, PTHREAD_MUTEX_ADAPTIVE_NP);
#endif
	pthread_mutex_init(m, &attr);
	pthread_mutexattr_destroy(&attr);
}

/* Makes every page of a range resident and writable, and changes nothing: adding 0 is a write that
 * cannot undo another thread's. For memory that is no file's; see try_populate() for a memory file. */
static inline void make_resident(void *start, size_t n)
{
	uintptr_t at = (uintptr_t)start, end = at + n;
	for (; at < end; at = at / PAGE_BYTES * PAGE_BYTES + PAGE_BYTES)
		__atomic_fetch_add((unsigned char *)at, 0, __ATOMIC_RELAXED);
}

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14, which libc's headers may not know */
#endif

/* Makes every page of a shared mapping's range resident and writable, as make_resident() does, but by
 * a call that can fail: 0, or -ENOMEM when the kernel refuses a page. A touch would be answered with
 * SIGBUS then. Pages that the call came to before that stay resident. It waits for memory as long as
 * the kernel does, and holds the process's map of memory for reading meanwhile.
 * 512 pages: 1.44 ms, against 1.73 ms for 512 touches and 1.52 ms for fallocate(2) and the touches
 * that follow it, which also holds the file's lock. */
static inline int try_populate(void *start, size_t n)
{
	uintptr_t first = (uintptr_t)start / PAGE_BYTES * PAGE_BYTES;
	uintptr_t end = round_up((uintptr_t)start + n, PAGE_BYTES);
	return madvise((void *)first, end - first, MADV_POPULATE_WRITE) == 0 ? 0 : -ENOMEM;
}

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

/* Page tables for a shared mapping's range that holds memory. 0, or -ENOMEM when the kernel refuses it. A range
 * that lies behind the end of the file by now is no error. */
static inline int try_map(void *start, size_t n)
{
	return madvise(start, n, MADV_POPULATE_READ) == 0 || errno != ENOMEM ? 0 : -ENOMEM;
}

/* n bytes of address space that take memory only where they are touched: private ones, filled with 0,
 * or with fd >= 0 those of a file, shared. NULL when there are none. Ended by munmap(). */
static inline void *map_sparse(size_t n, int fd)
{
	int kind = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
	void *p = mmap(NULL, n, PROT_READ | PROT_WRITE, kind | MAP_NORESERVE, fd, 0);
	return p == MAP_FAILED ? NULL : p;
}

/* n bytes of address space that nobody can use, and that count as no memory, until try_open_space() opens a
 * part of them. NULL when there are none. Ended by munmap(). */
static inline void *reserve_space(size_t n)
{
	void *p = mmap(NULL, n, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	return p == MAP_FAILED ? NULL : p;
}

/* Makes the first n bytes of such space usable, as those of map_sparse() are: 0, or -ENOMEM when the system
 * refuses (RLIMIT_DATA, strict overcommit). What was open before stays as it is, and may be in use. */
static inline int try_open_space(void *space, size_t n)
{
	return mprotect(space, round_up(n, PAGE_BYTES), PROT_READ | PROT_WRITE) == 0 ? 0 : -ENOMEM;
}

/* Makes 64 KiB of the calling thread's stack resident, far more than anything in the core uses: a
 * page of it that came into being under a lock would keep the lock's other users waiting for memory. */
static __attribute__((noinline, unused)) void ready_stack(void)
{
	volatile unsigned char stack[64 * 1024];
	for (size_t i = 0; i < sizeof(stack); i += PAGE_BYTES)
		stack[i] = 0;
}

#endif
