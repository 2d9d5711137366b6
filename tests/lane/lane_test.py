# SPDX-License-Identifier: Apache-2.0
"""The lane against a test that plays the kernel: negotiation, every operation, hostile requests."""
from __future__ import annotations

import errno
import os
import struct
import time

import pytest

from tests.support.wire import (
    ARGUMENTS,
    ATTR_FIELDS,
    FORGET_LIKE,
    KEEP_SIZE,
    MIB,
    PAGE,
    PUNCH_HOLE,
    SEEK_DATA,
    SEEK_HOLE,
    STATFS_FIELDS,
    ZERO_RANGE,
    Op,
    fallocate_in,
    header,
    init_in,
    lseek_in,
    read_in,
    setattr_in,
    wired,
    write_in,
)

U64 = 1 << 64
ASYNC_READ, BIG_WRITES, ASYNC_DIO, ABORT_ERROR = 1 << 0, 1 << 5, 1 << 15, 1 << 21
MAX_PAGES, INIT_EXT, ALLOW_MMAP, HAS_RESEND = 1 << 22, 1 << 30, 1 << 36, 1 << 39
WANTED = ASYNC_READ | BIG_WRITES | ASYNC_DIO | ABORT_ERROR | MAX_PAGES | INIT_EXT | ALLOW_MMAP | HAS_RESEND
# Splicing, O_TRUNC in OPEN, write-back cache, opening without asking, io_uring: offered, never taken.
REFUSED = 1 << 7 | 1 << 8 | 1 << 9 | 1 << 3 | 1 << 16 | 1 << 17 | 1 << 41


# --- INIT

def test_init_takes_what_a_present_kernel_offers():
    with wired() as wire:
        answer = wire.init(flags=WANTED | REFUSED)
        assert answer["flags"] | answer["flags2"] << 32 == WANTED
        assert (answer["major"], answer["minor"]) == (7, 40)
        assert (answer["max_write"], answer["max_pages"], answer["time_gran"]) == (MIB, 256, 1)
        assert answer["max_background"] >= 16 and answer["max_readahead"] == 128 << 10
        stats = wire.lane.stats()
        assert (stats.protocol_minor, stats.can_resend, stats.protocol_errors) == (40, True, 0)


@pytest.mark.parametrize(
    ("minor", "offered", "taken"),
    [
        (23, BIG_WRITES, BIG_WRITES),
        (31, BIG_WRITES | ASYNC_DIO | MAX_PAGES, BIG_WRITES | ASYNC_DIO | MAX_PAGES),
        # Flags above 32 count only when INIT_EXT says that they are there.
        (36, MAX_PAGES | ALLOW_MMAP | HAS_RESEND, MAX_PAGES),
        (39, MAX_PAGES | INIT_EXT | ALLOW_MMAP, MAX_PAGES | INIT_EXT | ALLOW_MMAP),
        (45, 0, 0),
    ],
)
def test_init_makes_do_with_what_an_older_kernel_offers(minor, offered, taken):
    with wired() as wire:
        answer = wire.init(minor=minor, flags=offered)
        assert answer["flags"] | answer["flags2"] << 32 == taken
        assert answer["minor"] == min(minor, 40)
        assert wire.lane.stats().can_resend is bool(taken & HAS_RESEND)
        assert wire.lane.error is None
        wire.write(5, b"served")
        assert wire.read(4, 8) == b"\0served\0"


@pytest.mark.parametrize(("major", "minor"), [(7, 22), (7, 0), (6, 99), (0, 0)])
def test_init_refuses_kernels_that_are_too_old(major, minor):
    with wired() as wire:
        assert wire.call(Op.INIT, init_in(major=major, minor=minor), nodeid=0).error == errno.EPROTO
        assert wire.lane.error == (
            f"this kernel speaks FUSE {major}.{minor}; zramfs needs 7.23 (Linux 3.15) or newer")
        assert wire.lane.stats().protocol_minor == 0


def test_init_of_a_later_major_version_is_asked_again():
    with wired() as wire:
        assert wire.init(major=8, minor=0)["major"] == 7
        assert wire.lane.stats().protocol_minor == 0 and wire.lane.error is None
        assert wire.init(minor=45, flags=WANTED)["minor"] == 40
        assert wire.lane.stats().protocol_minor == 40


def test_init_is_answered_at_any_time():
    """A server that takes over gets the INIT that its predecessor left unanswered, marked as resent."""
    with wired() as wire:
        wire.init(flags=WANTED)
        wire.write(0, b"before")
        resent = 1 << 63 | 2
        assert wire.call(Op.INIT, init_in(flags=WANTED), nodeid=0, unique=resent).unique == resent
        assert wire.read(0, 6) == b"before"


@pytest.mark.parametrize("opcode", [op for op in ARGUMENTS if op not in FORGET_LIKE])
def test_the_top_bit_of_unique_is_kept(opcode):
    with wired() as wire:
        for unique in (1 << 63 | 4712, U64 - 1, 1):
            assert wire.call(opcode, ARGUMENTS[opcode], unique=unique).unique == unique


# --- attributes

