# SPDX-License-Identifier: Apache-2.0
"""When the next daemon may begin: as soon as no thread of the old one can touch anything, and not before."""
from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import signal
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.kept import Kept, kept, own_ends
from tests.support.whole import wait_until
from zramfs.host import fusermount

_PTRACE_CONT, _PTRACE_DETACH, _PTRACE_SEIZE, _PTRACE_O_TRACEEXIT = 7, 17, 0x4206, 0x40
_WALL = 0x40000000
_INIT, _GETATTR, _OPEN, _FLUSH = 26, 3, 14, 25
LOOKS = 30  # of a keeper, one a millisecond, after which it has not begun by mistake

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]


class Sticky:
    """A file system of one file that answers no FLUSH: whoever closes its file waits, also at its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()
        self._fd = fusermount.mount_file(path, options={"fsname": "sticky", "subtype": "sticky"})
        self.flushed = threading.Event()
        self._waiting: list[int] = []  # FLUSH requests; under _lock, with _is_over
        self._is_over = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                opcode, unique = struct.unpack_from("=IQ", os.read(self._fd, 1 << 17), 4)
                body, error = b"", 0
                if opcode == _INIT:
                    body = struct.pack("=IIIIHHIIHHI28x", 7, 31, 4096, 0, 12, 9, 4096, 1, 0, 0, 0)
                elif opcode == _GETATTR:
                    times = [0] * 6
                    body = struct.pack("=Q8x6Q3I7I", 9, 1, 0, 0, *times, 0o100600, 1, 0, 0, 0, 4096, 0)
                elif opcode == _OPEN:
                    body = bytes(16)
                elif opcode == _FLUSH:
                    with self._lock:
                        self.flushed.set()
                        if not self._is_over:
                            self._waiting.append(unique)
                            continue
                else:
                    error = -errno.ENOSYS
                self._answer(unique, body, error)

    def _answer(self, unique: int, body: bytes, error: int) -> None:
        os.write(self._fd, struct.pack("=IiQ", 16 + len(body), error, unique) + body)

    def let_go(self) -> None:
        """Whoever waits is answered, and whoever comes."""
        with self._lock:
            self._is_over = True
            while self._waiting:
                self._answer(self._waiting.pop(), b"", 0)

    def end(self) -> None:
        self.let_go()
        fusermount.unmount(self.path, lazy=True)
        self._thread.join(60)
        os.close(self._fd)


@pytest.fixture
def sticky(tmp_path: Path) -> Iterator[Sticky]:
    server = Sticky(tmp_path / "sticky")
    try:
        yield server
    finally:
        server.end()


@pytest.mark.requires("root", "fuse")
def test_the_next_daemon_does_not_wait_until_the_old_one_has_given_everything_back(
    tmp_path: Path, sticky: Sticky
) -> None:
    place = tmp_path / "keeper"
    place.mkdir()
    with kept(place, standby=True, threads=3, holds=str(sticky.path)) as keeper:
        server = keeper.wait_for("serving")
        standby, end = keeper.wait_for_standby(), os.pidfd_open(server)
        os.kill(server, signal.SIGKILL)
        assert keeper.wait_for("serving", 2) == standby
        assert sticky.flushed.wait(60)
        assert select.select([end], [], [], 0)[0] == [], "a thread is still about to close its files"
        os.close(end)
        assert f"the daemon, process {server}, was ended by signal 9" in keeper.log
        with keeper.page(standby) as page:
            assert own_ends(page) == 0
        sticky.let_go()
        wait_until(lambda: not os.path.exists(f"/proc/{server}"), "the keeper has waited for the old one")


@pytest.mark.requires("root")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_the_next_daemon_waits_for_the_last_thread_of_the_old_one_that_has_not_ended(
    tmp_path: Path, number: signal.Signals
) -> None:
    """A tracer holds one thread at the last point before it is past."""
    with kept(tmp_path, standby=True, threads=3) as keeper:
        server = keeper.wait_for("serving")
        keeper.wait_for_standby()
        held = sorted(map(int, os.listdir(f"/proc/{server}/task")))[2]
        with held_at_its_end(held) as let_go:
            os.kill(server, number)
            wait_until(lambda: not any_other_lives(server, held), "the end of the other threads")
            before = switches(keeper)
            wait_until(lambda: switches(keeper) > before + LOOKS, "the keeper has looked again and again", 30)
            assert len(keeper.events("serving")) == 1
            let_go()
            keeper.wait_for("serving", 2)
        with keeper.page(keeper.events("serving")[1][0]) as page:
            assert own_ends(page) == (number != signal.SIGKILL)


def test_a_thread_that_ends_is_no_end_of_the_daemon(tmp_path: Path) -> None:
    with kept(tmp_path, standby=True, threads=3, ends=True) as keeper:
        server = keeper.wait_for("serving")
        # The test's own watch is a thread, too.
        wait_until(lambda: len(os.listdir(f"/proc/{server}/task")) <= 2, "the end of its threads")
        assert len(keeper.events("serving")) == 1
        standby = keeper.wait_for_standby()
        os.kill(server, signal.SIGKILL)
        assert keeper.wait_for("serving", 2) == standby


@contextlib.contextmanager
def held_at_its_end(tid: int) -> Iterator[object]:
    """Gives what lets the thread go; it is called at the end in any case."""
    if _libc.ptrace(_PTRACE_SEIZE, tid, None, _PTRACE_O_TRACEEXIT):
        raise OSError(ctypes.get_errno(), f"thread {tid} cannot be traced")
    done = False

    def let_go() -> None:
        nonlocal done
        if not done:
            done = True
            os.waitpid(tid, _WALL)  # it has stopped
            _libc.ptrace(_PTRACE_DETACH, tid, None, None)

    try:
        yield let_go
    finally:
        let_go()


def any_other_lives(server: int, held: int) -> bool:
    """Whether any thread but this one, and the first one, which stays until all have ended, runs."""
    found = [int(each) for each in os.listdir(f"/proc/{server}/task")]
    state = Path(f"/proc/{server}/task/{server}/stat").read_text().rpartition(")")[2].split()[0]
    return not set(found) <= {server, held} or state != "Z"


def switches(keeper: Kept) -> int:
    """How often the keeper has waited for something."""
    lines = Path(f"/proc/{keeper.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))
