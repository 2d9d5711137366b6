# SPDX-License-Identifier: Apache-2.0
"""Atomic operations, waits, POSIX mutexes and the few system calls the core makes."""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t* m, const void* attr) noexcept
    int pthread_mutex_destroy(pthread_mutex_t* m) noexcept
    int pthread_mutex_lock(pthread_mutex_t* m) noexcept
    int pthread_mutex_trylock(pthread_mutex_t* m) noexcept
    int pthread_mutex_unlock(pthread_mutex_t* m) noexcept

cdef extern from "prim.h" nogil:
    uint64_t load64(const uint64_t* p) noexcept
    void store64(uint64_t* p, uint64_t v) noexcept
    uint64_t peek64(const uint64_t* p) noexcept
    uint64_t add64(uint64_t* p, uint64_t v) noexcept
    uint64_t sub64(uint64_t* p, uint64_t v) noexcept
    uint64_t swap64(uint64_t* p, uint64_t v) noexcept
    bint cas64(uint64_t* p, uint64_t old, uint64_t v) noexcept
    uint32_t load32(const uint32_t* p) noexcept
    void store32(uint32_t* p, uint32_t v) noexcept
    uint32_t add32(uint32_t* p, uint32_t v) noexcept
    uint32_t sub32(uint32_t* p, uint32_t v) noexcept
    uint32_t swap32(uint32_t* p, uint32_t v) noexcept
    bint cas32(uint32_t* p, uint32_t old, uint32_t v) noexcept
    bint cas_i32(int32_t* p, int32_t old, int32_t v) noexcept
    int32_t load_i32(const int32_t* p) noexcept
    void store_i32(int32_t* p, int32_t v) noexcept
    int32_t sub_i32(int32_t* p, int32_t v) noexcept
    uint8_t load8(const uint8_t* p) noexcept
    void store8(uint8_t* p, uint8_t v) noexcept
    uint16_t load16(const uint16_t* p) noexcept
    void store16(uint16_t* p, uint16_t v) noexcept
    void set_bits16(uint16_t* p, uint16_t v) noexcept
    void clear_bits16(uint16_t* p, uint16_t v) noexcept
    void set_bits64(uint64_t* p, uint64_t v) noexcept
    bint cas16(uint16_t* p, uint16_t old, uint16_t v) noexcept
    void max64(uint64_t* p, uint64_t v) noexcept
    void order_stores() noexcept
    uint64_t now_ns() noexcept
    void relax(unsigned int round) noexcept
    void fetch_line(const void* p) noexcept
    void fetch_object(const void* p) noexcept
    void short_mutex_init(pthread_mutex_t* m) noexcept
    const size_t PAGE_BYTES
    uint64_t round_up(uint64_t n, uint64_t to) noexcept
    void make_resident(void* start, size_t n) noexcept
    int try_populate(void* start, size_t n) noexcept
    int try_map(void* start, size_t n) noexcept
    void* map_sparse(size_t n, int fd) noexcept
    void* reserve_space(size_t n) noexcept
    int try_open_space(void* space, size_t n) noexcept
    void ready_stack() noexcept

cdef extern from "<stdlib.h>" nogil:
    void* aligned_alloc(size_t alignment, size_t size) noexcept

cdef extern from "<semaphore.h>" nogil:
    ctypedef struct sem_t:
        pass
    int sem_init(sem_t* s, int shared, unsigned int value) noexcept
    int sem_destroy(sem_t* s) noexcept
    int sem_post(sem_t* s) noexcept
    int sem_wait(sem_t* s) noexcept

cdef extern from "<sys/mman.h>" nogil:
    enum:
        PROT_READ, PROT_WRITE, MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE
        MADV_DONTDUMP, MADV_HUGEPAGE, MADV_DONTNEED, MFD_CLOEXEC
    void* MAP_FAILED
    void* mmap(void* addr, size_t length, int prot, int flags, int fd, int64_t offset) noexcept
    int munmap(void* addr, size_t length) noexcept
    int madvise(void* addr, size_t length, int advice) noexcept
    int memfd_create(const char* name, unsigned int flags) noexcept

cdef extern from "<fcntl.h>" nogil:
    enum:
        FALLOC_FL_PUNCH_HOLE, FALLOC_FL_KEEP_SIZE
        F_DUPFD_CLOEXEC
    int fallocate(int fd, int mode, int64_t offset, int64_t length) noexcept
    int fcntl(int fd, int command, ...) noexcept

cdef extern from "<unistd.h>" nogil:
    int ftruncate(int fd, int64_t length) noexcept
    int close(int fd) noexcept
    ssize_t write(int fd, const void* buf, size_t n) noexcept
    ssize_t pread(int fd, void* buf, size_t n, int64_t offset) noexcept
    int64_t lseek(int fd, int64_t offset, int whence) noexcept
    enum:
        SEEK_END, SEEK_DATA, SEEK_HOLE
