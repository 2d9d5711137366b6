/* SPDX-License-Identifier: Apache-2.0
 *
 * LD_PRELOAD: pages that zstd has compressed are unpacked only when they may be. hold: 1 = they wait; held: how many
 * have waited so far.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <unistd.h>

int hold;
int held;

size_t ZSTD_decompressDCtx(void *ctx, void *dst, size_t cap, const void *src, size_t n)
{
	static size_t (*real)(void *, void *, size_t, const void *, size_t);

	/* By its name: a library that an extension brings along is none of those that RTLD_NEXT looks through. */
	if (!real)
		real = (size_t (*)(void *, void *, size_t, const void *, size_t))dlsym(
			dlopen("libzstd.so.1", RTLD_NOW), "ZSTD_decompressDCtx");
	if (__atomic_load_n(&hold, __ATOMIC_SEQ_CST)) {
		__atomic_add_fetch(&held, 1, __ATOMIC_SEQ_CST);
		while (__atomic_load_n(&hold, __ATOMIC_SEQ_CST))
			usleep(1000);
	}
	return real(ctx, dst, cap, src, n);
}
