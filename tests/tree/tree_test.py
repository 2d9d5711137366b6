# SPDX-License-Identifier: Apache-2.0
"""The file system's operations, called as the FUSE loop calls them, without a mount."""
from __future__ import annotations

import errno
import inspect
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import pyfuse3
import pytest
import trio

from tests.support.fakes import FakeLane
from zramfs.device.device import Device
from zramfs.errors import ZramfsError
from zramfs.model.config import DeviceConfig
from zramfs.tree.attributes import ATTRIBUTES
from zramfs.tree.files import tree_of
from zramfs.tree.tree import Directory, Tree, with_boundary

RUNDIR = Path("/run/zramfs/mnt-z0")
OPERATIONS = [name for name, _ in inspect.getmembers(pyfuse3.Operations, inspect.iscoroutinefunction)]


@dataclass(frozen=True)
class SomeUser:
    """For what pyfuse3 says of a caller."""

    uid: int = 0


class Mounted:
    """A tree, its paths as words, and the errno of what fails."""

    def __init__(self) -> None:
        self.lane = FakeLane()
        self.lane.started = True
        self.device = Device(DeviceConfig(directory=Path("/mnt/z0"), rundir=RUNDIR), self.lane)
        self.tree = Tree(tree_of(self.device, RUNDIR / "disk"))

    async def find(self, path: str) -> pyfuse3.EntryAttributes:
        entry = await self.tree.getattr(pyfuse3.ROOT_INODE, None)
        for name in filter(None, path.split("/")):
            entry = await self.tree.lookup(entry.st_ino, name.encode(), None)
        return entry

    async def open(self, path: str, flags: int = os.O_RDONLY) -> int:
        info = await self.tree.open((await self.find(path)).st_ino, flags, SomeUser())
        assert info.direct_io and not info.keep_cache
        return info.fh

    async def read(self, path: str) -> str:
        fh = await self.open(path)
        text = (await self.tree.read(fh, 0, 65536)).decode()
        await self.tree.release(fh)
        return text

    async def write(self, path: str, data: bytes) -> int:
        fh = await self.open(path, os.O_WRONLY)
        try:
            return await self.tree.write(fh, 0, data)
        finally:
            await self.tree.release(fh)


async def failure(operation) -> int:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await operation
    return caught.value.errno


@pytest.fixture
def mounted():
    return Mounted()


async def test_names_modes_and_sizes(mounted):
    expected = {
        "": (stat.S_IFDIR | 0o755, 0), "disk": (stat.S_IFLNK | 0o777, len(str(RUNDIR / "disk"))),
        "control": (stat.S_IFREG | 0o600, 0),
        "zram": (stat.S_IFDIR | 0o755, 0), "zsmalloc": (stat.S_IFDIR | 0o700, 0),
        "memory": (stat.S_IFDIR | 0o755, 0),
        "zsmalloc/classes": (stat.S_IFREG | 0o444, 0), "memory/buddyinfo": (stat.S_IFREG | 0o444, 0),
        **{f"zram/{a.name}": (stat.S_IFREG | a.mode, 4096) for a in ATTRIBUTES},
    }
    inodes = set()
    for path, (mode, size) in expected.items():
        entry = await mounted.find(path)
        assert (entry.st_mode, entry.st_size) == (mode, size), path
        assert (entry.st_uid, entry.st_gid) == (os.geteuid(), os.getegid())
        inodes.add(entry.st_ino)
    assert len(inodes) == len(expected)
    assert (await mounted.find("")).st_nlink == 5
    assert (await mounted.find("zram")).st_nlink == 2
    disk = (await mounted.find("disk")).st_ino
    assert await mounted.tree.readlink(disk, None) == b"/run/zramfs/mnt-z0/disk"
    assert await failure(mounted.find("zram/nothing")) == errno.ENOENT


