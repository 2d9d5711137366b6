# SPDX-License-Identifier: Apache-2.0
"""The tree of a device: disk, control, and the attributes, as a pyfuse3 file system.

It behaves as sysfs does:
* The content of a file is made when it is read at offset 0, and stays the same for the small reads behind
  that. Its time of modification is the moment of the look, since what it says is as new as that.
* Each write(2) is one command, and its error is the command's.
* Nothing can be created or removed.
* A file without a reader (or a writer) cannot be opened for reading (or writing), not even by root.

The kernel lets one write at a time into an inode. So that nobody waits there for a command that takes long,
a file that can be written has several inode numbers: a lookup gives one that nobody has open for writing.
"""
from __future__ import annotations

import errno
import functools
import inspect
import itertools
import logging
import os
import stat
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import pyfuse3
import trio
from pyfuse3 import FUSEError

from .contents import Content, Contents

log = logging.getLogger(__name__)

TOUCH_NS = 1_000_000_000  # as much as a time that is meant to be the present one may differ from our clock
LINE_ROOM = 128  # bytes, more than a line of what is read with File.read_from


@dataclass(eq=False, kw_only=True)
class Node:
    """Mode and owner may be changed, as in sysfs; they last as long as the mount."""

    name: str
    mode: int
    size: int = 0
    inode: int = 0
    uid: int = field(default_factory=os.geteuid)
    gid: int = field(default_factory=os.getegid)
    atime_ns: int = field(default_factory=time.time_ns)
    mtime_ns: int = field(default_factory=time.time_ns)
    ctime_ns: int = field(default_factory=time.time_ns)

    @property
    def links(self) -> int:
        return 1

    def attributes(self, inode: int | None = None) -> pyfuse3.EntryAttributes:
        """inode: one of its numbers, None = the first."""
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode or self.inode
        entry.st_mode = self.mode
        entry.st_nlink = self.links
        entry.st_uid = self.uid
        entry.st_gid = self.gid
        entry.st_size = self.size
        entry.st_atime_ns = self.atime_ns
        entry.st_mtime_ns = self.mtime_ns
        entry.st_ctime_ns = self.ctime_ns
        return entry


@dataclass(eq=False, kw_only=True)
class File(Node):
    """read: the whole content. read_from: for what is too large for that, the lines from the number of a
    slot on that have room in so many bytes, and the slot where it goes on; the file's offset is such a
    number. choose, read_at: for what nobody reads as a whole. What is written to an open file chooses bytes,
    as (first, end), and reads of the same open file deliver these: read_at has an offset, and the most that
    it may answer. write: takes the bytes of one write(2) and answers how many it used."""

    has_own_time: bool = False
    read: Callable[[], bytes] | None = None
    read_from: Callable[[int, int], tuple[bytes, int]] | None = None
    choose: Callable[[bytes], tuple[int, int]] | None = None
    read_at: Callable[[int, int], bytes] | None = None
    write: Callable[[bytes], Awaitable[int]] | None = None
    more_inodes: list[int] = field(default_factory=list)

    def attributes(self, inode: int | None = None) -> pyfuse3.EntryAttributes:
        """A file that can be read says what is true at this moment, so the kernel keeps no attributes of it.
        A time that somebody has set stays, as in sysfs. One that can be written may have another number at
        the next open, and a change of mode or owner that was made by one number holds for all of them."""
        entry = super().attributes(inode)
        if self.read is not None or self.read_from is not None:
            if not self.has_own_time:
                entry.st_mtime_ns = time.time_ns()
            entry.attr_timeout = 0
        if self.write is not None:
            entry.entry_timeout = entry.attr_timeout = 0
        return entry


@dataclass(eq=False, kw_only=True)
class Link(Node):
    target: bytes


@dataclass(eq=False, kw_only=True)
class Directory(Node):
    children: list[Node]
    parent: Directory | None = None

    @property
    def links(self) -> int:
        return 2 + sum(isinstance(child, Directory) for child in self.children)

    def entries(self) -> Sequence[tuple[bytes, Node]]:
        below = ((os.fsencode(child.name), child) for child in self.children)
        return [(b".", self), (b"..", self.parent or self), *below]


