# SPDX-License-Identifier: Apache-2.0
"""The backing store itself: what may be one, how objects lie in it, and what is found when it is damaged."""
from __future__ import annotations

import errno
import fcntl
import gc
import os
import random
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from tests.support.backing_tools import MIB, PAGE, backed, backing_file, tmpfs, write_back
from tests.support.memory_file import MemoryFile
from tests.support.page_kinds import noise, page_of_size
from zramfs.backing import Backing
from zramfs.store import Store


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
    code = ("from zramfs.backing import Backing\n"
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
                          timeout=20).stdout.strip()
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
        subprocess.run(["losetup", "--detach", loop], check=True, timeout=20)


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

def extents(store: Store) -> dict[int, tuple[int, int]]:
    """Page -> (byte offset, bytes) of its object, from the slot table by the drawing in backing.pxd."""
    file = MemoryFile(store.migration.arena.fileno())
    found = {}
    for slot in range(store.disksize // PAGE):
        word = file.slot_word(slot)
        if word >> 1 & 7 != 5:
            continue
        if word >> 23 & 1:
            found[slot] = (word >> 32) * PAGE, PAGE
        else:
            size = word >> 10 & 0x1FFF
            found[slot] = (word >> 24) * 16, -(-(size + 8) // 16) * 16
    return found


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


# ---- damage --------------------------------------------------------------------------------------

def unreadable(store: Store, page: int) -> None:
    before = store.stats().failed_reads, store.backing.stats().read_errors
    with pytest.raises(OSError) as caught:
        store.read(page * PAGE, PAGE)
    assert caught.value.errno == errno.EIO
    with pytest.raises(OSError) as caught:
        store.write(page * PAGE + 5, b"a part")
    assert caught.value.errno == errno.EIO
    assert (store.stats().failed_reads, store.backing.stats().read_errors) == (before[0] + 1, before[1] + 2)


@pytest.mark.parametrize("size", [60, 1000, 3600, PAGE])
def test_every_damaged_byte_is_found(tmp_path: Path, size: int) -> None:
    page = noise(3) if size == PAGE else page_of_size(size)
    path = tmp_path / "file"
    with backed(path) as store:
        store.write(0, page)
        write_back(store)
        (off, n) = extents(store)[0]
        sound = path.read_bytes()
        for at in [*range(off, off + min(n, size), max(1, n // 40)), off + min(n, size + 8) - 1]:
            with open(path, "r+b") as file:
                file.seek(at)
                file.write(bytes([sound[at] ^ 1 << at % 8]))
            unreadable(store, 0)
            path.write_bytes(sound)
        assert store.read(0, PAGE) == page


def test_blocks_that_changed_places_are_found(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with backed(path) as store:
        store.write(0, noise(1) + noise(2) + page_of_size(3000) * 2)
        write_back(store)
        where = extents(store)
        raw = bytearray(path.read_bytes())
        for a, b in ((0, 1), (2, 3)):
            (x, n), (y, _) = where[a], where[b]
            raw[x:x + n], raw[y:y + n] = raw[y:y + n], raw[x:x + n]
        path.write_bytes(raw)
        for page in range(4):
            unreadable(store, page)
        # The whole page can be written anew.
        store.write(0, noise(9))
        assert store.read(0, PAGE) == noise(9)


def test_blocks_of_another_device_are_found(tmp_path: Path) -> None:
    """The same pages at the same places, of an earlier life of the same file."""
    path = tmp_path / "file"
    images = []
    for life in range(2):
        with backed(path) as store:
            store.write(0, noise(life) + page_of_size(1000 + life) + page_of_size(500))
            write_back(store)
            images.append(path.read_bytes())
            if life:
                path.write_bytes(images[0])
                for page in range(3):
                    unreadable(store, page)
                path.write_bytes(images[1])
                assert store.read(0, PAGE) == noise(1)


def test_a_file_that_was_cut_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with backed(path) as store:
        store.write(0, b"".join(noise(n) for n in range(8)))
        write_back(store)
        where = extents(store)
        os.truncate(path, 4 * PAGE)
        for page in range(8):
            if where[page][0] < 4 * PAGE:
                assert store.read(page * PAGE, PAGE) == noise(page)
            else:
                unreadable(store, page)
        # What is in memory is not concerned, and a write makes the file longer again.
        store.write(100 * PAGE, noise(100))
        assert write_back(store, (100, 101)).pages == 1
        assert store.read(100 * PAGE, PAGE) == noise(100)


# ---- device without room -------------------------------------------------------------------------

@pytest.mark.requires("root")
def test_a_full_file_system_keeps_the_pages_in_memory(tmp_path: Path) -> None:
    pages = b"".join(noise(n) for n in range(256))
    with tmpfs(tmp_path / "small", 512 << 10) as place, backed(place / "file") as store:
        store.write(0, pages)
        run = write_back(store)
        assert run.error == errno.ENOSPC and 0 < run.pages <= 128 and run.failed >= 1
        assert store.backing.stats().write_errors == 1, "it stops at the first"
        assert store.stats().huge_pages == 256 - run.pages
        store.check(3)
        assert store.read(0, len(pages)) == pages
        for n in range(0, 256, 2):
            store.zero(n * PAGE, PAGE)
        store.backing.trim(1000)
        again = write_back(store)
        assert again.pages > 0
        store.check(3)
        assert all(store.read(n * PAGE, PAGE) == noise(n) for n in range(1, 256, 2))


def test_a_file_size_limit_keeps_the_pages_in_memory(tmp_path: Path) -> None:
    """RLIMIT_FSIZE: EFBIG, and a signal that must not end the process."""
    code = f"""
        import resource, sys
        sys.path[:0] = {sys.path!r}
        from pathlib import Path
        from tests.support.backing_tools import *
        from tests.support.page_kinds import noise
        with backed(Path({str(tmp_path / "file")!r})) as store:
            store.write(0, b"".join(noise(n) for n in range(64)))
            resource.setrlimit(resource.RLIMIT_FSIZE, (32 * PAGE, 32 * PAGE))
            run = write_back(store, batch=8)
            store.check(3)
            assert store.read(0, 64 * PAGE) == b"".join(noise(n) for n in range(64))
            print(run.error, run.pages, run.failed)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert list(map(int, done.stdout.split())) == [errno.EFBIG, 32, 8]


@pytest.mark.requires("loop")
def test_a_device_that_fails_writes_keeps_the_pages_in_memory(tmp_path: Path) -> None:
    """A loop device on a file whose file system is full."""
    pages = b"".join(noise(n) for n in range(256))
    with tmpfs(tmp_path / "small", 512 << 10) as place:
        loop = subprocess.run(
            ["losetup", "--find", "--show", backing_file(place / "file", 4 * MIB)], capture_output=True,
            text=True, check=True, timeout=20).stdout.strip()
        try:
            store = Store(4 * MIB, backing=Backing(loop))
            store.write(0, pages)
            run = write_back(store, batch=8)
            assert run.error == errno.ENOSPC and 0 < run.pages <= 128 and run.failed
            store.check(2)
            assert store.read(0, len(pages)) == pages
            subprocess.run(["mount", "-o", "remount,size=8m", place], check=True, timeout=20)
            run = write_back(store, batch=8)
            assert (run.error, store.stats().written_back) == (0, 256)
            store.check(3)
            assert store.read(0, len(pages)) == pages
            store.close()
        finally:
            subprocess.run(["losetup", "--detach", loop], check=True, timeout=20)


def test_nobody_else_reads_what_is_written(tmp_path: Path) -> None:
    """Its mode stays what its owner made it."""
    path = backing_file(tmp_path / "file")
    path.chmod(0o600)
    with backed(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


# ---- many at once --------------------------------------------------------------------------------

def test_readers_writers_and_write_back_at_once(tmp_path: Path) -> None:
    """Each page always holds its own number and a version, which never goes back."""
    nr = 96
    with backed(tmp_path / "file", nr * PAGE, room=MIB) as store:
        versions = [0] * nr
        ends = threading.Event()
        failures: list[BaseException] = []

        def content(page: int, version: int) -> bytes:
            if page % 3 == 0:
                return random.Random(page << 32 | version).randbytes(PAGE)
            return b"%8d %8d " % (page, version) * (PAGE // 18) + bytes(PAGE % 18)

        def job(work) -> threading.Thread:
            def run() -> None:
                try:
                    while not ends.is_set():
                        work()
                except BaseException as error:
                    failures.append(error)
                    ends.set()
            thread = threading.Thread(target=run)
            thread.start()
            return thread

        def writer(first: int):
            rng = random.Random(first)

            def work() -> None:
                page = rng.randrange(first, nr, 2)
                if rng.random() < 0.3:
                    store.write(page * PAGE + 17, content(page, versions[page])[17:50])
                else:
                    store.write(page * PAGE, content(page, versions[page] + 1))
                    versions[page] += 1
            return work

        def reader() -> None:
            page = random.randrange(nr)
            low = versions[page]
            found = store.read(page * PAGE, PAGE)
            high = versions[page] + 1
            assert any(found == content(page, version) for version in range(low, high + 1)), (page, low, high)

        def back() -> None:
            write_back(store, batch=4)
            store.backing.trim()

        for page in range(nr):
            store.write(page * PAGE, content(page, 0))
        threads = [job(writer(0)), job(writer(1)), job(reader), job(reader), job(back), job(store.compact)]
        ends.wait(2)
        ends.set()
        for thread in threads:
            thread.join()
        assert not failures, failures
        stats = store.backing.stats()
        assert stats.reads > 100 and stats.writes > 100 and stats.read_errors == 0
        store.check(3)
        for page in range(nr):
            assert store.read(page * PAGE, PAGE) == content(page, versions[page])
