# SPDX-License-Identifier: Apache-2.0
"""Verified load: fio's own checksums on the file and on the loop device, and a pool that runs full.

About a minute together, or a fifth of that where tests/support/scale.py wants a part; --soak MINUTES
stretches each test by that factor.
"""
from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.scale import is_full
from tests.support.whole import MIB, PAGE, Device, device, loop, opened, punch_hole, run

pytestmark = [pytest.mark.requires("fuse"), pytest.mark.soak]


@pytest.fixture(scope="module")
def z(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    with device(tmp_path_factory.mktemp("stress") / "z", 512 * MIB, "--threads", 2) as found:
        yield found


def stretched(request: pytest.FixtureRequest, seconds: float) -> float:
    soak = request.config.getoption("soak")
    return seconds * (max(1.0, soak) if soak or is_full() else 0.2)


# ---- fio -------------------------------------------------------------------------------------------
# fio writes, then reads everything back and compares the CRC32C in the header of each block. Half of
# each block is compressible. serialize_overlap: two blocks in flight never overlap, or neither fio
# nor anybody else could say which of them must be found.
_COMMON = (
    "--name=verify", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--do_verify=1",
    "--ioengine=libaio", "--direct=1", "--iodepth=16", "--size=96m", "--buffer_compress_percentage=50",
    "--refill_buffers", "--thread", "--group_reporting", "--minimal", "--allow_file_create=0",
)
_ON_FILE = {
    "random-512-to-1m": ("--rw=randwrite", "--bsrange=512-1m", "--serialize_overlap=1"),
    "random-any-size-any-offset": (
        "--rw=randwrite", "--bsrange=512-128k", "--bs_unaligned=1", "--blockalign=1", "--norandommap",
        "--serialize_overlap=1", "--direct=0", "--size=32m",
    ),
    "random-mixed-4k": ("--rw=randrw", "--bs=4k", "--serialize_overlap=1"),
    "sequential-1m": ("--rw=write", "--bs=1m"),
    "sequential-odd": ("--rw=write", "--bs=5k", "--size=32m"),
    "sequential-512": ("--rw=write", "--bs=512", "--size=8m"),
    "shared-mapping": (
        "--rw=randwrite", "--bs=4k", "--ioengine=mmap", "--iodepth=1", "--direct=0", "--size=32m",
    ),
}
_ON_LOOP = {
    "random-4k-to-1m": ("--rw=randwrite", "--bsrange=4k-1m", "--serialize_overlap=1"),
    "sequential-1m": ("--rw=write", "--bs=1m"),
    "buffered-random-512-to-64k": (
        "--rw=randwrite", "--bsrange=512-64k", "--direct=0", "--size=32m", "--end_fsync=1",
    ),
    # Each block is trimmed and then written.
    "trim-and-write": ("--rw=randtrimwrite", "--bs=4k", "--size=32m"),
    # And later a third of them is trimmed once more, and must then read as zeros.
    "trim-and-write-and-trim": (
        "--rw=randtrimwrite", "--bs=4k", "--size=48m", "--trim_percentage=33", "--trim_verify_zero=1",
        "--trim_backlog=256", "--trim_backlog_batch=64",
    ),
}


def fio_for(seconds: float, target: Path | str, options: tuple[str, ...]) -> None:
    """Verified runs, each with a seed of its own, until the time is over; at least one."""
    end = time.monotonic() + seconds
    while True:
        seed = random.randrange(1 << 31)
        run("fio", *_COMMON, *options, f"--filename={target}", f"--randseed={seed}", timeout=200)
        if time.monotonic() > end:
            return


@pytest.mark.requires("fio")
@pytest.mark.parametrize("options", _ON_FILE.values(), ids=_ON_FILE)
def test_fio_verifies_the_file(z: Device, options: tuple[str, ...], request: pytest.FixtureRequest) -> None:
    fio_for(stretched(request, 3), z.disk, options)
    assert z.io_stat()["failed_reads"] == z.io_stat()["failed_writes"] == 0


@pytest.mark.requires("fio", "loop")
@pytest.mark.parametrize("options", _ON_LOOP.values(), ids=_ON_LOOP)
def test_fio_verifies_the_loop_device(
    z: Device, options: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    trims = z.io_stat()["notify_free"]
    with loop(z.disk) as block:
        fio_for(stretched(request, 3), block, options)
    if any("trim" in option for option in options):
        assert z.io_stat()["notify_free"] > trims, "fio trimmed nothing"
    assert z.io_stat()["failed_reads"] == z.io_stat()["failed_writes"] == 0


# ---- a full pool -------------------------------------------------------------------------------------
class Worker(threading.Thread):
    """Writes, discards and checks pages of its own part of the device, and knows what each must hold."""

    def __init__(self, z: Device, first: int, pages: int, until: float) -> None:
        super().__init__(name=f"pages {first} to {first + pages - 1}")
        self.z, self.first, self.pages, self.until = z, first, pages, until
        self.random = random.Random(first)
        self.held: dict[int, bytes] = {}
        self.refused = self.stored_after_refusal = 0
        self.error: str | None = None

    def run(self) -> None:
        try:
            with opened(self.z.disk) as fd:
                # And on a busy machine until the pool has been full, which may take longer.
                while time.monotonic() < self.until or (
                        not self.stored_after_refusal and time.monotonic() < self.until + 100):
                    self.step(fd)
                for page in range(self.pages):
                    self.check(fd, page)
        except Exception as error:
            self.error = f"{self.name}: {error!r}"

    def step(self, fd: int) -> None:
        page = self.random.randrange(self.pages)
        count = min(self.random.choice((1, 1, 4, 16)), self.pages - page)
        action = self.random.random()
        if action < 0.70:
            self.write(fd, page, count)
        elif action < 0.80:
            punch_hole(fd, (self.first + page) * PAGE, count * PAGE)
            for i in range(count):
                self.held.pop(page + i, None)
        else:
            self.check(fd, page)

    def write(self, fd: int, page: int, count: int) -> None:
        """A write that is refused has put its first pages there, or none; the rest hold their old data."""
        new = [self.random.randbytes(PAGE) for _ in range(count)]
        try:
            assert os.pwrite(fd, b"".join(new), (self.first + page) * PAGE) == count * PAGE
            stored = count
            self.stored_after_refusal += bool(self.refused)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self.refused += 1
            stored = 0
            while stored < count and os.pread(fd, PAGE, (self.first + page + stored) * PAGE) == new[stored]:
                stored += 1
            assert stored < count, "a write was refused that is there in full"
        self.held.update(zip(range(page, page + stored), new[:stored], strict=True))
        for i in range(stored, count):
            self.check(fd, page + i)

    def check(self, fd: int, page: int) -> None:
        if os.pread(fd, PAGE, (self.first + page) * PAGE) != self.held.get(page, bytes(PAGE)):
            raise AssertionError(f"page {page} came back different")


@pytest.fixture
def limited(z: Device) -> Iterator[Device]:
    """512 MiB that may take 24 MiB of memory."""
    z.write("zram/reset", "1")
    z.write("zram/disksize", str(512 * MIB))
    z.write("zram/mem_limit", "24M")
    yield z
    z.write("zram/reset", "1")
    z.write("zram/disksize", str(512 * MIB))


def test_full_pool_under_load_keeps_what_it_accepted(limited: Device, request: pytest.FixtureRequest) -> None:
    until = time.monotonic() + stretched(request, 6)
    # Four times 16 MiB that do not compress, into 24 MiB.
    workers = [Worker(limited, first * 4096, 4096, until) for first in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.error for worker in workers if worker.error] == []
    assert all(worker.refused and worker.stored_after_refusal for worker in workers)
    assert limited.io_stat()["failed_writes"] >= sum(worker.refused for worker in workers)
    assert limited.io_stat()["failed_reads"] == 0
    stat = limited.mm_stat()
    assert stat["orig_data_size"] == sum(len(worker.held) for worker in workers) * PAGE
    assert stat["mem_used_max"] <= stat["mem_limit"] == 24 * MIB


def test_full_pool_takes_writes_again_when_space_is_freed(limited: Device) -> None:
    data = os.urandom(32 * MIB)
    with opened(limited.disk) as fd:
        stored = 0
        with pytest.raises(OSError) as caught:
            # A page each: the kernel may cut a longer write in the middle of a page.
            while stored < len(data):
                stored += os.pwrite(fd, data[stored:stored + PAGE], stored)
        assert caught.value.errno == errno.ENOSPC
        assert stored == limited.mm_stat()["mem_used_total"] == 24 * MIB
        failed = limited.io_stat()["failed_writes"]
        assert failed == 1

        # Overwriting needs room too, because the old page is given up only after the new one stands.
        with pytest.raises(OSError) as caught:
            os.pwrite(fd, os.urandom(PAGE), 5 * MIB)
        assert caught.value.errno == errno.ENOSPC
        assert limited.io_stat()["failed_writes"] == failed + 1
        assert all(os.pread(fd, MIB, at) == data[at:at + MIB] for at in range(0, stored, MIB))

        punch_hole(fd, 0, 4 * MIB)
        assert os.pwrite(fd, data[:MIB], 8 * MIB) == MIB
        assert os.pread(fd, MIB, 8 * MIB) == data[:MIB]
        assert os.pread(fd, 4 * MIB, 0) == bytes(4 * MIB)


@pytest.mark.requires("loop")
def test_full_pool_is_an_io_error_on_the_loop_device(limited: Device) -> None:
    with loop(limited.disk) as name:
        data = os.urandom(32 * MIB)
        with opened(name) as fd:
            os.pwrite(fd, data, 0)
            with pytest.raises(OSError) as caught:
                os.fsync(fd)
            assert caught.value.errno in (errno.EIO, errno.ENOSPC)
        assert limited.io_stat()["failed_writes"] > 0
        run("blkdiscard", name)
        assert limited.mm_stat()["mem_used_total"] == 0
        with opened(name) as fd:
            os.pwrite(fd, data[:MIB], 0)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, MIB, os.POSIX_FADV_DONTNEED)
            assert os.pread(fd, MIB, 0) == data[:MIB]