@dataclass(eq=False, slots=True)
class Handle:
    """One open file. inode: the number that was opened; writes: whether for writing. content: of File.read,
    while its end has not been delivered. end: the offset behind the last read; slot, rest: for
    File.read_from, what comes next. chosen: for File.choose, and base, the offset of the first read since (a
    write moves the offset too)."""

    file: File
    user: int
    inode: int
    writes: bool
    content: Content | None = None
    end: int = 0
    slot: int = 0
    rest: bytes = b""
    chosen: tuple[int, int] = (0, 0)
    base: int | None = None


# Made in advance: without memory there might be none for the error either.
_NO_MEMORY = FUSEError(errno.ENOMEM)


def with_boundary(operation: Callable) -> Callable:
    """What no operation lets through: an exception that is not FUSEError would end pyfuse3's loop.

    Shielded: an operation that has begun is answered even when the loop around it is restarted
    or stopped (daemon/tree_server.py). Otherwise its caller would never get an answer.
    """

    @functools.wraps(operation)
    async def bounded(self: Tree, *args: object) -> object:
        with trio.CancelScope(shield=True) as scope:
            self.scopes.add(scope)
            try:
                return await operation(self, *args)
            except FUSEError:
                raise
            except MemoryError:
                # raise adds to the trace of the exception, which is not to grow.
                raise _NO_MEMORY.with_traceback(None) from None
            except OSError as error:
                raise FUSEError(error.errno or errno.EIO) from error
            except Exception:
                log.exception("%s%r failed in an unexpected way; answering EIO", operation.__name__, args)
                raise FUSEError(errno.EIO) from None
            finally:
                self.scopes.discard(scope)

    return bounded


def with_boundaries(cls: type[Tree]) -> type[Tree]:
    """Puts the boundary around every operation, those of the base class too."""
    for name, operation in inspect.getmembers(cls, inspect.iscoroutinefunction):
        if not name.startswith("_"):
            setattr(cls, name, with_boundary(operation))
    return cls


