/* SPDX-License-Identifier: Apache-2.0
 *
 * Every store into a memory file is a point at which the process could be killed: this stops at each.
 *
 * To be preloaded into a process with one thread that matters. points_begin() takes the right to write from the
 * file's mapping. Each store faults then. The handler tells the test about it and waits for its answer, while
 * the memory is as it was before the store. Then it lets that one instruction run (the trap flag of x86), and
 * takes the right away again. So the code under test is the one that is shipped, and no point is forgotten.
 *
 * A system call that writes into the mapping would fail: madvise(2) gets the right back for its duration. What
 * punches holes changes the memory too, and is no store: fallocate(2) is a point of its own.
 */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ucontext.h>
#include <unistd.h>

#define TRAP_FLAG 0x100

static char *base;
static size_t length;
static int to_test = -1, from_test = -1;
static volatile int armed;
static uint64_t last_at;        /* address of the last store */
static uint64_t frames_off;
static long points;

static void allow(int write) { mprotect(base, length, write ? PROT_READ | PROT_WRITE : PROT_READ); }

/* Of a copy into frames only the first store and each 61st are points: what it copies is not looked at before
 * the store that makes it count. */
static int in_a_row(uint64_t at)
{
	static long run;
	int next = at - last_at <= 64 && at >= (uint64_t)base + frames_off;
	last_at = at;
	run = next ? run + 1 : 0;
	return next && run % 61 != 0;
}

static void point(void)
{
	char c = 'p';
	points++;
	if (write(to_test, &c, 1) != 1 || read(from_test, &c, 1) != 1)
		_exit(99);
}

static void on_store(int number, siginfo_t *info, void *context)
{
	ucontext_t *u = context;
	char *at = info->si_addr;
	(void)number;
	if (!armed || at < base || at >= base + length) {
		signal(SIGSEGV, SIG_DFL);
		return;
	}
	if (!in_a_row((uint64_t)at))
		point();
	allow(1);
	u->uc_mcontext.gregs[REG_EFL] |= TRAP_FLAG;
}

static void on_step(int number, siginfo_t *info, void *context)
{
	ucontext_t *u = context;
	(void)number;
	(void)info;
	u->uc_mcontext.gregs[REG_EFL] &= ~TRAP_FLAG;
	if (armed)
		allow(0);
}

/* fd: the memory file, mapped once, whose frames begin at this offset. in, out: pipes to the test. 0, or -1 if
 * there is no such mapping. */
int points_begin(int fd, long frames, int in, int out)
{
	char line[512], name[64];
	char target[256];
	ssize_t n;
	FILE *maps = fopen("/proc/self/maps", "r");
	unsigned long first, last, low = 0, high = 0;
	struct sigaction store = {.sa_sigaction = on_store, .sa_flags = SA_SIGINFO | SA_NODEFER};
	struct sigaction step = {.sa_sigaction = on_step, .sa_flags = SA_SIGINFO | SA_NODEFER};
	snprintf(name, sizeof(name), "/proc/self/fd/%d", fd);
	n = readlink(name, target, sizeof(target) - 1);
	if (n < 0 || maps == NULL)
		return -1;
	target[n] = 0;
	while (fgets(line, sizeof(line), maps))
		if (strstr(line, target) && sscanf(line, "%lx-%lx", &first, &last) == 2) {
			if (low == 0)
				low = first;
			high = last;
		}
	fclose(maps);
	if (low == 0)
		return -1;
	base = (char *)low;
	length = high - low;
	frames_off = (uint64_t)frames;
	to_test = out;
	from_test = in;
	sigaction(SIGSEGV, &store, NULL);
	sigaction(SIGTRAP, &step, NULL);
	last_at = 0;
	points = 0;
	armed = 1;
	allow(0);
	return 0;
}

long points_end(void)
{
	armed = 0;
	allow(1);
	signal(SIGSEGV, SIG_DFL);
	return points;
}

int madvise(void *at, size_t n, int advice)
{
	static int (*real)(void *, size_t, int);
	int r, error;
	if (!real)
		real = (int (*)(void *, size_t, int))dlsym(RTLD_NEXT, "madvise");
	if (armed)
		allow(1);
	r = real(at, n, advice);
	error = errno;
	if (armed)
		allow(0);
	errno = error;
	return r;
}

/* By the name that Python's headers make of it. */
int fallocate64(int fd, int mode, off64_t offset, off64_t n)
{
	static int (*real)(int, int, off64_t, off64_t);
	if (!real)
		real = (int (*)(int, int, off64_t, off64_t))dlsym(RTLD_NEXT, "fallocate64");
	if (armed)
		point();
	return real(fd, mode, offset, n);
}
