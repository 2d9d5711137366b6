# SPDX-License-Identifier: Apache-2.0
"""A zram device of the kernel and a zramfs device, driven alike: every operation answers what
became of it, as a value that can be compared."""
from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support.kernel_zram import CONTROL, KernelZram, kernel_zram, unbothered
from tests.support.whole import MM_STAT, PAGE, Device, device

BLKDISCARD, BLKZEROOUT = 0x1277, 0x127F
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
_libc = ctypes.CDLL(None, use_errno=True)


def outcome(call: Callable[[], object]) -> object:
    """What call() answers, or the name of its errno."""
    try:
        return call()
    except OSError as error:
        return errno.errorcode[error.errno]


class Twin:
    """attributes: the directory of the files of /sys/block/zramN; disk: what takes I/O; control: where
    devices are added and removed."""

    def __init__(self, attributes: Path, disk: Path, control: Path) -> None:
        self.attributes = attributes
        self.disk = disk
        self.control = control
        self.held: int | None = None

    def show(self, name: str) -> str:
        return (self.attributes / name).read_text()

    def numbers(self, name: str) -> list[int]:
        return [int(word) for word in self.show(name).split()]

    def store(self, name: str, data: bytes) -> int | str:
        """One write(2) of these bytes, opened as a shell opens it for `>`."""
        def write() -> int:
            fd = os.open(self.attributes / name, os.O_WRONLY | os.O_TRUNC)
            try:
                return os.write(fd, data)
            finally:
                os.close(fd)

        # A looker-on of the machine is not the opener that a test is about.
        alone = name == "reset" and self.held is None
        return outcome((lambda: unbothered(write)) if alone else write)

    def hold(self) -> None:
        """Has the disk open from here on, as a mount or swap has."""
        if self.held is None:
            self.held = os.open(self.disk, os.O_RDONLY)

    def let_go(self) -> None:
        if self.held is not None:
            os.close(self.held)
            self.held = None

    def io(self, call: Callable[[int], object]) -> object:
        def opened() -> object:
            fd = os.open(self.disk, os.O_RDWR | os.O_DIRECT)
            try:
                return call(fd)
            finally:
                os.close(fd)

        return outcome(opened)

    def write(self, page: int, data: bytes) -> int | str:
        with mmap.mmap(-1, len(data)) as aligned:
            aligned[:] = data
            return self.io(lambda fd: os.pwritev(fd, [aligned], page * PAGE))

    def read(self, page: int, pages: int) -> bytes | str:
        with mmap.mmap(-1, pages * PAGE) as aligned:
            got = self.io(lambda fd: os.preadv(fd, [aligned], page * PAGE))
            return got if isinstance(got, str) else aligned[:got]

    def discard(self, page: int, pages: int) -> object:
        raise NotImplementedError

    def zero(self, page: int, pages: int) -> object:
        raise NotImplementedError


class Theirs(Twin):
    def __init__(self, zram: KernelZram) -> None:
        super().__init__(zram.directory, zram.disk, CONTROL)

    def discard(self, page: int, pages: int) -> object:
        return self._ioctl(BLKDISCARD, page, pages)

    def zero(self, page: int, pages: int) -> object:
        return self._ioctl(BLKZEROOUT, page, pages)

    def _ioctl(self, request: int, page: int, pages: int) -> object:
        area = struct.pack("=QQ", page * PAGE, pages * PAGE)
        return self.io(lambda fd: fcntl.ioctl(fd, request, area) and None)


class Ours(Twin):
    """The same by the calls into which a loop device turns these ioctls."""

    def __init__(self, device: Device) -> None:
        super().__init__(device.directory / "zram", device.disk, device.directory)

    def discard(self, page: int, pages: int) -> object:
        return self._fallocate(PUNCH_HOLE | KEEP_SIZE, page, pages)

    def zero(self, page: int, pages: int) -> object:
        return self._fallocate(ZERO_RANGE, page, pages)

    def _fallocate(self, mode: int, page: int, pages: int) -> object:
        def call(fd: int) -> None:
            if _libc.fallocate(fd, mode, ctypes.c_long(page * PAGE), ctypes.c_long(pages * PAGE)):
                raise OSError(ctypes.get_errno(), "fallocate")

        return self.io(call)


Pair = tuple[Theirs, Ours]


@contextlib.contextmanager
def twin_devices(directory: Path) -> Iterator[Pair]:
    """directory: of ours."""
    # One thread: where two write at once and find no zspage with room, each makes one, and memory differs by
    # more than a hundredth. The kernel's is written by one as well.
    with kernel_zram() as zram, device(directory, None, "--threads", 1) as z:
        # The kernel has no compactor: what ours does unasked is no difference that a test is to find.
        z.write("memory/proactiveness", "0")
        pair = Theirs(zram), Ours(z)
        try:
            yield pair
        finally:
            for twin in pair:
                twin.let_go()


def reset_both(pair: Pair) -> None:
    """As a new device is, but that the kernel's default algorithm is another."""
    for twin in pair:
        twin.let_go()
        assert twin.store("reset", b"1") == 1
        assert twin.store("comp_algorithm", b"lz4") == 3


def both(pair: Pair, call: Callable[[Twin], object]) -> object:
    """What it answers for either, which must be the same."""
    theirs, ours = map(call, pair)
    assert ours == theirs
    return theirs


def mm_stat(twin: Twin) -> dict[str, int]:
    return dict(zip(MM_STAT, twin.numbers("mm_stat"), strict=True))
