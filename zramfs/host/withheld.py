# SPDX-License-Identifier: Apache-2.0
"""Free blocks of a mounted file system that its users do not get.

A file system on a device that may run out of memory has more free blocks than the device can take data. Each
of these classes takes some out of its users' reach, so that a program that writes too much gets ENOSPC from
the file system at once.

    ext4    blocks reserved for what was promised already: /sys/fs/ext4/loopN/reserved_clusters
    xfs     the same, by the ioctl XFS_IOC_SET_RESBLKS
    others  files without a name (O_TMPFILE), whose blocks are allocated and never written. They vanish with
            the process that has them open

The first two are one number in the kernel (12 us a change, no I/O, also for root) and say nothing of whose
the blocks are. Not to be used in a process that serves the device: others may wait for its I/O.
"""
from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

# <linux/btrfs.h>: struct btrfs_ioctl_dev_info_args is 4096 bytes: devid, uuid, bytes_used, total_bytes ...
_BTRFS_IOC_DEV_INFO, _DEV_INFO_SIZE, _DEV_INFO_TOTAL = 0xD000941E, 4096, 32


def sync(directory: int) -> None:
    """syncfs(2): what was deleted is discarded after it. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syncfs(directory):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Withheld(ABC):
    """directory: an open directory of the file system. All sizes are bytes."""

    works_frozen = False  # whether withhold() may be called while the file system is frozen
    quick = True  # whether withhold() is done in much less time than a write takes
    prompt = False  # whether what is deleted is discarded at once, and not by the next commit

    def __init__(self, directory: int, device: str) -> None:
        self.directory = directory
        self.device = device
        self.block = os.fstatvfs(directory).f_frsize

    @abstractmethod
    def free(self) -> int:
        """What is in nobody's files, with what is withheld."""

    @abstractmethod
    def withheld(self) -> int: ...

    @abstractmethod
    def withhold(self, nbytes: int) -> None:
        """About as much. Raises OSError."""

    @abstractmethod
    def close(self) -> None:
        """Gives everything back."""