async def test_directories_are_listed_from_any_point(mounted, monkeypatch):
    listed = []
    room = 3

    def reply(token, name, attr, next_id) -> bool:
        if len(listed) == room:
            return False
        listed.append((name, attr.st_ino, next_id))
        return True

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    fh = await mounted.tree.opendir(pyfuse3.ROOT_INODE, None)
    await mounted.tree.readdir(fh, 0, None)
    room = 100
    await mounted.tree.readdir(fh, listed[-1][2], None)
    await mounted.tree.releasedir(fh)
    names = [name.decode() for name, _, _ in listed]
    assert names == [
        ".", "..", "disk", "control", "peek", "metrics", "metrics.prom", "zram", "zsmalloc", "memory"]
    zram = (await mounted.find("zram")).st_ino
    assert (b"zram", zram) in [entry[:2] for entry in listed]
    listed.clear()
    await mounted.tree.readdir(zram, 0, None)
    assert [name.decode() for name, _, _ in listed[2:]] == [*(a.name for a in ATTRIBUTES), "block_state"]
    assert listed[1][:2] == (b"..", pyfuse3.ROOT_INODE)


@pytest.mark.parametrize("path, readable, writable", [
    *((f"zram/{a.name}", a.show is not None, a.parse is not None) for a in ATTRIBUTES),
    ("control", True, True), ("zsmalloc/classes", True, False), ("memory/buddyinfo", True, False),
])
async def test_a_file_opens_for_what_it_can_do(mounted, path, readable, writable):
    for flags, possible in (
        (os.O_RDONLY, readable), (os.O_WRONLY, writable), (os.O_RDWR, readable and writable),
        (os.O_WRONLY | os.O_TRUNC, writable), (os.O_WRONLY | os.O_APPEND, writable),
    ):
        if possible:
            await mounted.tree.release(await mounted.open(path, flags))
        else:
            assert await failure(mounted.open(path, flags)) == errno.EACCES


async def test_content_is_made_at_offset_0_and_stays_for_the_rest(mounted):
    fh = await mounted.open("zram/disksize")
    assert await mounted.tree.read(fh, 0, 1) == b"0"
    await mounted.write("zram/disksize", b"1M")
    assert await mounted.tree.read(fh, 1, 100) == b"\n"
    assert await mounted.tree.read(fh, 2, 100) == b""
    assert await mounted.tree.read(fh, 0, 3) == b"104"
    assert await mounted.tree.read(fh, 3, 100) == b"8576\n"
    assert await mounted.tree.read(fh, 4096, 100) == b""
    other = await mounted.open("zram/disksize")
    assert await mounted.tree.read(other, 2, 100) == b"48576\n"


async def test_one_write_is_one_store_of_at_most_a_page(mounted):
    assert await mounted.write("zram/mem_limit", b"1M" + b" " * 5000) == 4096
    assert (await mounted.read("zram/mm_stat")).split()[3] == "1048576"
    fh = await mounted.open("zram/mem_limit", os.O_WRONLY | os.O_APPEND)
    assert await mounted.tree.write(fh, 4096, b"2M\n") == 3
    assert await mounted.tree.write(fh, 4099, b"3M\n") == 3
    assert (await mounted.read("zram/mm_stat")).split()[3] == "3145728"


async def test_control_runs_the_lines_before_a_bad_one(mounted):
    text = b"mem_limit=1M\n\n# so far\nbad\nmem_limit=2M\n"
    assert await failure(mounted.write("control", text)) == errno.EINVAL
    assert mounted.device.stats().mem_limit == 1 << 20
    state = await mounted.read("control")
    assert "bad: unknown command 'bad'" in state and "(EINVAL)" in state
    assert await mounted.write("control", b"mem_limit=3M\ndisksize=8M") == 24
    assert (mounted.device.stats().mem_limit, mounted.device.stats().disksize) == (3 << 20, 8 << 20)
    assert await failure(mounted.write("control", b"mem_limit=4M\n" + b"#" * 4096)) == errno.E2BIG
    assert await failure(mounted.write("control", b"mem_limit=4M\n\0")) == errno.EINVAL
    assert mounted.device.stats().mem_limit == 3 << 20
    assert "NUL" in await mounted.read("control")


