/* SPDX-License-Identifier: Apache-2.0
 * LD_PRELOAD: counts heap calls made by the compiled core's own code (the extensions, liblz4, libzstd),
 * and lets all of them fail, or the alloc_fail_at-th from now. The caller is told by its return address, so that Python's own calls do not count. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <string.h>

#include "libc_heap.h"

unsigned long alloc_calls, alloc_frees, alloc_bytes;
int alloc_fail, alloc_fail_at;

static const char *const watched[] = {
	"/liblz4.", "/libzstd.", "/codecs/codec.", "/codecs/dictionary.", "/store/slots.", "/store/store.",
	"/store/candidates.", "/store/recompress.",
};

static int ours(void *caller)
{
	Dl_info info;

	if (!dladdr(caller, &info) || !info.dli_fname)
		return 0;
	for (unsigned i = 0; i < sizeof(watched) / sizeof(watched[0]); i++)
		if (strstr(info.dli_fname, watched[i]))
			return 1;
	return 0;
}

static int refused(void)
{
	return alloc_fail || (alloc_fail_at > 0 && --alloc_fail_at == 0);
}

#define COUNTED(size, result)                          \
	do {                                           \
		if (ours(__builtin_return_address(0))) { \
			alloc_calls++;                 \
			alloc_bytes += (size);         \
			if (refused()) {               \
				errno = ENOMEM;        \
				return NULL;           \
			}                              \
		}                                      \
		return (result);                       \
	} while (0)

void *malloc(size_t n) { COUNTED(n, __libc_malloc(n)); }
void *calloc(size_t k, size_t n) { COUNTED(k * n, __libc_calloc(k, n)); }
void *realloc(void *p, size_t n) { COUNTED(n, __libc_realloc(p, n)); }
void *aligned_alloc(size_t a, size_t n) { COUNTED(n, __libc_memalign(a, n)); }
void *memalign(size_t a, size_t n) { COUNTED(n, __libc_memalign(a, n)); }

int posix_memalign(void **p, size_t a, size_t n)
{
	if (ours(__builtin_return_address(0))) {
		alloc_calls++;
		alloc_bytes += n;
		if (refused())
			return ENOMEM;
	}
	*p = __libc_memalign(a, n);
	return *p ? 0 : ENOMEM;
}

void free(void *p)
{
	if (p && ours(__builtin_return_address(0)))
		alloc_frees++;
	__libc_free(p);
}
