# SPDX-License-Identifier: Apache-2.0
"""What the lane uses of the kernel's FUSE protocol (linux/fuse.h)."""
from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t, uint64_t


cdef extern from "fuse_abi.h" nogil:
    enum: FUSE_ROOT_ID, FUSE_KERNEL_VERSION, ZRAMFS_FUSE_MINOR, ZRAMFS_FUSE_MINOR_MIN
    enum: FUSE_FORGET, FUSE_GETATTR, FUSE_SETATTR, FUSE_OPEN, FUSE_READ, FUSE_WRITE, FUSE_STATFS
    enum: FUSE_RELEASE, FUSE_INIT, FUSE_INTERRUPT, FUSE_DESTROY
    enum: FUSE_BATCH_FORGET, FUSE_FALLOCATE, FUSE_LSEEK
    enum: FUSE_NOTIFY_INVAL_INODE, FUSE_NOTIFY_STORE, FUSE_NOTIFY_RESEND
    enum: FATTR_MODE, FATTR_UID, FATTR_GID, FATTR_SIZE, FATTR_ATIME, FATTR_MTIME, FATTR_CTIME
    enum: FATTR_ATIME_NOW, FATTR_MTIME_NOW, FATTR_FH
    enum: FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE, FOPEN_PARALLEL_DIRECT_WRITES
    enum: FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE

    const uint64_t FUSE_ASYNC_READ
    const uint64_t FUSE_BIG_WRITES
    const uint64_t FUSE_ASYNC_DIO
    const uint64_t FUSE_ABORT_ERROR
    const uint64_t FUSE_MAX_PAGES
    const uint64_t FUSE_INIT_EXT
    const uint64_t FUSE_DIRECT_IO_ALLOW_MMAP
    const uint64_t FUSE_HAS_RESEND

    struct fuse_in_header:
        uint32_t len
        uint32_t opcode
        uint64_t unique
        uint64_t nodeid
        uint32_t pid

    struct fuse_out_header:
        uint32_t len
        int32_t error
        uint64_t unique

    struct fuse_attr:
        uint64_t ino
        uint64_t size
        uint64_t blocks
        uint64_t atime
        uint64_t mtime
        uint64_t ctime
        uint32_t atimensec
        uint32_t mtimensec
        uint32_t ctimensec
        uint32_t mode
        uint32_t nlink
        uint32_t uid
        uint32_t gid
        uint32_t blksize

    struct fuse_getattr_in:
        uint64_t fh

    struct fuse_attr_out:
        uint64_t attr_valid
        fuse_attr attr

    struct fuse_setattr_in:
        uint32_t valid
        uint64_t size
        uint64_t atime
        uint64_t mtime
        uint64_t ctime
        uint32_t atimensec
        uint32_t mtimensec
        uint32_t ctimensec
        uint32_t mode
        uint32_t uid
        uint32_t gid

    struct fuse_open_in:
        uint32_t flags

    struct fuse_open_out:
        uint64_t fh
        uint32_t open_flags

    struct fuse_release_in:
        uint64_t fh

    struct fuse_read_in:
        uint64_t offset
        uint32_t size

    struct fuse_write_in:
        uint64_t offset
        uint32_t size

    struct fuse_write_out:
        uint32_t size

    struct fuse_fallocate_in:
        uint64_t offset
        uint64_t length
        uint32_t mode

    struct fuse_lseek_in:
        uint64_t offset
        uint32_t whence

    struct fuse_lseek_out:
        uint64_t offset

    struct fuse_interrupt_in:
        uint64_t unique

    struct fuse_kstatfs:
        uint64_t blocks
        uint64_t bfree
        uint64_t bavail
        uint64_t files
        uint32_t bsize
        uint32_t namelen
        uint32_t frsize

    struct fuse_statfs_out:
        fuse_kstatfs st

    struct zramfs_init_in:
        uint32_t major
        uint32_t minor
        uint32_t max_readahead
        uint32_t flags
        uint32_t flags2

    struct zramfs_init_out:
        uint32_t major
        uint32_t minor
        uint32_t max_readahead
        uint32_t flags
        uint16_t max_background
        uint16_t congestion_threshold
        uint32_t max_write
        uint32_t time_gran
        uint16_t max_pages
        uint32_t flags2

    struct fuse_notify_inval_inode_out:
        uint64_t ino
        int64_t off
        int64_t len

    struct fuse_notify_store_out:
        uint64_t nodeid
        uint64_t offset
        uint32_t size
