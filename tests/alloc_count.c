/* SPDX-License-Identifier: Apache-2.0
 * LD_PRELOAD: counts heap calls made by the codecs' own code (the extension, liblz4, libzstd), and
 * lets them fail. The caller is told by its return address, so that Python's own calls do not count. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>
#include <string.h>

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

unsigned long alloc_calls, alloc_frees, alloc_bytes;
int alloc_fail;

static int ours(void *caller)
{
	Dl_info info;

	if (!dladdr(caller, &info) || !info.dli_fname)
		return 0;
	return strstr(info.dli_fname, "/liblz4.") || strstr(info.dli_fname, "/libzstd.") ||
	       strstr(info.dli_fname, "/zramfs/codecs.");
}

#define COUNTED(size, result)                          \
	do {                                           \
		if (ours(__builtin_return_address(0))) { \
			alloc_calls++;                 \
			alloc_bytes += (size);         \
			if (alloc_fail) {              \
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
		if (alloc_fail)
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
