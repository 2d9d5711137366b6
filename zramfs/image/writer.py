# SPDX-License-Identifier: Apache-2.0
"""Writes an image, and puts it in the place of the older one when it is whole and on the disk.

Until then it is a file without a name (O_TMPFILE), which ends with the process. A file system that has no
such files gets one beside the name, which a save that is killed leaves behind. So does one that is killed in
the moment between the two steps that give a file its name. The next save and the next start remove it.
"""
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
# What a file system says that has no file without a name: NFS and FAT, and FUSE before Linux 6.2.
_NO_NAMELESS = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOSYS, errno.EINVAL)
# Bytes after which the disk gets what was written: so the page cache is not filled with what nobody reads,
# and the last fsync is short. (A guess.)
FLUSH = 16 << 20


class ImageWriter:
    """In this order: head(), part() for each part, commit(). close() in any case: without commit() the file
    that was there before stays, and nothing else is left.

    force: replace a file that is no image. Raises ZramfsError: EEXIST for such a file without force, EBUSY
    while another save replaces the same file, ENOSPC and what else the file system says. Of two that make the
    first file of a name at once, the last one counts.
    """

    def __init__(self, path: Path, *, force: bool = False) -> None:
        self.path = path
        self._directory = self._fd = self._old = -1
        self._is_named = False
        self._head = b""
        self._id = b""
        self._parts = self._at = self._flushed = 0
        try:
            with safe_paths.parent_of(path) as (directory, self._name):
                self._directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
            self._expect_replaceable(force)
            _remove_left(self._directory, self._beside, self.path)
            self._fd = self._open_new()
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
        """Keeps the old file open and locked, so that no other save replaces it."""
        try:
            self._old = os.open(self._name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
                                dir_fd=self._directory)
        except FileNotFoundError:
            return
        seen = os.fstat(self._old)
        start = os.pread(self._old, len(layout.HEAD_MAGIC), 0) if stat.S_ISREG(seen.st_mode) else b""
        if not stat.S_ISREG(seen.st_mode) or seen.st_size and start != layout.HEAD_MAGIC and not force:
            raise ZramfsError(
                errno.EEXIST, f"{self.path} is there and is no image of a zramfs device: expected one to "
                "replace, or a name that is not taken")
        _lock(self._old, self.path)

    def _open_new(self) -> int:
        """Empty, ours and locked."""
        try:
            fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self._directory)
        except OSError as error:
            if error.errno not in _NO_NAMELESS:
                raise
        else:
            fcntl.flock(fd, fcntl.LOCK_EX)
            return fd
        while True:
            fd = os.open(self._beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
                         0o600, dir_fd=self._directory)
            try:
                _lock(fd, self.path)
                if _is_at(fd, self._directory, self._beside):
                    self._is_named = True
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # another save has taken it for a leftover before it was locked

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
            if not self._is_named:
                self._give_name()
            os.rename(self._beside, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            self._is_named = False
            os.fsync(self._directory)
        except OSError as error:
            raise self._failed(error) from None

    def _give_name(self) -> None:
        """Raises FileExistsError where another save is at the same step."""
        os.link(f"/proc/self/fd/{self._fd}", self._beside, dst_dir_fd=self._directory)
        self._is_named = True
        # It has another number of names. The old file is replaced when the disk has that, too.
        os.fsync(self._fd)

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
        if self._is_named:
            with contextlib.suppress(OSError):
                os.unlink(self._beside, dir_fd=self._directory)
            self._is_named = False
        for fd in (self._fd, self._old, self._directory):
            if fd >= 0:
                os.close(fd)
        self._fd = self._old = self._directory = -1


def remove_left(path: Path) -> None:
    """What a save to `path` has left that was killed. Raises ZramfsError: EEXIST where something else has
    that name, EBUSY while a save is at work."""
    try:
        with safe_paths.parent_of(path) as (directory, name):
            _remove_left(directory, name + ENDING, path)
    except OSError as error:
        if isinstance(error, ZramfsError):
            raise
        raise ZramfsError(error.errno or errno.EIO, f"{path}{ENDING}: {error.strerror}") from None


def _remove_left(directory: int, beside: str, path: Path) -> None:
    """As remove_left(). Raises OSError, too."""
    try:
        fd = os.open(beside, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return
    try:
        seen = os.fstat(fd)
        if not stat.S_ISREG(seen.st_mode) or seen.st_uid != os.geteuid() or seen.st_nlink > 1:
            raise ZramfsError(
                errno.EEXIST, f"{path}{ENDING} is in the way: expected no such file, or one that a save has "
                "left; remove it")
        _lock(fd, path)
        if _is_at(fd, directory, beside):  # not renamed before it was locked
            os.unlink(beside, dir_fd=directory)
    finally:
        os.close(fd)


def _is_at(fd: int, directory: int, name: str) -> bool:
    """Whether the open file has this name."""
    seen = os.fstat(fd)
    with contextlib.suppress(FileNotFoundError):
        now = os.stat(name, dir_fd=directory, follow_symlinks=False)
        return (now.st_dev, now.st_ino) == (seen.st_dev, seen.st_ino)
    return False


def _lock(fd: int, path: Path) -> None:
    """Until it is closed. Raises ZramfsError(EBUSY), and OSError."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ZramfsError(errno.EBUSY, f"another save is writing {path}") from None
