# SPDX-License-Identifier: Apache-2.0
"""A backing store that is damaged, full or refuses to be written, and many who use one at once."""
from __future__ import annotations

import errno
import os
import random
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from tests.support.backing_tools import MIB, PAGE, backed, backing_file, extents, tmpfs, write_back
from tests.support.page_kinds import noise, page_of_size
from zramfs.store.backing import Backing
from zramfs.store.store import Store

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
            text=True, check=True, timeout=60).stdout.strip()
        try:
            store = Store(4 * MIB, backing=Backing(loop))
            store.write(0, pages)
            run = write_back(store, batch=8)
            assert run.error == errno.ENOSPC and 0 < run.pages <= 128 and run.failed
            store.check(2)
            assert store.read(0, len(pages)) == pages
            subprocess.run(["mount", "-o", "remount,size=8m", place], check=True, timeout=60)
            run = write_back(store, batch=8)
            assert (run.error, store.stats().written_back) == (0, 256)
            store.check(3)
            assert store.read(0, len(pages)) == pages
            store.close()
        finally:
            subprocess.run(["losetup", "--detach", loop], check=True, timeout=60)


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
        began = time.monotonic()
        while not ends.wait(0.05):
            lasted, stats = time.monotonic() - began, store.backing.stats()
            if lasted > 2 and min(stats.reads, stats.writes) > 100 or lasted > 60:
                break
        ends.set()
        for thread in threads:
            thread.join()
        assert not failures, failures
        stats = store.backing.stats()
        assert stats.reads > 100 and stats.writes > 100 and stats.read_errors == 0
        store.check(3)
        for page in range(nr):
            assert store.read(page * PAGE, PAGE) == content(page, versions[page])
