# SPDX-License-Identifier: Apache-2.0
"""Paths that root makes, opens or mounts on, although another user may change a directory on the way.

A path is walked one name at a time, each opened with O_NOFOLLOW below the descriptor of the last. A link is
followed only while every directory so far is root's alone: it belongs to root, neither group nor others may
write to it (a sticky one like /tmp counts as theirs), and it is not on FUSE, where a user's program says
whose everything is. Below the first directory that is not, a link is refused with a sentence. What is used
then is the descriptor, so a later rename changes nothing.

An ordinary user walks with his own rights alone: his links are followed as ever.
"""
from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from zramfs.errors import ZramfsError

from . import mounts, paths

_WAY = os.O_PATH | os.O_CLOEXEC
_MAX_LINKS = 40  # as in the kernel


class _Walk:
    """The way along a path: the descriptor of the directory that was reached, its name without links, and the
    names that are left, at least one. More than one is left where a directory is missing."""

    def __init__(self, path: str | Path, make_parents: bool = False) -> None:
        self.path = os.path.abspath(path)
        self.left = self.path.split("/")
        self.done: list[str] = []
        self.shared: str | None = None  # why somebody but root can change what lies below
        self._fstypes = {each.id: each.fstype for each in mounts.mounts()}
        self._links = 0
        self.fd = os.open("/", _WAY)
        try:
            self._restart()
            while self._step(make_parents):
                pass
        except OSError as error:
            self.close()
            if isinstance(error, ZramfsError):
                raise
            raise ZramfsError(error.errno or errno.EIO, f"{self.path}: {error.strerror}") from None

    def close(self) -> None:
        os.close(self.fd)

    @property
    def name(self) -> str:
        return self.left[0]

    @property
    def resolved(self) -> Path:
        return Path(os.path.normpath("/" + "/".join([*self.done, *self.left])))

    def _restart(self) -> None:
        self._enter(os.open("/", _WAY), [])

    def _enter(self, fd: int, done: list[str]) -> None:
        os.close(self.fd)
        self.fd, self.done = fd, done
        self.shared = self.shared or self._sharing()

    def _sharing(self) -> str | None:
        seen = os.fstat(self.fd)
        place = "/" + "/".join(self.done)
        if seen.st_uid != 0:
            return f"{place} belongs to uid {seen.st_uid}"
        if seen.st_mode & 0o022:
            return f"others may write to {place} (mode {stat.S_IMODE(seen.st_mode):04o})"
        number = mounts.mount_id(f"/proc/self/fdinfo/{self.fd}")
        if self._fstypes.get(number or 0, "").startswith("fuse"):
            return f"{place} is on FUSE"
        return None

    def _step(self, make_parents: bool) -> bool:
        """Goes one name further; False at the end."""
        while len(self.left) > 1 and self.left[0] in ("", "."):
            self.left.pop(0)
        if self.left == [""]:
            self.left = ["."]
        name = self.left[0]
        if name == "..":
            self._enter(os.open("..", _WAY, dir_fd=self.fd), self.done[:-1])
            self.left = self.left[1:] or ["."]
            return True
        try:
            there = os.open(name, _WAY | os.O_NOFOLLOW, dir_fd=self.fd)
        except NotADirectoryError:
            if make_parents:
                raise
            return False
        except FileNotFoundError:
            if len(self.left) == 1 or not make_parents:
                return False
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=self.fd)
            return True
        if (target := _link_target(there)) is not None:
            os.close(there)
            self._follow(name, target)
            return True
        if len(self.left) == 1:
            os.close(there)
            return False
        self.left.pop(0)
        self._enter(there, [*self.done, name])
        return True

    def _follow(self, name: str, target: str) -> None:
        if self.shared:
            _refuse_link(self.path, "/" + "/".join([*self.done, name]), self.shared)
        self._links += 1
        if self._links > _MAX_LINKS:
            raise ZramfsError(errno.ELOOP, f"{self.path} runs in a circle of symbolic links")
        if target.startswith("/"):
            self._restart()
        self.left = target.split("/") + self.left[1:]