def test_attributes_are_those_of_a_block_device_sized_file():
    with wired(10 * PAGE + 1) as wire:
        before = wire.attributes()
        assert before["size"] == 11 * PAGE and before["blocks"] == 0 and before["blksize"] == PAGE
        assert before["mode"] == 0o100600 and before["nlink"] == 1 and before["ino"] == 1
        assert (before["uid"], before["gid"]) == (os.getuid(), os.getgid())
        assert abs(before["mtime"] - time.time()) < 60
        wire.write(0, os.urandom(3 * PAGE))
        after = wire.attributes()
        assert after["blocks"] == 3 * PAGE // 512
        assert (after["mtime"], after["mtimensec"]) >= (before["mtime"], before["mtimensec"] - 10_000_000)


def test_statfs_counts_pages():
    with wired(16 * PAGE) as wire:
        wire.write(0, os.urandom(5 * PAGE))
        reply = wire.call(Op.STATFS)
        counts = dict(zip(STATFS_FIELDS, struct.unpack_from("=QQQQQIII", reply.data), strict=True))
        assert reply.error == 0 and len(reply.data) == 80
        assert counts == {"blocks": 16, "bfree": 11, "bavail": 11, "files": 1, "ffree": 0,
                          "bsize": PAGE, "namelen": 255, "frsize": PAGE}


MODE, UID, GID, ATIME, MTIME, ATIME_NOW, MTIME_NOW, CTIME = 1, 2, 4, 16, 32, 128, 256, 1024


def test_owner_mode_and_times_are_kept():
    with wired() as wire:
        reply = wire.call(Op.SETATTR, setattr_in(
            valid=MODE | UID | GID | ATIME | MTIME | CTIME, mode=0o100664, uid=1234, gid=5678,
            atime=1, atimensec=2, mtime=U64 - 3, mtimensec=4, ctime=5, ctimensec=999_999_999))
        for attributes in (wire.attributes(reply), wire.attributes()):
            assert (attributes["mode"], attributes["uid"], attributes["gid"]) == (0o100664, 1234, 5678)
            times = [attributes[name] for name in ATTR_FIELDS[3:9]]
            assert times == [1, U64 - 3, 5, 2, 4, 999_999_999]
        wire.call(Op.SETATTR, setattr_in(valid=ATIME | ATIME_NOW | MTIME | MTIME_NOW))
        now = wire.attributes()
        assert all(abs(now[name] - time.time()) < 60 for name in ("atime", "mtime", "ctime"))
        assert now["mode"] == 0o100664


# --- reading, writing, discarding

def test_ranges_end_at_the_end_of_the_device():
    with wired(8 * PAGE) as wire:
        end = 8 * PAGE
        assert wire.write(end - 10, b"x" * 100) == 10
        assert wire.read(end - 12, 100) == b"\0\0" + b"x" * 10
        assert wire.read(end, 100) == wire.read(end + 1, 1) == wire.read(U64 - 1, MIB) == b""
        for offset in (end, end + 1, U64 - 1, U64 - 100):
            assert wire.call(Op.WRITE, write_in(offset, 100) + b"y" * 100).error == errno.ENOSPC
        assert wire.read(end - 10, 10) == b"x" * 10


@pytest.mark.requires("root")  # messages of 1 MiB on a socket
def test_the_largest_requests():
    with wired(3 * MIB) as wire:
        data = os.urandom(MIB)
        assert wire.write(12345, data) == MIB
        assert wire.read(12345, MIB) == data
        assert wire.call(Op.READ, read_in(0, MIB + 1)).error == errno.EINVAL
        # A kernel that sends more than it was allowed to: what was cut off on reading cannot be right.
        assert wire.call(Op.WRITE, write_in(0, MIB + 1) + bytes(MIB + 1)).error == errno.EINVAL
        assert wire.lane.stats().protocol_errors == 2
        assert wire.read(12345, MIB) == data


END = 8 * PAGE


