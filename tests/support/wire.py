# SPDX-License-Identifier: Apache-2.0
"""The kernel's end of a FUSE connection, played by the test over a socket pair.

SOCK_SEQPACKET keeps the borders of messages as /dev/fuse does: each read of the lane is one request,
each of its writes one reply. Structures are those of <linux/fuse.h>, written down a second time.
"""
from __future__ import annotations

import itertools
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from zramfs.lane.lane import Lane
from zramfs.store.store import Store

PAGE, MIB = 4096, 1 << 20
TIMEOUT = 60.0  # seconds for any reply
SO_SNDBUFFORCE = 32  # root may have messages above net.core.wmem_max

FORGET_LIKE = (2, 36, 42)  # no reply: FORGET, INTERRUPT, BATCH_FORGET


class Op(IntEnum):
    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    ACCESS = 34
    INTERRUPT = 36
    DESTROY = 38
    IOCTL = 39
    BATCH_FORGET = 42
    FALLOCATE = 43
    LSEEK = 46


KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10
SEEK_DATA, SEEK_HOLE = 3, 4
SETATTR_FIELDS = (
    "valid", "padding", "fh", "size", "lock_owner", "atime", "mtime", "ctime", "atimensec", "mtimensec",
    "ctimensec", "mode", "unused4", "uid", "gid", "unused5",
)
ATTR_FIELDS = (
    "ino", "size", "blocks", "atime", "mtime", "ctime", "atimensec", "mtimensec", "ctimensec", "mode",
    "nlink", "uid", "gid", "rdev", "blksize", "flags",
)
STATFS_FIELDS = ("blocks", "bfree", "bavail", "files", "ffree", "bsize", "namelen", "frsize")
INIT_FIELDS = (
    "major", "minor", "max_readahead", "flags", "max_background", "congestion_threshold", "max_write",
    "time_gran", "max_pages", "map_alignment", "flags2",
)

_unique = itertools.count(2, 2)


def header(opcode: int, length: int, unique: int, nodeid: int = 1, pid: int = 4711) -> bytes:
    return struct.pack("=IIQQIIIHH", length, opcode, unique, nodeid, 1000, 1000, pid, 0, 0)


def read_in(offset: int, size: int) -> bytes:
    return struct.pack("=QQIIQII", 0, offset, size, 0, 0, 0, 0)


def write_in(offset: int, size: int) -> bytes:
    return struct.pack("=QQIIQII", 0, offset, size, 0, 0, 0, 0)


def fallocate_in(offset: int, length: int, mode: int) -> bytes:
    return struct.pack("=QQQII", 0, offset, length, mode, 0)


def lseek_in(offset: int, whence: int) -> bytes:
    return struct.pack("=QQII", 0, offset, whence, 0)


def setattr_in(**fields: int) -> bytes:
    return struct.pack("=IIQQQQQQ8I", *(fields.get(name, 0) for name in SETATTR_FIELDS))


def init_in(major: int = 7, minor: int = 45, flags: int = 0) -> bytes:
    """As kernels do: 16 bytes before 7.36, then 64 with the high flags."""
    head = struct.pack("=IIII", major, minor, 128 << 10, flags & 0xFFFFFFFF)
    return head if minor < 36 else head + struct.pack("=I11I", flags >> 32, *[0] * 11)


ARGUMENTS = {  # of a valid request that changes nothing
    Op.GETATTR: bytes(16), Op.SETATTR: setattr_in(), Op.OPEN: bytes(8), Op.READ: read_in(0, 1),
    Op.WRITE: write_in(0, 0), Op.STATFS: b"", Op.RELEASE: bytes(24), Op.INIT: init_in(),
    Op.INTERRUPT: bytes(8), Op.DESTROY: b"", Op.FORGET: bytes(8), Op.BATCH_FORGET: bytes(8),
    Op.FALLOCATE: fallocate_in(0, PAGE, PUNCH_HOLE | KEEP_SIZE),
    Op.LSEEK: lseek_in(0, SEEK_HOLE),
}


