/* SPDX-License-Identifier: Apache-2.0
 *
 * LD_PRELOAD: reads of one descriptor wait until they may go on. hold_fd: that descriptor, -1 = none; held: reads
 * that have waited so far.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/types.h>
#include <unistd.h>

int hold_fd = -1;
int held;

/* Where files may be larger than 2 GiB the C library calls it by this name. */
ssize_t pread64(int fd, void *to, size_t n, off_t off)
{
	static ssize_t (*real)(int, void *, size_t, off_t);

	if (!real)
		real = (ssize_t (*)(int, void *, size_t, off_t))dlsym(RTLD_NEXT, "pread64");
	if (fd >= 0 && __atomic_load_n(&hold_fd, __ATOMIC_SEQ_CST) == fd) {
		__atomic_add_fetch(&held, 1, __ATOMIC_SEQ_CST);
		while (__atomic_load_n(&hold_fd, __ATOMIC_SEQ_CST) == fd)
			usleep(1000);
	}
	return real(fd, to, n, off);
}

ssize_t pread(int fd, void *to, size_t n, off_t off)
{
	return pread64(fd, to, n, off);
}