@pytest.mark.parametrize(("mode", "offset", "length", "error"), [
    (PUNCH_HOLE | KEEP_SIZE, 100, 2 * PAGE, 0),
    (PUNCH_HOLE | KEEP_SIZE, END - 1, U64 // 2 - END, 0),
    (ZERO_RANGE, 100, 2 * PAGE, 0),
    (ZERO_RANGE, 0, END, 0),
    (ZERO_RANGE | KEEP_SIZE, PAGE, 100 * PAGE, 0),
    # as a block device: without KEEP_SIZE not past the end, and with it not from the end
    (ZERO_RANGE, PAGE, END, errno.EINVAL),
    (ZERO_RANGE, END, 1, errno.EINVAL),
    (ZERO_RANGE | KEEP_SIZE, END, 1, errno.EINVAL),
    (PUNCH_HOLE | KEEP_SIZE, END, 1, errno.EINVAL),
    (PUNCH_HOLE | KEEP_SIZE, 0, 0, errno.EINVAL),
    (0, 0, PAGE, errno.EOPNOTSUPP),
    (KEEP_SIZE, 0, PAGE, errno.EOPNOTSUPP),
    (PUNCH_HOLE, 0, PAGE, errno.EOPNOTSUPP),
    (PUNCH_HOLE | ZERO_RANGE | KEEP_SIZE, 0, PAGE, errno.EOPNOTSUPP),
    (0x08 | KEEP_SIZE, 0, PAGE, errno.EOPNOTSUPP),
    (0x20, 0, PAGE, errno.EOPNOTSUPP),
    (0x80000000 | ZERO_RANGE, 0, PAGE, errno.EOPNOTSUPP),
])
def test_fallocate(mode, offset, length, error):
    with wired(END) as wire:
        data = bytearray(os.urandom(END))
        wire.write(0, data)
        assert wire.call(Op.FALLOCATE, fallocate_in(offset, length, mode)).error == error
        if not error:
            stop = min(END, offset + length)
            data[offset:stop] = bytes(stop - offset)
        assert wire.read(0, END) == data
        assert wire.attributes()["size"] == END
        assert wire.lane.stats().protocol_errors == 0


def test_seek_finds_data_and_holes():
    with wired(END) as wire:
        def seek(offset: int, whence: int) -> int:
            reply = wire.call(Op.LSEEK, lseek_in(offset, whence))
            return -reply.error if reply.error else struct.unpack("=Q", reply.data)[0]

        wire.write(2 * PAGE, os.urandom(2 * PAGE))
        assert seek(0, SEEK_DATA) == 2 * PAGE
        assert seek(2 * PAGE + 7, SEEK_DATA) == 2 * PAGE + 7
        assert seek(2 * PAGE + 7, SEEK_HOLE) == 4 * PAGE
        assert seek(5, SEEK_HOLE) == 5
        assert seek(4 * PAGE, SEEK_DATA) == -errno.ENXIO
        assert seek(END, SEEK_HOLE) == seek(U64 - 1, SEEK_DATA) == -errno.ENXIO
        assert seek(0, 0) == seek(0, 2) == seek(0, 5) == -errno.EINVAL
        assert wire.lane.stats().protocol_errors == 0


def test_a_full_pool_refuses_whole_writes():
    """A short count would be taken for success by the kernel's write-back, see do_write."""
    with wired(MIB, mem_limit=32 * PAGE) as wire:
        old = os.urandom(16 * PAGE)
        assert wire.write(0, old) == len(old)
        new = os.urandom(64 * PAGE)
        assert wire.call(Op.WRITE, write_in(MIB // 2, len(new)) + new).error == errno.ENOSPC
        assert wire.read(0, len(old)) == old
        assert wire.store.stats().failed_writes > 0
        assert wire.call(Op.FALLOCATE, fallocate_in(MIB // 2, MIB // 2, PUNCH_HOLE | KEEP_SIZE)).error == 0
        assert wire.write(MIB // 2, b"free again") == 10


def test_what_is_not_served_is_enosys():
    """FSYNC and FLUSH too: the kernel then does them without asking."""
    with wired() as wire:
        served = {*ARGUMENTS, *FORGET_LIKE}
        for opcode in [*range(64), 4096, 0xFFFFFFFF, 26 << 24]:
            if opcode not in served:
                for body in (b"", bytes(64)):
                    assert wire.call(opcode, body, nodeid=0).error == errno.ENOSYS, opcode
        assert wire.lane.stats().protocol_errors == 0


def test_requests_without_an_answer():
    with wired() as wire:
        for opcode in FORGET_LIKE:
            wire.send(opcode, ARGUMENTS[opcode])
            wire.send(opcode, b"", length=1)
        assert wire.silent()
        assert wire.call(Op.DESTROY).error == 0
        assert wire.lane.stats().protocol_errors == len(FORGET_LIKE)


# --- requests that do not hold together

@pytest.mark.parametrize("opcode", [op for op in ARGUMENTS if op not in FORGET_LIKE])
def test_short_requests_are_refused(opcode):
    with wired() as wire:
        body = ARGUMENTS[opcode][:16] if opcode == Op.INIT else ARGUMENTS[opcode]
        counted = 0
        for size in range(0, len(body), 4):
            assert wire.call(opcode, body[:size]).error == errno.EINVAL, size
            counted += 1
        for length in (0, 39, 40 + len(body) - 1, 40 + len(body) + 1, MIB, 0xFFFFFFFF):
            assert wire.call(opcode, body, length=length).error == errno.EINVAL, length
            counted += 1
        assert wire.lane.stats().protocol_errors == counted
        assert wire.lane.open_count == 0
        assert wire.call(Op.GETATTR, bytes(16)).error == 0


def test_requests_too_short_to_be_answered():
    with wired() as wire:
        for size in (1, 8, 39):
            wire.kernel.send(header(Op.READ, size, 2)[:size])
        assert wire.silent()
        assert wire.lane.stats().protocol_errors == 3
        assert wire.attributes()["size"] == MIB


def test_other_nodes_do_not_exist():
    with wired() as wire:
        for opcode in ARGUMENTS:
            if opcode not in (*FORGET_LIKE, Op.INIT, Op.DESTROY):
                for nodeid in (0, 2, U64 - 1):
                    assert wire.call(opcode, ARGUMENTS[opcode], nodeid=nodeid).error == errno.EINVAL
