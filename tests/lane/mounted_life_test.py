# SPDX-License-Identifier: Apache-2.0
"""A mounted lane whose mount, server, clients or size go away, and what the others notice of it."""
from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.support.child import TIMEOUT
from tests.support.served import ServedLane, served_lane
from tests.support.whole import wait_until
from tests.support.wire import MIB, PAGE
from zramfs.host import fusermount

pytestmark = pytest.mark.requires("fuse")

GONE = {errno.ENOTCONN, errno.ECONNABORTED, errno.EIO, errno.ENODEV}


class Readers:
    """Threads that read until an error; errors: what each of them got."""

    def __init__(self, disk: ServedLane, threads: int = 4) -> None:
        self.errors: list[int | None] = []
        self.reads = 0
        self.fds = [os.open(disk.path, os.O_RDONLY) for _ in range(threads)]
        self.threads = [threading.Thread(target=self.read, args=(fd,), daemon=True) for fd in self.fds]
        for thread in self.threads:
            thread.start()
        wait_until(lambda: self.reads > 100, "the readers are at work", TIMEOUT)

    def read(self, fd: int) -> None:
        try:
            while True:
                os.pread(fd, 64 * PAGE, 0)
                self.reads += 1
        except OSError as error:
            self.errors.append(error.errno)

    def join(self) -> set[int | None]:
        for thread in self.threads:
            thread.join(TIMEOUT)
            assert not thread.is_alive(), "a reader hangs"
        for fd in self.fds:
            close_dead(fd)
        assert len(self.errors) == len(self.threads)
        return set(self.errors)


def close_dead(fd: int) -> None:
    """Closed it is, but nobody was there to hear of it."""
    with pytest.raises(OSError) as caught:
        os.close(fd)
    assert caught.value.errno in GONE


# --- the mount

def test_unmounting_an_idle_device_ends_the_server(tmp_path: Path):
    with served_lane(tmp_path) as disk:
        assert disk.path.read_bytes()[:4] == bytes(4)
        fusermount.unmount(disk.path)
        assert disk.wait() == 0
        assert disk.path.stat().st_size == 0, "the empty file below"


def test_a_device_in_use_cannot_be_unmounted_but_detached(tmp_path: Path):
    with served_lane(tmp_path) as disk:
        with disk.open() as fd:
            with pytest.raises(fusermount.MountError, match="busy") as caught:
                fusermount.unmount(disk.path)
            assert caught.value.errno == errno.EBUSY
            assert fusermount.is_mounted(disk.path)
            fusermount.unmount(disk.path, lazy=True)
            assert not fusermount.is_mounted(disk.path)
            os.pwrite(fd, b"still here", 7)
            assert os.pread(fd, 10, 7) == b"still here"
            assert disk.call("alive")
        assert disk.wait() == 0


@pytest.mark.parametrize("busy", [False, True])
def test_abort(tmp_path: Path, busy: bool):
    with served_lane(tmp_path) as disk:
        readers = Readers(disk) if busy else None
        fd = os.open(disk.path, os.O_RDWR)
        disk.call("abort")
        assert disk.wait() == 0
        if readers:
            assert readers.join() <= GONE
        for _ in range(2):
            with pytest.raises(OSError) as caught:
                os.pread(fd, 1, 0)
            assert caught.value.errno in GONE
        close_dead(fd)
        fusermount.unmount(disk.path)


# --- the server

def test_a_stopped_server_makes_clients_wait_and_nothing_else(tmp_path: Path):
    with served_lane(tmp_path) as disk, disk.open() as fd:
        os.pwrite(fd, b"before", 0)
        for _ in range(3):
            got = []
            reader = threading.Thread(target=lambda got=got: got.append(os.pread(fd, 6, 0)), daemon=True)
            with disk.stopped():
                reader.start()
                reader.join(0.2)
                assert reader.is_alive() and not got
            reader.join(TIMEOUT)
            assert got == [b"before"]
        assert disk.call("stats")["reply_errors"] == 0


def test_a_killed_server_hangs_nobody(tmp_path: Path):
    with served_lane(tmp_path) as disk:
        readers = Readers(disk)
        disk.process.kill()
        assert readers.join() <= GONE
        with pytest.raises(OSError) as caught:
            disk.path.open("rb")
        assert caught.value.errno in GONE
        fusermount.unmount(disk.path)
        assert disk.path.read_bytes() == b""