class ReservedClusters(Withheld):
    """ext4."""

    works_frozen = True
    prompt = True

    def __init__(self, directory: int, device: str) -> None:
        super().__init__(directory, device)
        self._file = Path(f"/sys/fs/ext4/{Path(device).name}/reserved_clusters")
        # The kernel's own default, unless somebody has set less: a warden that died left more.
        blocks = os.fstatvfs(directory).f_blocks
        self._least = min(self._read(), blocks // 50, 4096)
        self._write(self._least)  # where /sys is read-only it fails here

    def free(self) -> int:
        return os.fstatvfs(self.directory).f_bfree * self.block

    def withheld(self) -> int:
        return self._read() * self.block

    def withhold(self, nbytes: int) -> None:
        self._write(max(self._least, nbytes // self.block))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._write(self._least)

    def _read(self) -> int:
        return int(self._file.read_text(encoding="utf-8"))

    def _write(self, blocks: int) -> None:
        self._file.write_text(str(blocks), encoding="utf-8")


class ReservedBlocks(Withheld):
    """xfs. Blocks that are freed go to the reserve first, while that is not full."""

    _SET = 3 << 30 | 16 << 16 | ord("X") << 8 | 114
    _GET = 2 << 30 | 16 << 16 | ord("X") << 8 | 115
    _BLOCKS = struct.Struct("=QQ")  # wanted, there

    def __init__(self, directory: int, device: str) -> None:
        super().__init__(directory, device)
        # As in ReservedClusters.
        self._least = min(self._call(self._GET)[0], os.fstatvfs(directory).f_blocks // 20, 8192)

    def free(self) -> int:
        return os.fstatvfs(self.directory).f_bfree * self.block + self.withheld()

    def withheld(self) -> int:
        return self._call(self._GET)[1] * self.block

    def withhold(self, nbytes: int) -> None:
        self._call(self._SET, max(self._least, nbytes // self.block))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._call(self._SET, self._least)

    def _call(self, request: int, wanted: int = 0) -> tuple[int, int]:
        answer = fcntl.ioctl(self.directory, request, self._BLOCKS.pack(wanted, 0))
        found, there = self._BLOCKS.unpack(answer)
        return found, there


class NamelessFiles(Withheld):
    """Any file system with O_TMPFILE and fallocate. A call may wait for what is being written."""

    quick = False
    _SLACK = 2 << 20  # bytes: what is short for a moment is not worth a file

    def __init__(self, directory: int, device: str) -> None:
        super().__init__(directory, device)
        self._files: list[tuple[int, int]] = []  # descriptor, bytes
        self._withheld = 0

    def free(self) -> int:
        return os.fstatvfs(self.directory).f_bavail * self.block + self._withheld

    def withheld(self) -> int:
        return self._withheld

    def withhold(self, nbytes: int) -> None:
        wanted = -(-nbytes // self.block) * self.block
        if wanted > self._withheld + self._SLACK:
            self._add(min(wanted - self._withheld, self.obtainable()))
        if self._withheld > wanted:
            while self._withheld > wanted:
                self._give_back(self._withheld - wanted)
            self.settle()

    def obtainable(self) -> int:
        """What a file could be given at once."""
        return self.free() - self._withheld

    def settle(self) -> None:
        """Returns when free() knows of what was given back."""

    def close(self) -> None:
        while self._files:
            self._drop()

    def _add(self, nbytes: int) -> None:
        """As much of it as there is room for."""
        while nbytes >= self.block:
            try:
                file = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self.directory)
                try:
                    os.posix_fallocate(file, 0, nbytes)
                except OSError:
                    os.close(file)
                    raise
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                nbytes = nbytes // 2 // self.block * self.block
            else:
                self._files.append((file, nbytes))
                self._withheld += nbytes
                return

    def _give_back(self, nbytes: int) -> None:
        """Some of it, from the last file."""
        file, size = self._files[-1]
        if nbytes < size:
            try:
                os.ftruncate(file, size - nbytes)
            except OSError as error:
                # btrfs cannot shorten a file when it has no block left, but it can drop one.
                if error.errno != errno.ENOSPC:
                    raise
            else:
                self._files[-1] = file, size - nbytes
                self._withheld -= nbytes
                return
        self._drop()

    def _drop(self) -> None:
        file, size = self._files.pop()
        os.close(file)
        self._withheld -= size


class BtrfsFiles(NamelessFiles):
    """btrfs. Its statfs leaves out what the running transaction has taken; /sys has what it allocates by."""

    def __init__(self, directory: int, device: str) -> None:
        super().__init__(directory, device)
        name = Path(device).name
        places = [each for each in Path("/sys/fs/btrfs").glob("*/devices/" + name)]
        if not places:
            raise OSError(errno.ENOENT, f"/sys/fs/btrfs/*/devices has no {name}")
        self._place = places[0].parent.parent / "allocation"
        self._size()

    def _size(self) -> int:
        """Of the device, as far as the file system uses it, which a resize changes. Raises OSError."""
        request = bytearray(_DEV_INFO_SIZE)
        struct.pack_into("=Q", request, 0, 1)  # the only device of the file system
        fcntl.ioctl(self.directory, _BTRFS_IOC_DEV_INFO, request)
        return int(struct.unpack_from("=Q", request, _DEV_INFO_TOTAL)[0])

    def free(self) -> int:
        unallocated, free = self._size(), 0
        for kind in ("mixed", "data", "metadata", "system"):
            if not (self._place / kind).is_dir():
                continue
            unallocated -= self._read(kind, "disk_total")
            if kind in ("mixed", "data"):
                # Without bytes_may_use: that counts what a write may need at the worst, and comes and goes.
                taken = sum(self._read(kind, f"bytes_{what}") for what in ("used", "reserved", "readonly"))
                free += self._read(kind, "total_bytes") - taken
        return max(0, free) + max(0, unallocated - (1 << 20)) + self.withheld()

    def settle(self) -> None:
        sync(self.directory)

    def obtainable(self) -> int:
        # What was deleted is nobody's until the next commit, and discarded by then.
        kinds = (kind for kind in ("mixed", "data") if (self._place / kind).is_dir())
        return max(0, super().obtainable() - sum(self._read(kind, "bytes_pinned") for kind in kinds))

    def _read(self, kind: str, what: str) -> int:
        return int((self._place / kind / what).read_text(encoding="utf-8"))


def of(fstype: str, directory: int, device: str) -> Withheld:
    """The way for a file system. Raises OSError where there is none."""
    ways: dict[str, Callable[[int, str], Withheld]] = {
        "ext4": ReservedClusters, "xfs": ReservedBlocks, "btrfs": BtrfsFiles}
    try:
        return ways[fstype](directory, device) if fstype in ways else NamelessFiles(directory, device)
    except OSError:
        # /sys may be read-only, as in most containers.
        return NamelessFiles(directory, device)