async def test_nothing_can_be_created_or_removed(mounted):
    tree, root = mounted.tree, pyfuse3.ROOT_INODE
    assert await failure(tree.create(root, b"x", 0o644, os.O_WRONLY, None)) == errno.EACCES
    assert await failure(tree.mknod(root, b"x", stat.S_IFREG | 0o644, 0, None)) == errno.EACCES
    assert await failure(tree.mknod(root, b"x", stat.S_IFIFO | 0o644, 0, None)) == errno.EPERM
    assert await failure(tree.mkdir(root, b"x", 0o755, None)) == errno.EPERM
    assert await failure(tree.unlink(root, b"control", None)) == errno.EPERM
    assert await failure(tree.rmdir(root, b"zram", None)) == errno.EPERM
    assert await failure(tree.symlink(root, b"x", b"y", None)) == errno.EPERM
    assert await failure(tree.rename(root, b"control", root, b"x", 0, None)) == errno.EPERM
    assert await failure(tree.link((await mounted.find("control")).st_ino, root, b"x", None)) == errno.EPERM


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("raised, code", [
    (ZeroDivisionError("a bug"), errno.EIO),
    (ExceptionGroup("two", [ValueError("a"), KeyError("b")]), errno.EIO),
    (OSError(errno.ENOMEM, "no memory"), errno.ENOMEM),
    (MemoryError(), errno.ENOMEM),
    (OSError("without a number"), errno.EIO),
    (ZramfsError(errno.EBUSY, "in use"), errno.EBUSY),
    (pyfuse3.FUSEError(errno.ENOTEMPTY), errno.ENOTEMPTY),
])
async def test_no_operation_lets_an_exception_out(name, raised, code, caplog):
    """pyfuse3 ends the mount on anything but FUSEError."""

    async def broken(self, *args):
        raise raised

    class Broken(Tree):
        pass

    broken.__name__ = name
    setattr(Broken, name, with_boundary(broken))
    assert await failure(getattr(Broken(Directory(name="", mode=0o755, children=[])), name)(1, 2)) == code
    unexpected = not isinstance(raised, (OSError, MemoryError, pyfuse3.FUSEError))
    assert bool(caplog.records) == unexpected
    if unexpected:
        assert f"{name}(1, 2)" in caplog.text and "Traceback" in caplog.text


def test_the_boundary_is_around_every_operation_of_the_tree():
    for name in OPERATIONS:
        assert getattr(Tree, name).__wrapped__ is not None


async def test_an_operation_that_has_begun_is_finished(mounted):
    """The loop around it may be restarted or stopped; its caller must get the answer."""
    await mounted.write("zram/disksize", b"16M")
    written = []
    with trio.CancelScope() as scope:
        fh = await mounted.open("zram/compact", os.O_WRONLY)
        scope.cancel()
        written.append(await mounted.tree.write(fh, 0, b"1"))
    assert written == [1]


async def test_a_write_only_file_made_readable_answers_as_in_sysfs(mounted):
    tree = mounted.tree
    node = tree._nodes[(await mounted.find("zram/reset")).st_ino]
    node.mode |= 0o400
    fh = await mounted.open("zram/reset")
    assert await failure(tree.read(fh, 0, 10)) == errno.EIO
    node = tree._nodes[(await mounted.find("zram/mm_stat")).st_ino]
    node.mode |= 0o200
    fh = await mounted.open("zram/mm_stat", os.O_WRONLY)
    assert await failure(tree.write(fh, 0, b"1")) == errno.EIO


async def test_statfs_is_that_of_sysfs(mounted):
    stats = await mounted.tree.statfs(None)
    assert (stats.f_bsize, stats.f_frsize, stats.f_namemax) == (4096, 4096, 255)
    assert (stats.f_blocks, stats.f_files) == (0, 0)
