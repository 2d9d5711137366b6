// SPDX-License-Identifier: Apache-2.0
/*
 * The empty FUSE server: one file that stores nothing, as cheap as a plain C server can be.
 * Reads are answered from one static buffer, writes are read from the kernel and dropped. What a
 * real server reaches of this server's rate is what its storing costs.
 *
 *     empty_fuse FD SIZE THREADS
 *
 * FD is an open FUSE connection that is mounted on a regular file. It ends with status 0 when the
 * file is unmounted, and with 1 and a sentence on stderr when the kernel says something unexpected.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define DATA_MAX (1u << 20)
#define PAGE 4096u
/* The kernel wants room for a whole request: the data, its header, rounded up to pages. */
#define REQUEST_MAX (DATA_MAX + PAGE)
/* A day: nothing but the mount's end ever changes the attributes. */
#define ATTR_VALID_S 86400u
#define MAX_THREADS 64
/* Linux 6.2; the headers of Debian 12 are older than its kernels may be. */
#ifndef FOPEN_PARALLEL_DIRECT_WRITES
#define FOPEN_PARALLEL_DIRECT_WRITES (1u << 6)
#endif

static uint64_t file_size;
static uint8_t answer[DATA_MAX] __attribute__((aligned(4096)));

static void fail(const char *what)
{
    fprintf(stderr, "empty_fuse: %s: %s\n", what, strerror(errno));
    _exit(1);
}

static void reply(int fd, uint64_t unique, int error, const void *body, size_t length)
{
    struct fuse_out_header head = {
        .len = (uint32_t)(sizeof head + length), .error = error, .unique = unique,
    };
    struct iovec parts[2] = {{&head, sizeof head}, {(void *)body, length}};

    /* ENOENT: the request was interrupted and is gone. ENODEV: unmounted meanwhile. */
    if (writev(fd, parts, length ? 2 : 1) < 0 && errno != ENOENT && errno != ENODEV)
        fail("answering a request");
}

static void reply_init(int fd, const struct fuse_in_header *in, const struct fuse_init_in *ask)
{
    const uint32_t wanted = FUSE_ASYNC_READ | FUSE_ASYNC_DIO | FUSE_BIG_WRITES | FUSE_MAX_PAGES;
    struct fuse_init_out out = {
        .major = FUSE_KERNEL_VERSION,
        .minor = FUSE_KERNEL_MINOR_VERSION,
        .max_readahead = ask->max_readahead,
        .flags = ask->flags & wanted,
        /* The default of 12 would cut queue depth 16 of direct I/O, which counts as background. */
        .max_background = 256,
        .congestion_threshold = 192,
        .max_write = DATA_MAX,
        .time_gran = 1,
        .max_pages = DATA_MAX / PAGE,
    };
    if (ask->major != FUSE_KERNEL_VERSION || out.flags != wanted) {
        fprintf(stderr, "empty_fuse: expected FUSE %u with flags %#x, the kernel speaks %u with %#x\n",
                FUSE_KERNEL_VERSION, wanted, ask->major, ask->flags);
        _exit(1);
    }
    reply(fd, in->unique, 0, &out, sizeof out);
}

static void reply_attr(int fd, const struct fuse_in_header *in)
{
    struct fuse_attr_out out = {
        .attr_valid = ATTR_VALID_S,
        .attr = {
            .ino = FUSE_ROOT_ID, .size = file_size, .blocks = file_size / 512,
            .mode = S_IFREG | 0600, .nlink = 1, .uid = getuid(), .gid = getgid(), .blksize = PAGE,
        },
    };
    reply(fd, in->unique, 0, &out, sizeof out);
}

static uint32_t inside(uint64_t offset, uint32_t size)
{
    if (size > DATA_MAX)
        size = DATA_MAX;
    if (offset >= file_size)
        return 0;
    return file_size - offset < size ? (uint32_t)(file_size - offset) : size;
}

static void serve(int fd, const struct fuse_in_header *in, const void *body)
{
    const struct fuse_read_in *rd = body;
    const struct fuse_write_in *wr = body;
    struct fuse_open_out opened = {.open_flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES};
    struct fuse_write_out written = {0};

    switch (in->opcode) {
    case FUSE_READ:
        reply(fd, in->unique, 0, answer, inside(rd->offset, rd->size));
        break;
    case FUSE_WRITE:
        written.size = inside(wr->offset, wr->size);
        reply(fd, in->unique, 0, &written, sizeof written);
        break;
    case FUSE_INIT:
        reply_init(fd, in, body);
        break;
    case FUSE_GETATTR:
    case FUSE_SETATTR:
        reply_attr(fd, in);
        break;
    case FUSE_OPEN:
        reply(fd, in->unique, 0, &opened, sizeof opened);
        break;
    case FUSE_RELEASE:
    case FUSE_DESTROY:
        reply(fd, in->unique, 0, NULL, 0);
        break;
    case FUSE_FORGET:
    case FUSE_BATCH_FORGET:
    case FUSE_INTERRUPT:
        break;
    default:
        reply(fd, in->unique, -ENOSYS, NULL, 0);
    }
}

static void *serve_until_unmounted(void *argument)
{
    int fd = (int)(intptr_t)argument;
    uint8_t *request = aligned_alloc(PAGE, REQUEST_MAX);

    if (request == NULL)
        fail("allocating a request buffer");
    for (;;) {
        ssize_t got = read(fd, request, REQUEST_MAX);
        if (got < 0 && errno == ENODEV)
            break;
        if (got < 0 && (errno == EINTR || errno == EAGAIN || errno == ENOENT))
            continue;
        if (got < (ssize_t)sizeof(struct fuse_in_header))
            fail("reading a request");
        serve(fd, (void *)request, request + sizeof(struct fuse_in_header));
    }
    free(request);
    return NULL;
}

static uint64_t number(const char *text, uint64_t least, uint64_t most, const char *name)
{
    char *end;
    errno = 0;
    uint64_t value = strtoull(text, &end, 10);
    if (errno || *end || end == text || value < least || value > most) {
        fprintf(stderr, "empty_fuse: %s must be a number from %llu to %llu, not '%s'\n", name,
                (unsigned long long)least, (unsigned long long)most, text);
        exit(1);
    }
    return value;
}

int main(int argc, char **argv)
{
    pthread_t threads[MAX_THREADS];

    if (argc != 4) {
        fprintf(stderr, "usage: empty_fuse FD SIZE THREADS\n");
        return 1;
    }
    int fd = (int)number(argv[1], 0, 1 << 20, "FD");
    file_size = number(argv[2], PAGE, INT64_MAX, "SIZE");
    int count = (int)number(argv[3], 1, MAX_THREADS, "THREADS");
    memset(answer, 0x5a, sizeof answer);
    /* A connection open without O_NONBLOCK: the threads sleep in read(). */
    if (fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK) < 0)
        fail("making the connection blocking");
    for (int i = 1; i < count; i++) {
        errno = pthread_create(&threads[i], NULL, serve_until_unmounted,
                               (void *)(intptr_t)fd);
        if (errno)
            fail("starting a thread");
    }
    serve_until_unmounted((void *)(intptr_t)fd);
    for (int i = 1; i < count; i++)
        pthread_join(threads[i], NULL);
    return 0;
}