@dataclass(frozen=True)
class Reply:
    error: int
    unique: int
    data: bytes


class Wire:
    def __init__(self, kernel: socket.socket, lane: Lane, store: Store | None) -> None:
        self.kernel, self.lane, self.store = kernel, lane, store
        self._opens: set[int] = set()  # requests
        self._handles: list[int] = []

    def send(self, opcode: int, body: bytes = b"", *, unique: int | None = None, nodeid: int = 1,
             length: int | None = None, pid: int = 4711) -> int:
        """Returns the request's unique. length: what the header says instead of the truth."""
        unique = next(_unique) if unique is None else unique
        if length is None:
            length = 40 + len(body)
        self.kernel.send(header(opcode, length, unique, nodeid, pid) + body)
        if opcode == Op.OPEN:
            self._opens.add(unique)
        return unique

    def receive(self) -> Reply:
        message = self.kernel.recv(16 + MIB + PAGE)
        assert len(message) >= 16, f"a reply of {len(message)} bytes"
        length, error, unique = struct.unpack_from("=IiQ", message)
        assert length == len(message), "the kernel refuses a reply whose length is not the truth"
        assert -512 < error <= 0, "the kernel refuses other errors"
        assert error == 0 or length == 16, "an error carries no data"
        if unique in self._opens and not error:
            self._handles.append(struct.unpack_from("=Q", message, 16)[0])
        return Reply(-error, unique, message[16:])

    def release_in(self) -> bytes:
        """Of the file that was opened last and is not released."""
        return struct.pack("=QQQ", self._handles.pop(), 0, 0)

    def call(self, opcode: int, body: bytes = b"", **how: int) -> Reply:
        unique = self.send(opcode, body, **how)
        reply = self.receive()
        assert reply.unique == unique
        return reply

    def silent(self, seconds: float = 0.05) -> bool:
        return not select.select([self.kernel], [], [], seconds)[0]

    def read(self, offset: int, size: int) -> bytes:
        reply = self.call(Op.READ, read_in(offset, size))
        assert reply.error == 0, reply
        return reply.data

    def write(self, offset: int, data: bytes) -> int:
        """Returns the bytes written."""
        reply = self.call(Op.WRITE, write_in(offset, len(data)) + data)
        assert reply.error == 0, reply
        return struct.unpack("=II", reply.data)[0]

    def attributes(self, reply: Reply | None = None) -> dict[str, int]:
        reply = reply or self.call(Op.GETATTR, bytes(16))
        assert reply.error == 0 and len(reply.data) == 104, reply
        return dict(zip(ATTR_FIELDS, struct.unpack_from("=QQQQQQ10I", reply.data, 16), strict=True))

    def init(self, **how: int) -> dict[str, int]:
        reply = self.call(Op.INIT, init_in(**how), nodeid=0)
        assert reply.error == 0 and len(reply.data) == 64, reply
        return dict(zip(INIT_FIELDS, struct.unpack_from("=IIIIHHIIHHI", reply.data), strict=True))


def lane_threads() -> dict[str, Path]:
    """Name -> /proc directory of this process's lane threads."""
    named = {}
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            named[(task / "comm").read_text().strip()] = task
    return {name: task for name, task in named.items() if name.startswith("zramfs-lane")}


@contextmanager
def wired(
    size: int | None = 1 << 20, *, threads: int = 2, start: bool = True, **more: object
) -> Iterator[Wire]:
    """A lane on a socket pair, with a store of `size` bytes, or without one."""
    kernel, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kernel.settimeout(TIMEOUT)
    for end in (kernel, ours):
        try:
            end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 4 * MIB)
        except PermissionError:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MIB)  # cut to the limit
    lane = Lane(ours.detach(), threads=threads)
    store = Store(size, **more) if size else None
    with kernel:
        lane.set_store(store)
        if start:
            lane.start()
        yield Wire(kernel, lane, store)
        lane.abort()
    if start:
        assert lane.join(TIMEOUT), "the threads do not end"
    else:
        lane.set_store(None)
    if store:
        store.close()
