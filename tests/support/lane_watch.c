/* SPDX-License-Identifier: Apache-2.0
 * LD_PRELOAD: counts what the threads that serve a device call of the heap and of the calls that change what
 * is mapped, and can make one of them late at a lock. A thread is known by its name, as it is at the call.
 * What is counted, and what is wanted, stands in the file that LANE_WATCH names; see lane_watch.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "libc_heap.h"

enum { HEAP, MAP, HOLE, THREAD, KINDS };

struct count {
	uint64_t calls;
	char what[56];		/* the first: its name and the library that made it */
};

static struct watch {
	uint32_t hold_gil;	/* wanted */
	uint32_t held;		/* it is so */
	uint32_t late_us;	/* how long late_thread waits before it takes a mutex */
	char late_thread[20];
	struct count counts[KINDS];
} *watch;

__attribute__((constructor)) static void begin(void)
{
	const char *path = getenv("LANE_WATCH");
	int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
	void *map = fd < 0 ? MAP_FAILED : (void *)syscall(
		SYS_mmap, NULL, sizeof(*watch), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (fd >= 0)
		close(fd);
	if (map != MAP_FAILED)
		watch = map;
}

/* By way of ctypes.PyDLL, and so with the GIL; True once it was wanted. */
int hold_gil(void)
{
	if (!watch || !__atomic_load_n(&watch->hold_gil, __ATOMIC_ACQUIRE))
		return 0;
	__atomic_store_n(&watch->held, 1, __ATOMIC_RELEASE);
	while (__atomic_load_n(&watch->hold_gil, __ATOMIC_ACQUIRE))
		usleep(1000);
	__atomic_store_n(&watch->held, 0, __ATOMIC_RELEASE);
	return 1;
}

static void note(int kind, const char *name, void *caller)
{
	char thread[16] = "";
	const char *library;
	Dl_info info;
	struct count *c;

	if (!watch)
		return;
	prctl(PR_GET_NAME, thread);
	if (strncmp(thread, "zramfs-lane", 11) && strncmp(thread, "zramfs-slow", 11))
		return;
	c = &watch->counts[kind];
	if (__atomic_fetch_add(&c->calls, 1, __ATOMIC_RELAXED))
		return;
	library = dladdr(caller, &info) && info.dli_fname ? info.dli_fname : "?";
	if (strrchr(library, '/'))
		library = strrchr(library, '/') + 1;
	strncpy(c->what, name, sizeof(c->what) - 1);
	strncat(c->what, " by ", sizeof(c->what) - 1 - strlen(c->what));
	strncat(c->what, library, sizeof(c->what) - 1 - strlen(c->what));
}

#define NOTE(kind) note(kind, __func__, __builtin_return_address(0))

void *malloc(size_t n) { NOTE(HEAP); return __libc_malloc(n); }
void *calloc(size_t k, size_t n) { NOTE(HEAP); return __libc_calloc(k, n); }
void *realloc(void *p, size_t n) { NOTE(HEAP); return __libc_realloc(p, n); }
void *aligned_alloc(size_t a, size_t n) { NOTE(HEAP); return __libc_memalign(a, n); }
void *memalign(size_t a, size_t n) { NOTE(HEAP); return __libc_memalign(a, n); }
void free(void *p)
{
	if (p)
		NOTE(HEAP);
	__libc_free(p);
}

int posix_memalign(void **p, size_t a, size_t n)
{
	NOTE(HEAP);
	*p = __libc_memalign(a, n);
	return *p ? 0 : ENOMEM;
}

void *mmap(void *at, size_t n, int prot, int flags, int fd, off_t offset)
{
	NOTE(MAP);
	return (void *)syscall(SYS_mmap, at, n, prot, flags, fd, offset);
}

int munmap(void *at, size_t n) { NOTE(MAP); return syscall(SYS_munmap, at, n); }
int mprotect(void *at, size_t n, int prot) { NOTE(MAP); return syscall(SYS_mprotect, at, n, prot); }
int madvise(void *at, size_t n, int advice) { NOTE(HOLE); return syscall(SYS_madvise, at, n, advice); }

int mlock(const void *at, size_t n) { NOTE(MAP); return syscall(SYS_mlock, at, n); }
int ftruncate(int fd, off_t n) { NOTE(HOLE); return syscall(SYS_ftruncate, fd, n); }

int fallocate(int fd, int mode, off_t offset, off_t length)
{
	NOTE(HOLE);
	return syscall(SYS_fallocate, fd, mode, offset, length);
}

/* What Python's headers make of these three. */
void *mmap64(void *, size_t, int, int, int, off_t) __attribute__((alias("mmap")));
int ftruncate64(int, off_t) __attribute__((alias("ftruncate")));
int fallocate64(int, int, off_t, off_t) __attribute__((alias("fallocate")));

int pthread_create(pthread_t *id, const pthread_attr_t *attr, void *(*work)(void *), void *arg)
{
	static int (*next)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);

	NOTE(THREAD);
	if (!next)
		next = dlsym(RTLD_NEXT, "pthread_create");
	return next(id, attr, work, arg);
}

int pthread_mutex_lock(pthread_mutex_t *m)
{
	static int (*next)(pthread_mutex_t *);
	char thread[16] = "";

	if (watch && __atomic_load_n(&watch->late_us, __ATOMIC_ACQUIRE)) {
		prctl(PR_GET_NAME, thread);
		if (!strcmp(thread, watch->late_thread))
			usleep(watch->late_us);
	}
	if (!next)
		next = dlsym(RTLD_NEXT, "pthread_mutex_lock");
	return next(m);
}
