# SPDX-License-Identifier: Apache-2.0
"""The lane on a real mount: whatever can be done to a file, against a model, and from many sides at once."""
from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import random
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.scale import scaled
from tests.support.served import ServedLane, served_lane
from tests.support.wire import KEEP_SIZE, MIB, PAGE, PUNCH_HOLE, ZERO_RANGE
from zramfs.host import fusermount

pytestmark = pytest.mark.requires("fuse")


@contextlib.contextmanager
def fails(number: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == number, caught.value


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """os.posix_fallocate has no modes."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        raise OSError(ctypes.get_errno(), "fallocate")


def aligned(data: bytes) -> mmap.mmap:
    """data in page-aligned memory, as O_DIRECT wants it."""
    memory = mmap.mmap(-1, max(len(data), 1))
    memory[:len(data)] = data
    return memory


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedLane]:
    with served_lane(tmp_path_factory.mktemp("disk"), MIB) as disk:
        yield disk


@pytest.fixture
def empty(disk: ServedLane) -> Iterator[ServedLane]:
    """The device with nothing on it; afterwards nothing may be wrong with it."""
    with disk.open() as fd:
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 0, disk.size)
    yield disk
    disk.call("check")
    stats = disk.call("stats")
    assert stats["protocol_errors"] == stats["reply_errors"] == stats["in_flight"] == 0


# --- any sequence of calls

offsets = st.one_of(st.integers(0, MIB + PAGE), st.integers(0, 260).map(lambda n: n * PAGE))
lengths = st.one_of(
    st.integers(0, 3 * PAGE), st.integers(0, 300_000), st.integers(1, 4).map(lambda n: n * PAGE))
fills = st.integers(0, 255)
steps = st.lists(st.one_of(
    st.tuples(st.sampled_from(["pwrite", "mmap_write"]), offsets, lengths, fills),
    st.tuples(st.sampled_from(["pread", "mmap_read", "punch", "zero", "zero_keep", "seek"]),
              offsets, lengths, st.just(0)),
    st.tuples(st.sampled_from(["direct_write", "direct_read"]), st.integers(0, 255), st.integers(1, 64),
              fills),
    st.tuples(st.sampled_from(["truncating_open", "fsync"]), st.just(0), st.just(0), st.just(0)),
), max_size=25)


def content(length: int, fill: int) -> bytes:
    """A page of one byte, or something that compresses a little, or noise."""
    if fill % 3 == 0:
        return bytes([fill]) * length
    if fill % 3 == 1:
        return (b"%d words that repeat " % fill * (length // 16 + 1))[:length]
    return random.Random(fill).randbytes(length)


class Player:
    """Does each step to the file and to the model, and compares."""

    def __init__(self, disk: ServedLane, fd: int, direct: int) -> None:
        self.disk, self.fd, self.direct = disk, fd, direct
        self.model = bytearray(disk.size)
        self.map = mmap.mmap(fd, disk.size)

    def cut(self, offset: int, length: int) -> int:
        return max(0, min(length, len(self.model) - offset))

    def pwrite(self, offset: int, length: int, fill: int) -> None:
        data = content(length, fill)
        room = self.cut(offset, length)
        if length and not room:
            with fails(errno.ENOSPC):
                os.pwrite(self.fd, data, offset)
            return
        assert os.pwrite(self.fd, data, offset) == room
        self.model[offset:offset + room] = data[:room]

    def pread(self, offset: int, length: int, _: int) -> None:
        assert os.pread(self.fd, length, offset) == self.model[offset:offset + length]

    def mmap_write(self, offset: int, length: int, fill: int) -> None:
        room = self.cut(offset, length)
        self.map[offset:offset + room] = content(room, fill) if room else b""
        self.model[offset:offset + room] = content(room, fill)

    def mmap_read(self, offset: int, length: int, _: int) -> None:
        assert self.map[offset:offset + length] == self.model[offset:offset + length]

    def direct_write(self, page: int, pages: int, fill: int) -> None:
        room = self.cut(page * PAGE, pages * PAGE)
        data = content(pages * PAGE, fill)
        with aligned(data) as memory:
            assert os.pwritev(self.direct, [memory], page * PAGE) == room
        self.model[page * PAGE:page * PAGE + room] = data[:room]

    def direct_read(self, page: int, pages: int, _: int) -> None:
        with aligned(bytes(pages * PAGE)) as memory:
            got = os.preadv(self.direct, [memory], page * PAGE)
            assert memory[:got] == self.model[page * PAGE:(page + pages) * PAGE]

    def zero(self, offset: int, length: int, _: int, mode: int = ZERO_RANGE) -> None:
        room = self.cut(offset, length)
        if not room or (room < length and not mode & KEEP_SIZE):
            with fails(errno.EINVAL):
                fallocate(self.fd, mode, offset, length)
            return
        fallocate(self.fd, mode, offset, length)
        self.model[offset:offset + room] = bytes(room)

    def zero_keep(self, offset: int, length: int, _: int) -> None:
        self.zero(offset, length, 0, ZERO_RANGE | KEEP_SIZE)

    def punch(self, offset: int, length: int, _: int) -> None:
        self.zero(offset, length, 0, PUNCH_HOLE | KEEP_SIZE)

    def seek(self, offset: int, *_: int) -> None:
        if offset >= len(self.model):
            with fails(errno.ENXIO):
                os.lseek(self.fd, offset, os.SEEK_HOLE)
            return
        os.fsync(self.fd)  # mapped pages are data once they are written
        hole = os.lseek(self.fd, offset, os.SEEK_HOLE)
        assert offset <= hole <= len(self.model)
        assert not any(self.model[hole:min(len(self.model), (hole // PAGE + 1) * PAGE)])
        try:
            data = os.lseek(self.fd, offset, os.SEEK_DATA)
        except OSError as error:
            assert error.errno == errno.ENXIO
            data = len(self.model)
        assert not any(self.model[offset:data])

    def truncating_open(self, *_: int) -> None:
        with fails(errno.EBUSY):
            os.open(self.disk.path, os.O_WRONLY | os.O_TRUNC | os.O_CREAT)

    def fsync(self, *_: int) -> None:
        os.fsync(self.fd)


@settings(max_examples=scaled(150, 50), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps)
def test_any_sequence_of_calls_reads_as_the_model(disk: ServedLane, sequence):
    with disk.open() as fd, disk.open(os.O_RDWR | os.O_DIRECT) as direct:
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 0, disk.size)
        player = Player(disk, fd, direct)
        for name, offset, length, fill in sequence:
            getattr(player, name)(offset, length, fill)
        assert os.pread(fd, disk.size + 1, 0) == player.model
        player.map.close()
        assert os.stat(disk.path).st_size == disk.size
    disk.call("check")
    stats = disk.call("stats")
    assert stats["protocol_errors"] == stats["reply_errors"] == 0


# --- what it looks like

def test_stat_and_statvfs(empty: ServedLane):
    entry = os.stat(empty.path)
    assert stat.S_ISREG(entry.st_mode) and stat.S_IMODE(entry.st_mode) == 0o600
    assert (entry.st_size, entry.st_blksize, entry.st_uid) == (MIB, PAGE, os.getuid())
    with empty.open() as fd:
        os.pwrite(fd, os.urandom(10 * PAGE), 0)
        assert os.fstat(fd).st_blocks == 80
        system = os.fstatvfs(fd)
        assert (system.f_bsize, system.f_blocks, system.f_bfree, system.f_bavail) == (PAGE, 256, 246, 246)


def test_owner_mode_and_times_are_kept_by_the_kernel_too(empty: ServedLane):
    before = os.stat(empty.path)
    try:
        os.chmod(empty.path, 0o640)
        os.utime(empty.path, ns=(1_000_000_001, 2_000_000_002))
        if os.getuid() == 0:
            os.chown(empty.path, 12, 34)
        after = os.stat(empty.path)
        assert stat.S_IMODE(after.st_mode) == 0o640
        assert (after.st_atime_ns, after.st_mtime_ns) == (1_000_000_001, 2_000_000_002)
        owner = (12, 34) if os.getuid() == 0 else (before.st_uid, before.st_gid)
        assert (after.st_uid, after.st_gid) == owner
    finally:
        os.chown(empty.path, before.st_uid, before.st_gid)
        os.chmod(empty.path, 0o600)
    with empty.open() as fd:
        os.pwrite(fd, b"x", 0)
    assert os.stat(empty.path).st_mtime_ns > 2_000_000_002


def test_its_size_is_fixed(empty: ServedLane):
    with empty.open() as fd:
        os.pwrite(fd, b"kept", 0)
        for size in (1, MIB - PAGE, MIB):
            os.ftruncate(fd, size)
        for size in (MIB + 1, MIB * 2):
            with fails(errno.EINVAL):
                os.ftruncate(fd, size)
        with fails(errno.EOPNOTSUPP):
            fallocate(fd, 0, 0, PAGE)
        assert os.fstat(fd).st_size == MIB and os.pread(fd, 4, 0) == b"kept"
    with empty.open(os.O_WRONLY | os.O_APPEND) as fd, fails(errno.ENOSPC):
        os.write(fd, b"x")
    assert empty.path.read_bytes() == b"kept" + bytes(MIB - 4)


def open_and_truncate(path: Path) -> None:
    path.open("wb").close()


def open_mapped_and_truncate(path: Path) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), MIB) as mapped:
        mapped[5] = mapped[PAGE]
    path.open("wb").close()


def truncate_open_file(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(0)


@pytest.mark.parametrize("truncate", [
    open_and_truncate, open_mapped_and_truncate, truncate_open_file, lambda path: os.truncate(path, 0),
])
def test_a_truncation_to_0_discards_everything(empty: ServedLane, truncate):
    for _ in range(10):
        empty.path.write_bytes(os.urandom(MIB))
        truncate(empty.path)
        with empty.open() as fd, mmap.mmap(fd, MIB) as mapped:
            assert os.fstat(fd).st_size == MIB and os.fstat(fd).st_blocks == 0
            assert mapped[:] == os.pread(fd, 2 * MIB, 0) == bytes(MIB)
        with empty.open() as fd:
            os.pwrite(fd, b"kept", 0)
            for wrong in (open_and_truncate, truncate_open_file, lambda path: os.truncate(path, 0)):
                with fails(errno.EBUSY):
                    wrong(empty.path)
            assert os.pread(fd, 4, 0) == b"kept"


def test_large_requests_arrive_whole(empty: ServedLane):
    before = empty.call("stats")
    with empty.open(os.O_RDWR | os.O_DIRECT) as fd, aligned(os.urandom(MIB)) as memory:
        assert os.pwritev(fd, [memory], 0) == MIB
        with aligned(bytes(MIB)) as back:
            assert os.preadv(fd, [back], 0) == MIB
            assert back[:] == memory[:]
    after = empty.call("stats")
    assert after["write_ios"] - before["write_ios"] == after["read_ios"] - before["read_ios"] == 1
    assert after["write_sectors"] - before["write_sectors"] == MIB // 512


def test_sparse_copies(empty: ServedLane, tmp_path: Path):
    with empty.open() as fd:
        for n in (3, 4, 100, 255):
            os.pwrite(fd, os.urandom(PAGE), n * PAGE)
    whole = empty.path.read_bytes()
    copy = tmp_path / "copy"
    subprocess.run(["cp", "--sparse=auto", empty.path, copy], check=True, timeout=60)
    assert copy.read_bytes() == whole
    if os.stat(tmp_path).st_blksize == PAGE:
        assert os.stat(copy).st_blocks * 512 < MIB // 2, "cp found the holes"
    with empty.open() as fd:
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 0, MIB)
    subprocess.run(["dd", f"if={copy}", f"of={empty.path}", "bs=4k", "conv=sparse,notrunc"], check=True,
                   capture_output=True, timeout=60)
    assert empty.path.read_bytes() == whole
    assert os.stat(empty.path).st_blocks == 4 * PAGE // 512, "dd wrote no zeros"


# --- shared mappings

def test_mappings_and_calls_see_each_other(empty: ServedLane):
    with empty.open() as fd, empty.open(os.O_RDWR | os.O_DIRECT) as direct, mmap.mmap(fd, MIB) as here:
        code = f"import mmap, os, sys; mmap.mmap(os.open(sys.argv[1], 2), {MIB})[5000:5004] = b'them'"
        subprocess.run([sys.executable, "-c", code, empty.path], check=True, timeout=60)
        assert here[4999:5005] == b"\0them\0"
        here[7:11] = b"mine"
        assert os.pread(fd, 4, 7) == b"mine"
        os.pwrite(fd, b"call", 6000)
        assert here[6000:6004] == b"call"
        here.flush()
        with aligned(bytes(2 * PAGE)) as memory:
            os.preadv(direct, [memory], 0)
            assert memory[7:11] + memory[5000:5004] + memory[6000:6004] == b"minethemcall"
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, PAGE, PAGE)
        assert here[PAGE:2 * PAGE] == bytes(PAGE)


def test_private_mappings(empty: ServedLane):
    with empty.open() as fd:
        os.pwrite(fd, b"below", 100)
        with mmap.mmap(fd, MIB, flags=mmap.MAP_PRIVATE) as copy:
            copy[102:104] = b"XX"
            assert copy[100:105] == b"beXXw" and os.pread(fd, 5, 100) == b"below"


# --- many at once

def test_threads_on_their_own_pages(empty: ServedLane):
    """Four threads write, read back and discard; neighbours share pages' borders but no page."""
    wrong = []

    def work(number: int) -> None:
        choose = random.Random(number)
        with empty.open() as fd:
            for _ in range(1000):
                page = choose.randrange(0, 60) * 4 + number
                data = content(PAGE, choose.randrange(256))
                os.pwrite(fd, data, page * PAGE)
                if os.pread(fd, PAGE, page * PAGE) != data:
                    wrong.append(page)
                if choose.random() < 0.2:
                    fallocate(fd, PUNCH_HOLE | KEEP_SIZE, page * PAGE, PAGE)
                    if any(os.pread(fd, PAGE, page * PAGE)):
                        wrong.append(page)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_page_is_read_whole_while_it_is_written(empty: ServedLane):
    torn = []
    stop = threading.Event()

    def read() -> None:
        with empty.open() as fd:
            while not stop.is_set():
                page = os.pread(fd, PAGE, 8 * PAGE)
                if page[:1] * PAGE != page:
                    torn.append(page)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    with empty.open() as fd:
        for n in range(3000):
            os.pwrite(fd, bytes([n % 256]) * PAGE, 8 * PAGE)
    stop.set()
    for reader in readers:
        reader.join()
    assert not torn


# --- full

def test_a_full_pool(tmp_path: Path):
    with served_lane(tmp_path, 4 * MIB, mem_limit=MIB // 2) as disk, disk.open() as fd:
        old = os.urandom(64 * PAGE)
        assert os.pwrite(fd, old, 0) == len(old)
        with fails(errno.ENOSPC):
            os.pwrite(fd, os.urandom(MIB), 2 * MIB)
        with mmap.mmap(fd, 4 * MIB) as mapped:
            mapped[3 * MIB:] = os.urandom(MIB)
            # Write-back found no room: msync or fsync must tell.
            with pytest.raises(OSError):
                mapped.flush()
                os.fsync(fd)
            assert os.pread(fd, len(old), 0) == old
            assert disk.call("store_stats")["failed_writes"] > 0
            fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 2 * MIB, 2 * MIB)
        assert os.pwrite(fd, old, 2 * MIB) == len(old)
        assert os.pread(fd, len(old), 2 * MIB) == os.pread(fd, len(old), 0) == old
        disk.call("mem_limit", 0)
        assert os.pwrite(fd, os.urandom(MIB), MIB) == MIB
        disk.call("check")
    assert not fusermount.is_mounted(disk.path)
