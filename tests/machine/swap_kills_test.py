# SPDX-License-Identifier: Apache-2.0
"""Swap whose daemon is killed while programs have most of their memory on it, and verify every byte."""
from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.child import stopped
from tests.support.governed import abort
from tests.support.killer import Killer, found, has_standby, kill_daemon, state
from tests.support.scale import scaled
from tests.support.swap_load import build, fillers, group, until_swapped
from tests.support.whole import MIB, run, wait_until, zramfs
from zramfs.host import mounts
from zramfs.lifecycle import rundir

pytestmark = [
    pytest.mark.requires("root", "fuse", "loop", "swap", "memcg", "unsanitized"),
    pytest.mark.timeout(300),
    pytest.mark.soak,
]

KILLS = scaled(8, 4)
# Seconds between two kills: the keeper starts the next standby when the last one serves.
PAUSES = (0.2, 1.0)
NAME = Path("killed")
CONNECTIONS = Path("/sys/fs/fuse/connections")
POPULATE_READ, PAGEOUT = 22, 21  # of madvise, <linux/mman.h>
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(autouse=True)
def connections() -> Iterator[None]:
    """The kernel's control files for FUSE connections. Without them nothing could free what hangs."""
    is_missing = not os.listdir(CONNECTIONS)
    if is_missing:
        run("mount", "-t", "fusectl", "none", CONNECTIONS)
    yield
    if is_missing:
        run("umount", CONNECTIONS)


@contextlib.contextmanager
def freed_after(seconds: float) -> Iterator[None]:
    """Whoever waits for the device for longer goes on with an error."""
    [disk] = [each for each in mounts.mounts() if each.mountpoint == found(NAME).disk]
    minor = int(disk.dev.partition(":")[2])
    watchdog = threading.Timer(seconds, abort, [minor])
    watchdog.start()
    try:
        yield
        assert watchdog.is_alive(), f"{seconds:g} s were not enough"
    finally:
        watchdog.cancel()


class MemoryFile:
    """That of the device, mapped here as well."""

    def __init__(self) -> None:
        keeper = Path(f"/proc/{state(NAME).keeper_pid}")
        path = next(each for each in (keeper / "fd").iterdir()
                    if os.readlink(each) == "/memfd:zramfs (deleted)")
        self._fd = os.open(path, os.O_RDWR)
        self._map = mmap.mmap(self._fd, os.fstat(self._fd).st_size)
        self._at = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def push_out(self) -> None:
        """To swap, if it can go there: whatever of it no process but this one has mapped."""
        at = 0
        with contextlib.suppress(OSError):
            while True:
                at = os.lseek(self._fd, at, os.SEEK_DATA)
                end = os.lseek(self._fd, at, os.SEEK_HOLE)
                for advice in (POPULATE_READ, PAGEOUT):
                    _libc.madvise(ctypes.c_void_p(self._at + at), ctypes.c_size_t(end - at), advice)
                at = end

    def in_swap(self) -> int:
        """Bytes."""
        smaps = Path("/proc/self/smaps").read_text()
        [found] = re.findall(r"/memfd:zramfs .*?^Swap: +(\d+) kB", smaps, re.MULTILINE | re.DOTALL)
        return int(found) << 10


def swapped(pid: int) -> int:
    """Bytes of a process, private or shared."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.search(r"^Swap: +(\d+) kB", text, re.MULTILINE)[1]) << 10


def test_programs_on_swap_notice_no_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    kills = int(KILLS * max(1.0, request.config.getoption("soak")))
    program = build(tmp_path)
    zramfs("swap", NAME, "--size", "1G", "--priority", "32767")
    try:
        assert state(NAME).standby_pid, "swap always has a standby"
        with group(60 * MIB) as small, fillers(program, small, 150) as [filler]:
            until_swapped(small, 70 * MIB)
            with Killer.at_work(NAME, PAUSES) as killer:
                wait_until(lambda: killer.kills >= kills, "all kills", 120)
            filler.read_pass()
            filler.finish()
        log = found(NAME).log.read_text()
        assert {int(number) for number in re.findall(r"(\d+) are lost", log)} == {0}
        now = state(NAME)
        assert [swapped(pid) for pid in (now.pid, now.keeper_pid)] == [0, 0]
        ends = set(re.findall(r"the daemon, process \d+, (.*)", log))
        assert ends == {"was ended by signal 9"}, log[-4000:]
        kill_daemon(NAME)
        wait_until(lambda: state(NAME).standby_pid != 0, "another standby", 30)
    finally:
        if rundir.find(str(NAME)):
            with freed_after(50):
                zramfs("stop", NAME)


def test_programs_on_swap_notice_no_upgrade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    program = build(tmp_path)
    zramfs("swap", NAME, "--size", "512M", "--priority", "32767")
    try:
        with group(60 * MIB) as small, fillers(program, small, 120) as [filler]:
            until_swapped(small, 50 * MIB)
            for _ in range(3):
                before = state(NAME)
                zramfs("upgrade", NAME)
                now = state(NAME)
                assert now.pid != before.pid and now.keeper_pid == before.keeper_pid
            filler.read_pass()
            filler.finish()
        log = found(NAME).log.read_text()
        assert {int(number) for number in re.findall(r"(\d+) are lost", log)} == {0}
        now = state(NAME)
        assert [swapped(pid) for pid in (now.pid, now.keeper_pid)] == [0, 0]
        wait_until(lambda: state(NAME).standby_pid != 0, "another standby", 30)
    finally:
        if rundir.find(str(NAME)):
            with freed_after(50):
                zramfs("stop", NAME)


def test_what_is_stored_stays_in_memory_while_nobody_has_it_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Swapped out to the device itself it would have to be read from there to be found."""
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    program = build(tmp_path)
    zramfs("swap", NAME, "--size", "256M", "--priority", "32767")
    try:
        with group(40 * MIB) as small, fillers(program, small, 100) as [filler], freed_after(90):
            until_swapped(small, 50 * MIB)
            memory = MemoryFile()
            for _ in range(3):
                wait_until(lambda: has_standby(NAME), "a standby", 30)
                before = state(NAME)
                with stopped(before.standby_pid):
                    os.kill(before.pid, signal.SIGKILL)
                    wait_until(lambda pid=before.pid: not os.path.exists(f"/proc/{pid}"), "its end")
                    memory.push_out()
                    assert memory.in_swap() == 0
            filler.read_pass()
            filler.finish()
    finally:
        with freed_after(50):
            zramfs("stop", NAME)