def _link_target(fd: int) -> str | None:
    """None for what is no link. Not by fstat, which asks the server of a FUSE mount."""
    with contextlib.suppress(OSError):
        return os.readlink("", dir_fd=fd)
    return None


def _refuse_link(path: str, link: str, why: str) -> NoReturn:
    raise ZramfsError(
        errno.ELOOP,
        f"{path} leads through the link {link}, which root does not follow, because {why}: expected a path "
        "without links from there on")


def _is_root() -> bool:
    return os.geteuid() == 0


def resolve(path: str | Path) -> Path:
    """Absolute, without symbolic links, for a place that is to be made, opened or mounted on; what does not
    exist stays as it is written. Raises ZramfsError: ELOOP for a link that root must not follow."""
    if not _is_root():
        return paths.resolve(path)
    walk = _Walk(path)
    walk.close()
    return walk.resolved


@contextlib.contextmanager
def parent_of(path: str | Path, *, make_parents: bool = False) -> Iterator[tuple[int, str]]:
    """An O_PATH descriptor of the directory that holds `path`, and the name in it, which is no link that root
    must not follow. make_parents: missing directories on the way are made, with mode 0755.

    Raises ZramfsError: ENOENT for a missing one, ELOOP for a link.
    """
    walk = _Walk(path, make_parents)
    try:
        if len(walk.left) > 1:
            raise ZramfsError(errno.ENOENT, f"{path}: {os.strerror(errno.ENOENT)}")
        yield walk.fd, walk.name
    finally:
        walk.close()


def open_path(path: str | Path, flags: int, mode: int = 0o600) -> int:
    """As os.open() with O_CLOEXEC, but see above. Raises OSError; ZramfsError(ELOOP) for a link."""
    if not _is_root():
        return os.open(path, flags | os.O_CLOEXEC, mode)
    walk = _Walk(path)
    try:
        if len(walk.left) > 1:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        try:
            fd = os.open(walk.name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=walk.fd)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        _expect_single(fd, walk)
        return fd
    finally:
        walk.close()


def _expect_single(fd: int, walk: _Walk) -> None:
    """A hard link is as good as a symbolic one where a user can make it; O_NOFOLLOW with O_PATH opens the
    symbolic one itself, put there since the walk."""
    if not walk.shared:
        return
    # A directory has several names for itself, and a device is known by its number.
    seen = os.fstat(fd)
    if stat.S_ISLNK(seen.st_mode):
        os.close(fd)
        _refuse_link(walk.path, walk.path, walk.shared)
    if stat.S_ISREG(seen.st_mode) and seen.st_nlink > 1:
        os.close(fd)
        raise ZramfsError(
            errno.EMLINK,
            f"{walk.path} is one of {seen.st_nlink} names of a file, and {walk.shared}: expected a file that "
            "has no other name")


def make_directory(path: str | Path, mode: int = 0o755) -> None:
    """As os.mkdir()."""
    with parent_of(path) as (fd, name):
        os.mkdir(name, mode, dir_fd=fd)


def make_parents(path: str | Path) -> None:
    """Makes the directories above `path` that are missing, with mode 0755."""
    with parent_of(path, make_parents=True):
        pass


def remove_directory(path: str | Path) -> None:
    """As os.rmdir()."""
    with parent_of(path) as (fd, name):
        os.rmdir(name, dir_fd=fd)


def replaceable(path: Path) -> str | None:
    """Why somebody but root can put something else in the place of `path`; None if nobody can, or this
    process is an ordinary user's. A sticky directory keeps what root made in it."""
    if not _is_root():
        return None
    for above in path.parents:
        try:
            seen = os.lstat(above)
        except FileNotFoundError:
            continue
        if stat.S_ISLNK(seen.st_mode):
            return f"{above} is a link"
        if seen.st_uid != 0:
            return f"{above} belongs to uid {seen.st_uid}"
        if seen.st_mode & 0o022 and not seen.st_mode & stat.S_ISVTX:
            return f"others may write to {above} (mode {stat.S_IMODE(seen.st_mode):04o})"
    return None