@with_boundaries
class Tree(pyfuse3.Operations):
    supports_dot_lookup = False

    def __init__(self, root: Directory) -> None:
        super().__init__()
        self._nodes: dict[int, Node] = {}
        self._handles: dict[int, Handle] = {}
        self._writers: Counter[int] = Counter()  # handles that are open for writing, by inode number
        self._contents = Contents(os.geteuid())
        self._numbers = itertools.count(1)
        self.scopes: set[trio.CancelScope] = set()  # of the operations under way
        self._number(root)

    def abandon_operations(self) -> None:
        """Those under way no longer hold up whoever cancels them."""
        for scope in self.scopes:
            scope.shield = False

    def _number(self, node: Node) -> None:
        node.inode = pyfuse3.ROOT_INODE + len(self._nodes)
        self._nodes[node.inode] = node
        match node:
            case Directory():
                node.mode |= stat.S_IFDIR
                for child in node.children:
                    if isinstance(child, Directory):
                        child.parent = node
                    self._number(child)
            case Link():
                node.mode |= stat.S_IFLNK
            case _:
                node.mode |= stat.S_IFREG

    def _entry(self, node: Node) -> pyfuse3.EntryAttributes:
        """By the number that the next open is to use. There are at most as many numbers of a file as there
        were handles open for writing at once, and one more."""
        if not isinstance(node, File) or node.write is None:
            return node.attributes()
        for number in (node.inode, *node.more_inodes):
            if not self._writers[number]:
                return node.attributes(number)
        number = pyfuse3.ROOT_INODE + len(self._nodes)
        self._nodes[number] = node
        node.more_inodes.append(number)
        return node.attributes(number)

    async def lookup(self, parent_inode, name, ctx):
        for known, node in self._nodes[parent_inode].entries():
            if known == name:
                return self._entry(node)
        raise FUSEError(errno.ENOENT)

    async def getattr(self, inode, ctx):
        return self._nodes[inode].attributes(inode)

    async def setattr(self, inode, attr, fields, fh, ctx):
        """Sizes are taken and forgotten, so that O_TRUNC works, and `>` in a shell."""
        node = self._nodes[inode]
        if fields.update_mode:
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(attr.st_mode)
        if fields.update_uid:
            node.uid = attr.st_uid
        if fields.update_gid:
            node.gid = attr.st_gid
        if fields.update_atime:
            node.atime_ns = attr.st_atime_ns
        now = time.time_ns()
        if fields.update_mtime:
            node.mtime_ns = attr.st_mtime_ns
            if isinstance(node, File):  # `touch`, and `>` in a shell, set the time to what it is anyway
                node.has_own_time = abs(now - attr.st_mtime_ns) > TOUCH_NS
        node.ctime_ns = now
        return node.attributes(inode)

    async def readlink(self, inode, ctx):
        return self._nodes[inode].target

    async def opendir(self, inode, ctx):
        return inode

    async def readdir(self, fh, start_id, token):
        entries = self._nodes[fh].entries()
        for number in range(start_id, len(entries)):
            name, node = entries[number]
            if not pyfuse3.readdir_reply(token, name, self._entry(node), number + 1):
                break

    async def releasedir(self, fh):
        pass

    async def open(self, inode, flags, ctx):
        node = self._nodes[inode]
        access = flags & os.O_ACCMODE
        # Beyond the permissions that the kernel checks, and which root need not heed.
        if access != os.O_WRONLY and not node.mode & 0o444:
            raise FUSEError(errno.EACCES)
        if access != os.O_RDONLY and not node.mode & 0o222:
            raise FUSEError(errno.EACCES)
        self._contents.admit(ctx.uid)
        fh = next(self._numbers)
        handle = self._handles[fh] = Handle(node, ctx.uid, inode, access != os.O_RDONLY)
        self._writers[inode] += handle.writes
        return pyfuse3.FileInfo(fh=fh, direct_io=True, keep_cache=False)

    async def read(self, fh, off, size):
        handle = self._handles[fh]
        if handle.file.read_at is not None:
            return _read_chosen(handle, off, size)
        if handle.file.read_from is not None:
            return _read_lines(handle, off, size)
        return self._read_content(handle, off, size)

    def _read_content(self, handle: Handle, off: int, size: int) -> bytes:
        if off and handle.content is None and off == handle.end:
            return b""
        if off == 0 or handle.content is None:
            if handle.file.read is None:  # somebody gave a write-only file the mode of a readable one
                raise FUSEError(errno.EIO)
            self._drop_content(handle)
            data = handle.file.read()
            if off + size < len(data):
                handle.content = self._contents.keep(handle.file, data, handle.user)
        else:
            data = handle.content.data
        found = data[off:off + size]
        handle.end = off + len(found)
        if handle.end >= len(data):
            self._drop_content(handle)
        return found

    def _drop_content(self, handle: Handle) -> None:
        if handle.content is not None:
            self._contents.drop(handle.content, handle.user)
            handle.content = None

    async def write(self, fh, off, buf):
        handle = self._handles[fh]
        if handle.file.choose is not None:
            handle.chosen, handle.base = handle.file.choose(buf), None
            return len(buf)
        if handle.file.write is None:
            raise FUSEError(errno.EIO)
        return await handle.file.write(buf)

    async def release(self, fh):
        handle = self._handles.pop(fh)
        self._writers[handle.inode] -= handle.writes
        self._drop_content(handle)
        self._contents.dismiss(handle.user)

    async def statfs(self, ctx):
        stats = pyfuse3.StatvfsData()  # as sysfs: no blocks, no files
        stats.f_bsize = stats.f_frsize = 4096
        stats.f_namemax = 255
        return stats

    async def create(self, parent_inode, name, mode, flags, ctx) -> NoReturn:
        raise FUSEError(errno.EACCES)

    async def mknod(self, parent_inode, name, mode, rdev, ctx) -> NoReturn:
        raise FUSEError(errno.EACCES if stat.S_ISREG(mode) else errno.EPERM)

    async def _refuse(self, *args) -> NoReturn:
        raise FUSEError(errno.EPERM)

    mkdir = unlink = rmdir = symlink = rename = link = _refuse  # type: ignore[assignment]


def _read_chosen(handle: Handle, off: int, size: int) -> bytes:
    assert handle.file.read_at is not None
    if handle.base is None:
        handle.base = off
    first, end = handle.chosen
    at = first + max(0, off - handle.base)
    return handle.file.read_at(at, min(size, end - at)) if at < end else b""


def _read_lines(handle: Handle, off: int, size: int) -> bytes:
    assert handle.file.read_from is not None
    # The kernel moves the offset by the bytes it was given: a read that begins there goes on, any
    # other was sought, and its offset is the number of a slot.
    if off != handle.end:
        handle.slot, handle.rest = off, b""
    data = handle.rest
    if not data:
        data, handle.slot = handle.file.read_from(handle.slot, max(size, LINE_ROOM))
    # A reader with less room than a line gets it in parts, where the kernel's would find the end.
    data, handle.rest = data[:size], data[size:]
    handle.end = off + len(data)
    return data
