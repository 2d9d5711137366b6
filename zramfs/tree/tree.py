# SPDX-License-Identifier: Apache-2.0
"""The tree of a device: disk, control, and the attributes, as a pyfuse3 file system.

It behaves as sysfs does: the content of a file is made when it is read at offset 0 and stays the
same for the small reads behind that; each write(2) is one command, and its error is the command's;
nothing can be created or removed; a file without a reader (or a writer) cannot be opened for
reading (or writing), not even by root.

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

log = logging.getLogger(__name__)

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
    number. read_at: the bytes at an offset, at most so many. write: takes the bytes of one write(2) and
    answers how many it used."""

    read: Callable[[], bytes] | None = None
    read_from: Callable[[int, int], tuple[bytes, int]] | None = None
    read_at: Callable[[int, int], bytes] | None = None
    write: Callable[[bytes], Awaitable[int]] | None = None
    more_inodes: list[int] = field(default_factory=list)

    def attributes(self, inode: int | None = None) -> pyfuse3.EntryAttributes:
        entry = super().attributes(inode)
        if self.write is not None:
            # The kernel is to ask each time: the number may be another one, and a change of mode or owner
            # that was made by one number holds for all of them.
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


@dataclass(eq=False)
class Handle:
    """inode: the number that was opened. writes: whether for writing. For File.read_from: end is the offset
    behind the last read; slot and rest are what comes next."""

    file: File
    inode: int
    writes: bool
    content: bytes | None = None
    end: int = 0
    slot: int = 0
    rest: bytes = b""


def boundary(operation: Callable) -> Callable:
    """What no operation lets through: an exception that is not FUSEError would end the mount.

    Shielded: an operation that has begun is answered even when the loop around it is restarted
    or stopped (daemon.serve_tree); otherwise its caller would wait for ever.
    """

    @functools.wraps(operation)
    async def bounded(self: Tree, *args: object) -> object:
        with trio.CancelScope(shield=True):
            try:
                return await operation(self, *args)
            except FUSEError:
                raise
            except OSError as error:
                raise FUSEError(error.errno or errno.EIO) from error
            except Exception:
                log.exception("%s%r failed in an unexpected way; answering EIO", operation.__name__, args)
                raise FUSEError(errno.EIO) from None

    return bounded


def bound(cls: type[Tree]) -> type[Tree]:
    """Puts the boundary around every operation, those of the base class too."""
    for name, operation in inspect.getmembers(cls, inspect.iscoroutinefunction):
        if not name.startswith("_"):
            setattr(cls, name, boundary(operation))
    return cls


@bound
class Tree(pyfuse3.Operations):
    supports_dot_lookup = False

    def __init__(self, root: Directory) -> None:
        super().__init__()
        self._nodes: dict[int, Node] = {}
        self._handles: dict[int, Handle] = {}
        self._writers: Counter[int] = Counter()  # handles that are open for writing, by inode number
        self._numbers = itertools.count(1)
        self._number(root)

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
        if fields.update_mtime:
            node.mtime_ns = attr.st_mtime_ns
        node.ctime_ns = time.time_ns()
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
        fh = next(self._numbers)
        handle = self._handles[fh] = Handle(node, inode, access != os.O_RDONLY)
        self._writers[inode] += handle.writes
        return pyfuse3.FileInfo(fh=fh, direct_io=True, keep_cache=False)

    async def read(self, fh, off, size):
        handle = self._handles[fh]
        if handle.file.read_at is not None:
            return handle.file.read_at(off, size)
        if handle.file.read_from is not None:
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
        if off == 0 or handle.content is None:
            if handle.file.read is None:  # somebody gave a write-only file the mode of a readable one
                raise FUSEError(errno.EIO)
            handle.content = handle.file.read()
        return handle.content[off : off + size]

    async def write(self, fh, off, buf):
        handle = self._handles[fh]
        if handle.file.write is None:
            raise FUSEError(errno.EIO)
        return await handle.file.write(buf)

    async def release(self, fh):
        handle = self._handles.pop(fh)
        self._writers[handle.inode] -= handle.writes

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

    mkdir = unlink = rmdir = symlink = rename = link = _refuse
