# SPDX-License-Identifier: Apache-2.0
"""The backing store itself: what may be one, and how objects lie in it."""
from __future__ import annotations

import errno
import fcntl
import gc
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.backing_tools import MIB, PAGE, backed, backing_file, extents, write_back
from tests.support.page_kinds import noise, page_of_size
from zramfs.store.backing import Backing
from zramfs.store.store import Store


def refused(path: object, number: int, match: str | None = None) -> None:
    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=match) as caught:
        Backing(str(path))
    assert caught.value.errno == number
    assert len(os.listdir("/proc/self/fd")) == files


# ---- what may be one -----------------------------------------------------------------------------

def test_what_is_no_backing_store(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "missing", errno.ENOENT)
    assert not (tmp_path / "missing").exists(), "it makes no files"
    refused(tmp_path, errno.EISDIR, "expected a block device or a file")
    refused(tmp_path / "fifo", errno.ENOTBLK)       # and does not wait for a writer
    refused("/dev/null", errno.ENOTBLK)
    refused(backing_file(tmp_path / "short", PAGE - 1), errno.EINVAL, "truncate --size")


def test_a_file_belongs_to_one_device(tmp_path: Path) -> None:
    path = backing_file(tmp_path / "file")
    first = Backing(str(path))
    refused(path, errno.EBUSY, "locked by somebody else")
    code = ("from zramfs.store.backing import Backing\n"
            f"try: Backing({str(path)!r})\nexcept OSError as e: print(e.errno)")
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert int(other.stdout) == errno.EBUSY
    first.close()
    first.close()
    Backing(str(path)).close()


def test_a_store_takes_it_and_closes_it(tmp_path: Path) -> None:
    path = backing_file(tmp_path / "file")
    backing = Backing(str(path))
    store = Store(MIB, backing=backing)
    with pytest.raises(ValueError, match="no other store"):
        Store(MIB, backing=backing)
    with pytest.raises(ValueError):
        Store(0, backing=Backing(str(backing_file(tmp_path / "other"))))
    gc.collect()
    Backing(str(tmp_path / "other")).close()        # what failed did not keep it
    refused(path, errno.EBUSY)
    store.close()
    Backing(str(path)).close()
    with pytest.raises(ValueError, match="closed"):
        backing.stats()
    with pytest.raises(ValueError):
        Store(MIB, backing=backing)


@pytest.mark.requires("loop")
def test_a_block_device_is_opened_exclusively(tmp_path: Path) -> None:
    path = backing_file(tmp_path / "file")
    loop = subprocess.run(["losetup", "--find", "--show", path], capture_output=True, text=True, check=True,
                          timeout=60).stdout.strip()
    try:
        held = os.open(loop, os.O_RDONLY | os.O_EXCL)
        refused(loop, errno.EBUSY)
        os.close(held)
        backing = Backing(loop)
        assert not backing.is_file
        assert backing.stats().blocks == 16 * MIB // PAGE
        with pytest.raises(OSError) as caught:
            os.open(loop, os.O_RDONLY | os.O_EXCL)
        assert caught.value.errno == errno.EBUSY
        store = Store(MIB, backing=backing)
        store.write(0, noise(1) * 9)
        assert write_back(store).pages == 9
        assert store.read(0, 9 * PAGE) == noise(1) * 9
        assert backing.trim() == 0, "the blocks of a device are only used again"
        store.check(3)
        store.close()
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True, timeout=60)


def test_the_size_is_what_it_was_when_it_was_opened(tmp_path: Path) -> None:
    with backed(tmp_path / "file", room=5 * PAGE + 4095) as store:
        assert store.backing.stats().blocks == 5
        store.write(0, noise(1) * 9)
        run = write_back(store)
        assert (run.pages, run.error, store.stats().written_back) == (5, errno.ENOSPC, 5)
        assert store.backing.stats().used == 5


