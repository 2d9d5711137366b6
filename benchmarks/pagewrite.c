// SPDX-License-Identifier: Apache-2.0
/*
 * Writes the pages of an image onto a device, as fio's libaio engine would, which cannot write
 * given data itself.
 *
 *     pagewrite DEVICE IMAGE OFFSET BLOCK DEPTH seq|rand|once SECONDS
 *
 * DEVICE is written with O_DIRECT from OFFSET on, over as many bytes as IMAGE has, in blocks of
 * BLOCK bytes, with DEPTH requests under way (Linux AIO). seq goes round and round; rand takes a
 * random block of the image to a random block of the device; both end after SECONDS. once writes
 * the image one time and ends. Prints {"bytes": N, "seconds": S, "cpu": C} where C is the CPU time
 * of the writing (user and system, seconds), or fails with 1 and a sentence on stderr.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAX_DEPTH 256

static void fail(const char *format, ...)
{
    va_list words;
    va_start(words, format);
    fprintf(stderr, "pagewrite: ");
    vfprintf(stderr, format, words);
    fprintf(stderr, "\n");
    va_end(words);
    exit(1);
}

static double monotonic(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static double cpu_seconds(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
           (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) * 1e-6;
}

static uint64_t number(const char *text, uint64_t least, uint64_t most, const char *name)
{
    char *end;
    errno = 0;
    uint64_t value = strtoull(text, &end, 10);
    if (errno || *end || end == text || value < least || value > most)
        fail("%s must be a number from %llu to %llu, not '%s'", name, (unsigned long long)least,
             (unsigned long long)most, text);
    return value;
}

/* The whole image in memory, every page of it present before the clock starts. */
static const uint8_t *load(const char *path, uint64_t *length)
{
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) < 0)
        fail("cannot open the image %s: %s", path, strerror(errno));
    void *bytes = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (bytes == MAP_FAILED)
        fail("cannot map the image %s: %s", path, strerror(errno));
    close(fd);
    *length = (uint64_t)st.st_size;
    return bytes;
}

struct walk {
    const uint8_t *image;
    uint64_t offset, block, blocks, next, state;
    int device;
    bool random;
};

static uint64_t draw(struct walk *w)
{
    w->state ^= w->state << 13;
    w->state ^= w->state >> 7;
    w->state ^= w->state << 17;
    return w->state % w->blocks;
}

static void submit(struct walk *w, aio_context_t queue, struct iocb *cb)
{
    uint64_t to = w->random ? draw(w) : w->next % w->blocks;
    uint64_t from = w->random ? draw(w) : to;
    struct iocb *list[1] = {cb};

    w->next++;
    *cb = (struct iocb){
        .aio_data = (uint64_t)(uintptr_t)cb,
        .aio_lio_opcode = IOCB_CMD_PWRITE,
        .aio_fildes = (uint32_t)w->device,
        .aio_buf = (uint64_t)(uintptr_t)(w->image + from * w->block),
        .aio_nbytes = w->block,
        .aio_offset = (int64_t)(w->offset + to * w->block),
    };
    while (syscall(SYS_io_submit, queue, 1, list) != 1)
        if (errno != EAGAIN && errno != EINTR)
            fail("io_submit: %s", strerror(errno));
}

int main(int argc, char **argv)
{
    static struct iocb requests[MAX_DEPTH];
    static struct io_event events[MAX_DEPTH];
    aio_context_t queue = 0;
    uint64_t length = 0, bytes = 0, flying = 0;

    if (argc != 8)
        fail("usage: pagewrite DEVICE IMAGE OFFSET BLOCK DEPTH seq|rand|once SECONDS");
    struct walk w = {.state = 88172645463325252ull, .random = strcmp(argv[6], "rand") == 0};
    bool once = strcmp(argv[6], "once") == 0;
    if (!w.random && !once && strcmp(argv[6], "seq") != 0)
        fail("expected seq, rand or once, not '%s'", argv[6]);
    w.image = load(argv[2], &length);
    w.offset = number(argv[3], 0, INT64_MAX, "OFFSET");
    w.block = number(argv[4], 512, 1u << 26, "BLOCK");
    uint64_t depth = number(argv[5], 1, MAX_DEPTH, "DEPTH");
    char *end;
    double limit = strtod(argv[7], &end);
    if (*end || end == argv[7] || limit < 0)
        fail("SECONDS must be a number of seconds, not '%s'", argv[7]);
    if (length % w.block || length == 0)
        fail("the image has %llu bytes, which is not a multiple of the block of %llu",
             (unsigned long long)length, (unsigned long long)w.block);
    w.blocks = length / w.block;
    w.device = open(argv[1], O_WRONLY | O_DIRECT | O_CLOEXEC);
    if (w.device < 0)
        fail("cannot open %s for direct writes: %s", argv[1], strerror(errno));
    if (syscall(SYS_io_setup, depth, &queue) < 0)
        fail("io_setup of depth %llu: %s", (unsigned long long)depth, strerror(errno));

    double start = monotonic(), cpu = cpu_seconds();
    while (flying < depth && !(once && w.next == w.blocks))
        submit(&w, queue, &requests[flying++]);
    while (flying) {
        long got = syscall(SYS_io_getevents, queue, 1L, (long)depth, events, NULL);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            fail("io_getevents: %s", strerror(errno));
        bool more = once ? true : monotonic() - start < limit;
        for (long i = 0; i < got; i++) {
            struct iocb *cb = (struct iocb *)(uintptr_t)events[i].data;
            if (events[i].res != (int64_t)w.block)
                fail("writing %llu bytes at %lld: %s", (unsigned long long)w.block,
                     (long long)cb->aio_offset,
                     events[i].res < 0 ? strerror((int)-events[i].res) : "the device took only a part");
            bytes += w.block;
            flying--;
            if (more && !(once && w.next == w.blocks)) {
                submit(&w, queue, cb);
                flying++;
            }
        }
    }
    double seconds = monotonic() - start;
    printf("{\"bytes\": %llu, \"seconds\": %.6f, \"cpu\": %.6f}\n", (unsigned long long)bytes, seconds,
           cpu_seconds() - cpu);
    return 0;
}
