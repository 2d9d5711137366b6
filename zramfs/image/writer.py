# SPDX-License-Identifier: Apache-2.0
"""Writes an image beside its name, and puts it there when it is whole and on the disk."""
from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path

from zramfs.errors import ZramfsError
from zramfs.host import safe_paths

from . import layout
from .layout import Head

ENDING = ".tmp"
# Bytes after which the disk gets what was written: so the page cache is not filled with what nobody reads,
# and the last fsync is short. (A guess.)
FLUSH = 16 << 20


class ImageWriter:
    """In this order: head(), part() for each part, commit(). close() in any case: without commit() the file
    that was there before stays, and nothing else is left.

    force: replace a file that is no image. Raises ZramfsError: EEXIST for such a file without force, EBUSY
    while another save writes there, ENOSPC and what else the file system says.
    """

    def __init__(self, path: Path, *, force: bool = False) -> None:
        self.path = path
        self._directory = self._fd = -1
        self._head = b""
        self._id = b""
        self._parts = self._at = self._flushed = 0
        try:
            with safe_paths.parent_of(path) as (directory, self._name):
                self._directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
            self._expect_replaceable(force)
            self._fd = self._open_beside()
        except ZramfsError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise self._failed(error) from None

    @property
    def _beside(self) -> str:
        return self._name + ENDING

    def _failed(self, error: OSError) -> ZramfsError:
        number = error.errno or errno.EIO
        return ZramfsError(
            number, f"{self.path} cannot be saved: {os.strerror(number)}; what was there before stays")

    def _expect_replaceable(self, force: bool) -> None:
        try:
            fd = os.open(self._name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
                         dir_fd=self._directory)
        except FileNotFoundError:
            return
        try:
            seen = os.fstat(fd)
            start = os.pread(fd, len(layout.HEAD_MAGIC), 0) if stat.S_ISREG(seen.st_mode) else b""
        finally:
            os.close(fd)
        if not stat.S_ISREG(seen.st_mode) or seen.st_size and start != layout.HEAD_MAGIC and not force:
            raise ZramfsError(
                errno.EEXIST, f"{self.path} is there and is no image of a zramfs device: expected one to "
                "replace, or a name that is not taken")

    def _open_beside(self) -> int:
        """The file beside, empty, ours and locked. One that a save left which was killed is used again."""
        while True:
            fd = os.open(self._beside, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
                         0o600, dir_fd=self._directory)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                seen = os.fstat(fd)
                if not stat.S_ISREG(seen.st_mode) or seen.st_uid != os.geteuid() or seen.st_nlink > 1:
                    raise ZramfsError(
                        errno.EEXIST, f"{self.path}{ENDING} is in the way: expected no such file, or one "
                        "that a save has left; remove it")
                if self._is_still(seen):
                    os.fchmod(fd, 0o600)
                    os.ftruncate(fd, 0)
                    return fd
            except BlockingIOError:
                os.close(fd)
                raise ZramfsError(errno.EBUSY, f"another save is writing {self.path}{ENDING}") from None
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # it was renamed or removed between the two calls

    def _is_still(self, seen: os.stat_result) -> bool:
        with contextlib.suppress(FileNotFoundError):
            now = os.stat(self._beside, dir_fd=self._directory, follow_symlinks=False)
            return (now.st_dev, now.st_ino) == (seen.st_dev, seen.st_ino)
        return False

    @property
    def device(self) -> int:
        """The number of the file system that the file is on."""
        return os.fstat(self._directory).st_dev

    @property
    def written(self) -> int:
        """Bytes."""
        return self._at

    def head(self, head: Head) -> None:
        self._id, self._head = head.id, head.pack()
        self._write(self._head)

    def part(self, directory: bytes, data: bytes) -> int:
        """Bytes written."""
        content = layout.pack_part(self._id, self._parts, directory, data)
        self._write(content)
        self._parts += 1
        return len(content)

    def commit(self) -> None:
        second = self._at
        self._write(self._head + layout.pack_trailer(self._id, second, self._parts))
        try:
            os.fsync(self._fd)
            os.rename(self._beside, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            os.close(self._fd)
            self._fd = -1
            os.fsync(self._directory)
        except OSError as error:
            raise self._failed(error) from None

    def _write(self, content: bytes) -> None:
        rest = memoryview(content)
        try:
            while rest:
                done = os.write(self._fd, rest)
                rest = rest[done:]
                self._at += done
            if self._at - self._flushed >= FLUSH:
                os.fdatasync(self._fd)
                os.posix_fadvise(self._fd, self._flushed, self._at - self._flushed, os.POSIX_FADV_DONTNEED)
                self._flushed = self._at
        except OSError as error:
            raise self._failed(error) from None

    def close(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.unlink(self._beside, dir_fd=self._directory)
            os.close(self._fd)
            self._fd = -1
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1