def test_a_large_one_costs_nothing(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE

    before = resident()
    with backed(tmp_path / "file", room=1 << 40) as store:
        store.write(0, noise(1) * 64)
        assert write_back(store).pages == 64
        assert resident() - before < 4 * MIB
        assert (tmp_path / "file").stat().st_blocks * 512 < MIB
        assert store.read(0, 64 * PAGE) == noise(1) * 64


# ---- the layout ----------------------------------------------------------------------------------

def test_objects_are_packed(tmp_path: Path) -> None:
    """Compressed pages take what they need, an object at most two blocks, a raw page exactly one."""
    rng = random.Random(7)
    sizes = [rng.choice([60, 300, 900, 1500, 2200, 3000, 3624, PAGE]) for _ in range(600)]
    pages = [noise(n) if size == PAGE else page_of_size(size) for n, size in enumerate(sizes)]
    with backed(tmp_path / "file") as store:
        store.write(0, b"".join(pages))
        run = write_back(store, batch=16)
        assert (run.pages, run.failed, run.passed, run.error) == (600, 0, 0, 0)
        where = extents(store)
        assert sorted(where) == list(range(600))
        for slot, (off, n) in where.items():
            assert n == (PAGE if sizes[slot] == PAGE else -(-(sizes[slot] + 8) // 16) * 16)
            assert off // PAGE + 1 >= (off + n - 1) // PAGE
            assert off % (PAGE if n == PAGE else 16) == 0
        ends = sorted(where.values())
        assert all(a + n <= b for (a, n), (b, _) in zip(ends, ends[1:], strict=False)), "objects overlap"
        blocks = store.backing.stats().used
        needed = sum(n for _, n in where.values())
        assert -(-needed // PAGE) <= blocks <= -(-needed // PAGE) + 1, "only the last block has an end"
        assert blocks < 600 * 0.55
        # The largest lie first.
        order = [sizes[slot] for slot in sorted(where, key=lambda slot: where[slot])]
        assert all(b < a + 64 for a, b in zip(order, order[1:], strict=False))
        raw = (tmp_path / "file").read_bytes()
        for slot in (n for n in range(600) if sizes[n] == PAGE):
            off, _ = where[slot]
            assert raw[off:off + PAGE] == pages[slot]


def test_freed_blocks_are_used_again_and_holes_given_back(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with backed(path, room=64 * PAGE) as store:
        backing = store.backing
        store.write(0, b"".join(noise(n) for n in range(64)))
        assert write_back(store).pages == 64
        assert backing.stats().used == 64 and path.stat().st_blocks * 512 == 64 * PAGE
        for n in range(0, 64, 2):
            store.zero(n * PAGE, PAGE)
        assert (backing.stats().used, backing.stats().stale) == (32, 32)
        assert backing.trim(10) == 10 and backing.trim() == 22 and backing.trim() == 0
        # Half of its blocks, and what the file system needs to say which.
        assert path.stat().st_blocks * 512 <= 34 * PAGE
        store.check(3)
        store.write(64 * PAGE, b"".join(noise(n) for n in range(100, 140)))
        run = write_back(store, (64, 104))
        assert (run.pages, run.error) == (32, errno.ENOSPC)
        store.check(3)
        assert store.read(64 * PAGE, 40 * PAGE) == b"".join(noise(n) for n in range(100, 140))
        assert store.read(PAGE, PAGE) == noise(1)
    assert path.stat().st_blocks == 0, "the end gives everything back"


def test_a_block_is_free_only_when_all_its_objects_are(tmp_path: Path) -> None:
    with backed(tmp_path / "file") as store:
        store.write(0, page_of_size(900) * 4)
        write_back(store)
        assert store.backing.stats().used == 1
        for n in range(3):
            store.zero(n * PAGE, PAGE)
            assert store.backing.stats().used == 1
        store.write(3 * PAGE, b"no longer there")       # a part: read, and brought back
        assert store.backing.stats().used == 0 and store.stats().written_back == 0
        assert store.read(3 * PAGE, PAGE) == b"no longer there" + page_of_size(900)[15:]


def test_without_direct_io_every_write_is_synchronous(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an error would come after the page's memory is gone."""
    opened = os.open

    def no_direct(path: str, flags: int, *more: object) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct I/O here")
        return opened(path, flags, *more)

    monkeypatch.setattr(os, "open", no_direct)
    with backed(tmp_path / "file") as store:
        links = {int(fd.name): fd for fd in Path("/proc/self/fd").iterdir() if fd.exists()}
        flags = [fcntl.fcntl(fd, fcntl.F_GETFL) for fd, link in links.items()
                 if link.samefile(tmp_path / "file")]
        assert any(flag & os.O_DSYNC and not flag & os.O_DIRECT for flag in flags)
        store.write(0, noise(1))
        assert write_back(store).pages == 1
        assert store.read(0, PAGE) == noise(1)
