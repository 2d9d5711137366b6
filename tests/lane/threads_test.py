# SPDX-License-Identifier: Apache-2.0
"""The lane's threads: what they do at once, which signals they take, and what they allocate."""
from __future__ import annotations

import ctypes
import gc
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from tests.support.paths import python_environment
from tests.support.whole import wait_until
from tests.support.wire import (
    MIB,
    PAGE,
    TIMEOUT,
    Op,
    lane_threads,
    read_in,
    wired,
    write_in,
)

SANITIZED = "san" in os.environ.get("LD_PRELOAD", "")
PLAIN = pytest.mark.skipif(
    SANITIZED, reason="a sanitizer has the heap's functions, and its mlock does nothing",
)
HOLDING_THE_GIL = ctypes.PyDLL(None)  # calls that keep the GIL


def blocked_signals(task: Path) -> set[int]:
    status = (task / "status").read_text()
    mask = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk")), 16)
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


def test_threads_have_names_and_take_no_signals():
    with wired(threads=3):
        found = lane_threads()
        assert sorted(found) == ["zramfs-lane0", "zramfs-lane1", "zramfs-lane2"]
        for task in found.values():
            # A fault that is blocked kills without a word; faulthandler has to see it. (While a thread
            # is being made, the C library blocks everything.)
            wait_until(lambda task=task: signal.SIGSEGV not in blocked_signals(task), "it lets SIGSEGV in")
            assert blocked_signals(task) >= {
                signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD, signal.SIGALRM}
    assert not lane_threads()


def test_requests_are_answered_while_the_interpreter_stands_still():
    with wired() as wire:
        wire.write(0, b"data" * 1024)
        for _ in range(20):
            wire.send(Op.READ, read_in(0, PAGE))
        HOLDING_THE_GIL.usleep(200_000)
        for _ in range(20):
            wait = struct.pack("=ihh", wire.kernel.fileno(), select.POLLIN, 0)
            assert HOLDING_THE_GIL.poll(wait, 1, 60_000) == 1
            assert wire.kernel.recv(2 * PAGE, socket.MSG_DONTWAIT)[16:] == b"data" * 1024


def test_several_threads_serve_at_once():
    """A long write does not hold up what comes behind it: zstd 19 works on this one for 10 ms."""
    for threads in (1, 2):
        with wired(16 * MIB, algo="zstd", level=19, threads=threads) as wire:
            overtaken, rounds, end = 0, 0, time.monotonic() + 60
            # The second thread needs a CPU to overtake with, which a busy machine may not have at once.
            while rounds < 10 or (threads > 1 and overtaken < 3 and time.monotonic() < end):
                slow = wire.send(Op.WRITE, write_in(0, 1 << 17) + os.urandom(1 << 17))
                fast = wire.send(Op.GETATTR, bytes(16))
                overtaken += [wire.receive().unique for _ in range(2)] == [fast, slow]
                rounds += 1
            assert overtaken == 0 if threads == 1 else overtaken >= 3


def waits() -> dict[str, int]:
    """Lane thread -> how often it has waited for something."""
    found = {}
    for name, task in lane_threads().items():
        lines = (task / "status").read_text().splitlines()
        found[name] = int(next(line.split()[1] for line in lines if line.startswith("voluntary_ctxt")))
    return found


@pytest.mark.skipif(
    SANITIZED, reason="a sanitizer holds requests up, and one that is held up calls another thread",
)
def test_one_client_keeps_one_thread_warm_and_many_get_them_all():
    with wired(threads=3) as wire:
        wire.attributes()

        def stays_warm() -> bool:
            before = waits()
            for n in range(300):
                wire.write(n * PAGE % MIB, b"little" * 100)
                wire.read(n * PAGE % MIB, PAGE)
            now = waits()
            # In turns it would be 200 each. A request that was held up for a moment calls another thread, and
            # on a busy machine many are.
            return sum(now[name] - before[name] for name in ("zramfs-lane1", "zramfs-lane2")) < 150

        wait_until(stays_warm, "one thread serves one client")
        after = waits()

        def flood() -> bool:
            for _ in range(100):
                wire.send(Op.READ, read_in(0, 32 * PAGE))
            assert not any(wire.receive().error for _ in range(100))
            now = waits()
            return all(now[name] > after[name] for name in now)

        wait_until(flood, "all threads serve", TIMEOUT)