# --- the clients

def test_killed_clients_leave_a_healthy_lane(tmp_path: Path):
    """A killed client's requests are interrupted: those in the queue vanish, those in hand are
    answered to nobody."""
    client = """
import os, sys, threading
fd = os.open(sys.argv[1], os.O_RDWR)
def work(n):
    data = os.urandom(1 << 20)
    while True:
        os.pwrite(fd, data, n << 20)
        os.pread(fd, 1 << 20, n << 20)
for n in range(8):
    threading.Thread(target=work, args=(n,)).start()
print("running", flush=True)
"""
    with served_lane(tmp_path, algo="zstd") as disk:
        for turn in range(6):
            process = subprocess.Popen([sys.executable, "-c", client, disk.path], stdout=subprocess.PIPE)
            assert process.stdout.readline() == b"running\n"
            time.sleep(0.02 * turn)
            process.kill()
            process.wait(TIMEOUT)
            process.stdout.close()
        wait_until(lambda: disk.call("open_count") == 0, "the killed clients are gone", TIMEOUT)
        with disk.open() as fd:
            data = os.urandom(MIB)
            os.pwrite(fd, data, 12345)
            assert os.pread(fd, MIB, 12345) == data
        stats = disk.call("stats")
        assert stats["write_ios"] > 6 and stats["in_flight"] == 0
        assert stats["protocol_errors"] == stats["reply_errors"] == 0
        disk.call("check")


# --- claims and sizes

def test_close_then_claim_never_meets_the_file_that_was_closed(tmp_path: Path):
    with served_lane(tmp_path) as disk:
        for turn in range(100):
            with disk.open() as fd:
                os.pwrite(fd, b"x" * 50_000, turn)
                if turn % 10 == 0:
                    assert disk.call("claim") is False
                    assert disk.call("open_count") == 1
            assert disk.call("claim") is True, f"turn {turn}"
            with pytest.raises(OSError) as caught:
                disk.path.open("rb")
            assert caught.value.errno == errno.EBUSY
            assert disk.path.stat().st_size == disk.size
            disk.call("release_claim")


def test_a_mapping_keeps_the_device_open(tmp_path: Path):
    with served_lane(tmp_path) as disk:
        with disk.open() as fd:
            mapped = mmap.mmap(fd, PAGE)
        assert disk.call("claim") is False
        mapped[:4] = b"kept"
        mapped.close()
        assert disk.call("claim") is True
        disk.call("release_claim")
        assert disk.path.read_bytes()[:4] == b"kept", "written back when it was unmapped"


def test_a_change_of_size_is_seen_at_once(tmp_path: Path):
    with served_lane(tmp_path, 4 * MIB) as disk:
        with disk.open() as fd, mmap.mmap(fd, 4 * MIB) as mapped:
            mapped[:] = b"o" * (4 * MIB)
        for size in (MIB, 8 * MIB, 0, 2 * MIB, PAGE):
            assert disk.path.stat().st_size != size  # and is kept by the kernel for a second
            assert disk.call("claim")
            disk.call("resize", size)
            disk.call("release_claim")
            assert disk.path.stat().st_size == size
            with disk.open() as fd:
                assert os.lseek(fd, 0, os.SEEK_END) == size
                if size == 0:
                    with pytest.raises(OSError) as caught:
                        os.pread(fd, 1, 0)
                    assert caught.value.errno == errno.ENXIO
                    continue
                with mmap.mmap(fd, size) as mapped:
                    assert mapped[:] == bytes(size), "pages of the old store"
                    mapped[size - 4:] = b"last"
                assert os.pread(fd, 100, size - 4) == b"last"


# --- looking for requests before sleeping

def test_a_device_that_was_busy_costs_nothing_when_idle(tmp_path: Path):
    """Requests one after the other make a thread look for the next one; without any it sleeps."""
    with served_lane(tmp_path) as disk:
        with disk.open() as fd:
            for _ in range(3000):
                os.pread(fd, PAGE, 0)
        time.sleep(0.05)
        before = cpu_ticks(disk.pid)
        time.sleep(2)
        assert cpu_ticks(disk.pid) - before <= 1


def cpu_ticks(pid: int) -> int:
    """CPU time of a process in units of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
