/* SPDX-License-Identifier: Apache-2.0
 *
 * LD_PRELOAD: units are unpacked, and made, only when they may be. hold, hold_making: 1 = they wait; held,
 * making_held: how many have waited so far.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <unistd.h>

int hold;
int held;
int hold_making;
int making_held;

/* By its name: a library that an extension brings along is none of those that RTLD_NEXT looks through. */
static void *real(const char *name)
{
	return dlsym(dlopen("libzstd.so.1", RTLD_NOW), name);
}

static void wait_while(int *on, int *count)
{
	if (!__atomic_load_n(on, __ATOMIC_SEQ_CST))
		return;
	__atomic_add_fetch(count, 1, __ATOMIC_SEQ_CST);
	while (__atomic_load_n(on, __ATOMIC_SEQ_CST))
		usleep(1000);
}

size_t ZSTD_decompressContinue(void *ctx, void *dst, size_t cap, const void *src, size_t n)
{
	static size_t (*next)(void *, void *, size_t, const void *, size_t);

	if (!next)
		next = (size_t (*)(void *, void *, size_t, const void *, size_t))real("ZSTD_decompressContinue");
	wait_while(&hold, &held);
	return next(ctx, dst, cap, src, n);
}

size_t ZSTD_compressStream2(void *ctx, void *out, void *into, int end)
{
	static size_t (*next)(void *, void *, void *, int);

	if (!next)
		next = (size_t (*)(void *, void *, void *, int))real("ZSTD_compressStream2");
	wait_while(&hold_making, &making_held);
	return next(ctx, out, into, end);
}