def test_many_requests_in_flight_get_their_own_answers():
    with wired(256 * PAGE, threads=4) as wire:
        pages = [os.urandom(PAGE) for _ in range(256)]
        wanted = {}

        def ask() -> None:
            for n, page in enumerate(pages):
                wire.send(Op.WRITE, write_in(n * PAGE, PAGE) + page)
            for n in range(256):
                wanted[wire.send(Op.READ, read_in(n * PAGE, PAGE))] = n

        asking = threading.Thread(target=ask)
        asking.start()
        replies = [wire.receive() for _ in range(2 * 256)]
        asking.join(TIMEOUT)
        reads = {r.unique: r.data for r in replies if r.unique in wanted}
        assert len(reads) == 256 and not any(r.error for r in replies)
        # A read that overtook the write of its page sees it unwritten, never torn.
        assert all(data in (pages[wanted[unique]], bytes(PAGE)) for unique, data in reads.items())
        assert wire.read(0, 256 * PAGE if os.getuid() == 0 else PAGE).startswith(pages[0])


def status_kib(field: str) -> int:
    return int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines()
                    if line.startswith(field)))


@PLAIN
@pytest.mark.requires("root")  # others may have a low RLIMIT_MEMLOCK
def test_buffers_are_locked_in_memory():
    gc.collect()  # what earlier tests left for it may have some locked
    before = status_kib("VmLck")
    with wired(threads=4) as wire:
        assert wire.lane.stats().unlocked_bytes == 0
        assert status_kib("VmLck") - before >= 4 * 1024
    del wire
    assert status_kib("VmLck") == before


@PLAIN
@pytest.mark.requires("root")  # to become somebody else
def test_a_lane_that_may_not_lock_says_so_and_serves():
    code = """
        import os, resource, sys
        from tests.support.wire import wired
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
        with wired() as wire: pass      # imports what a nobody may not read
        os.setuid(65534)
        with wired(threads=2) as wire:
            wire.write(3, b"served")
            assert wire.read(3, 6) == b"served"
            print(wire.lane.stats().unlocked_bytes)
        """
    assert int(child(code)) >= 2 * MIB


@PLAIN
def test_serving_allocates_nothing():
    """A thread's first allocation gives it a heap of its own, and glibc lists its heaps."""
    code = """
        import ctypes, os, re
        from tests.support.wire import ARGUMENTS, FORGET_LIKE, MIB, Op, PAGE, read_in, wired, write_in
        libc = ctypes.CDLL(None)
        libc.open_memstream.restype = ctypes.c_void_p

        def heaps():
            text, size = ctypes.c_char_p(), ctypes.c_size_t()
            file = ctypes.c_void_p(libc.open_memstream(ctypes.byref(text), ctypes.byref(size)))
            libc.malloc_info(0, file); libc.fclose(file)
            return text.value.count(b"<heap nr=")

        with wired(64 * MIB, threads=2, algo="zstd") as wire:
            before = heaps()
            for n in range(200):
                wire.write(n * 100_000, (b"%d" % n) * 9000)
                wire.read(n * 90_000, 50_000)
                for opcode, body in ARGUMENTS.items():
                    if opcode not in FORGET_LIKE:
                        wire.call(opcode, body)
            assert wire.lane.stats().write_ios >= 200
            print(heaps() - before)
        """
    assert child(code).split() == ["0"]


def child(code: str) -> str:
    """Runs Python in a process of its own, with this interpreter's paths; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60,
        env=python_environment(),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
