# SPDX-License-Identifier: Apache-2.0
"""The tree of a device: disk, control, and the attributes, as a pyfuse3 file system.

It behaves as sysfs does: the content of a file is made when it is read at offset 0 and stays the
same for the small reads behind that; each write(2) is one command, and its error is the command's;
nothing can be created or removed; a file without a reader (or a writer) cannot be opened for
reading (or writing), not even by root.
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
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pyfuse3
import trio
from pyfuse3 import FUSEError

from . import attributes, control, metrics
from .attributes import Attribute
from .device import Device
from .errors import ZramfsError

log = logging.getLogger(__name__)

LINE_ROOM = 128  # bytes, more than a line of what is read with File.read_from
ATTRIBUTE_SIZE = 4096  # st_size of every file of sysfs, and what one write to it takes at most


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

    def attributes(self) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = self.inode
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
    """For File.read_from. end: the offset behind the last read; slot, rest: what comes next."""

    file: File
    content: bytes | None = None
    end: int = 0
    slot: int = 0
    rest: bytes = b""


def build(device: Device, disk: Path) -> Directory:
    """The root of the tree; disk: where the lane is mounted."""

    def writer(path: str, parse: Callable[[bytes], str]) -> Callable[[bytes], Awaitable[int]]:
        async def write(data: bytes) -> int:
            data = data[:ATTRIBUTE_SIZE]
            try:
                line = parse(data)
            except ZramfsError as error:
                device.refused(path, error)
                raise
            await device.command(line)
            return len(data)

        return write

    def attribute(a: Attribute) -> File:
        return File(
            name=a.name, mode=a.mode, size=ATTRIBUTE_SIZE,
            read=(lambda: a.show(device.stats()).encode("utf-8", "surrogateescape")) if a.show else None,
            write=writer(f"zram/{a.name}", a.parse) if a.parse else None,
        )

    async def write_control(data: bytes) -> int:
        try:
            lines = control.lines(data)
        except ZramfsError as error:
            device.refused("control", error)
            raise
        for line in lines:
            await device.command(line)
        return len(data)

    target = os.fsencode(disk)
    return Directory(name="", mode=0o755, children=[
        Link(name="disk", mode=0o777, size=len(target), target=target),
        File(name="control", mode=0o600, write=write_control,
             read=lambda: control.state(device.stats()).encode(errors="replace")),
        File(name="peek", mode=0o400, read_at=device.peek),
        File(name="metrics", mode=0o444, read=lambda: metrics.text(device)),
        Directory(name="zram", mode=0o755, children=[
            *(attribute(a) for a in attributes.ATTRIBUTES),
            File(name="block_state", mode=0o400, read_from=device.block_state),
        ]),
        # 0700 like /sys/kernel/debug, where the kernel has it.
        Directory(name="zsmalloc", mode=0o700, children=[
            File(name="classes", mode=0o444,
                 read=lambda: attributes.format_classes(device.classes()).encode()),
        ]),
        Directory(name="memory", mode=0o755, children=[
            File(name="buddyinfo", mode=0o444,
                 read=lambda: attributes.format_buddyinfo(device.buddyinfo()).encode()),
            File(name="pageblocks", mode=0o444,
                 read=lambda: attributes.format_pageblocks(device.pageblocks()).encode()),
            File(name="compaction", mode=0o444,
                 read=lambda: attributes.format_compaction(device.memory()).encode()),
            File(name="policies", mode=0o444,
                 read=lambda: attributes.format_policies(device.policies.stats()).encode()),
            File(name="governor", mode=0o444,
                 read=lambda: attributes.format_governor(device.governor.stats).encode(errors="replace")),
            File(name="balloon", mode=0o644, write=writer("memory/balloon", attributes.parse_balloon),
                 read=lambda: attributes.format_balloon(device.memory()).encode()),
            File(name="proactiveness", mode=0o644,
                 write=writer("memory/proactiveness", attributes.parse_proactiveness),
                 read=lambda: attributes.format_proactiveness(device.compactor.stats()).encode()),
        ]),
    ])


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

    async def lookup(self, parent_inode, name, ctx):
        for known, node in self._nodes[parent_inode].entries():
            if known == name:
                return node.attributes()
        raise FUSEError(errno.ENOENT)

    async def getattr(self, inode, ctx):
        return self._nodes[inode].attributes()

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
        return node.attributes()

    async def readlink(self, inode, ctx):
        return self._nodes[inode].target

    async def opendir(self, inode, ctx):
        return inode

    async def readdir(self, fh, start_id, token):
        entries = self._nodes[fh].entries()
        for number in range(start_id, len(entries)):
            name, node = entries[number]
            if not pyfuse3.readdir_reply(token, name, node.attributes(), number + 1):
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
        self._handles[fh] = Handle(node)
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
        del self._handles[fh]

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
