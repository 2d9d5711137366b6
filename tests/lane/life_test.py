# SPDX-License-Identifier: Apache-2.0
"""The lane's threads and their end, who may replace the store when, and what the counters say."""
from __future__ import annotations

import bisect
import ctypes
import errno
import gc
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from tests.support.paths import python_environment
from tests.support.wire import (
    KEEP_SIZE,
    MIB,
    PAGE,
    PUNCH_HOLE,
    SEEK_DATA,
    TIMEOUT,
    Op,
    fallocate_in,
    lseek_in,
    read_in,
    setattr_in,
    wired,
    write_in,
)
from zramfs.lane import Lane
from zramfs.stats import BUCKET_BOUNDS, OPERATIONS
from zramfs.store import Store

PLAIN = pytest.mark.skipif(
    "san" in os.environ.get("LD_PRELOAD", ""),
    reason="a sanitizer has the heap's functions, and its mlock does nothing",
)
HOLDING_THE_GIL = ctypes.PyDLL(None)  # calls that keep the GIL


def lane_threads() -> dict[str, Path]:
    """Name -> /proc directory of this process's lane threads."""
    named = {(task / "comm").read_text().strip(): task for task in Path("/proc/self/task").iterdir()}
    return {name: task for name, task in named.items() if name.startswith("zramfs-lane")}


def blocked_signals(task: Path) -> set[int]:
    status = (task / "status").read_text()
    mask = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk")), 16)
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


def wait_for(what, seconds: float = TIMEOUT) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.001)


# --- threads

def test_threads_have_names_and_take_no_signals():
    with wired(threads=3):
        found = lane_threads()
        assert sorted(found) == ["zramfs-lane0", "zramfs-lane1", "zramfs-lane2"]
        for task in found.values():
            # A fault that is blocked kills without a word; faulthandler has to see it. (While a thread
            # is being made, the C library blocks everything.)
            wait_for(lambda task=task: signal.SIGSEGV not in blocked_signals(task))
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
            assert wire.kernel.recv(2 * PAGE, socket.MSG_DONTWAIT)[16:] == b"data" * 1024


def test_several_threads_serve_at_once():
    """A long write does not hold up what comes behind it: zstd 19 works on this one for 10 ms."""
    for threads in (1, 2):
        with wired(16 * MIB, algo="zstd", level=19, threads=threads) as wire:
            overtaken = 0
            for _ in range(10):
                slow = wire.send(Op.WRITE, write_in(0, 1 << 17) + os.urandom(1 << 17))
                fast = wire.send(Op.GETATTR, bytes(16))
                overtaken += [wire.receive().unique for _ in range(2)] == [fast, slow]
            # The second thread needs a CPU to overtake with, which a busy machine may not have at once.
            assert overtaken == 0 if threads == 1 else overtaken >= 3


def waits() -> dict[str, int]:
    """Lane thread -> how often it has waited for something."""
    found = {}
    for name, task in lane_threads().items():
        lines = (task / "status").read_text().splitlines()
        found[name] = int(next(line.split()[1] for line in lines if line.startswith("voluntary_ctxt")))
    return found


def test_one_client_keeps_one_thread_warm_and_many_get_them_all():
    with wired(threads=3) as wire:
        wire.attributes()
        before = waits()
        for n in range(300):
            wire.write(n * PAGE % MIB, b"little" * 100)
            wire.read(n * PAGE % MIB, PAGE)
        after = waits()
        # In turns it would be 200 each. A request that was held up for a moment calls another thread.
        others = sum(after[name] - before[name] for name in ("zramfs-lane1", "zramfs-lane2"))
        assert others < 150

        def flood() -> bool:
            for _ in range(100):
                wire.send(Op.READ, read_in(0, 32 * PAGE))
            assert not any(wire.receive().error for _ in range(100))
            now = waits()
            return all(now[name] > after[name] for name in now)

        wait_for(flood)


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


# --- the end

def test_the_other_end_closes():
    with wired() as wire:
        assert wire.lane.alive and not wire.lane.join(0)
        wire.kernel.close()
        assert wire.lane.join(TIMEOUT)
        assert not wire.lane.alive and wire.lane.error is None
        assert select.select([wire.lane.done_fd], [], [], 0)[0]
        assert wire.lane.join(0)


def test_abort_ends_threads_that_wait_and_gives_the_connection_up():
    with wired(threads=5) as wire:
        wire.write(0, b"x")
        assert not select.select([wire.lane.done_fd], [], [], 0)[0]
        wire.lane.abort()
        assert not wire.lane.alive and wire.lane.join(0) and wire.lane.error is None
        # Nobody holds the descriptor any more, though the lane object lives.
        assert wire.kernel.recv(1) == b""


def test_abort_answers_what_is_in_hand():
    with wired(16 * MIB, algo="zstd", level=19, threads=1) as wire:
        unique = wire.send(Op.WRITE, write_in(0, 1 << 17) + os.urandom(1 << 16) * 2)
        wait_for(lambda: wire.lane.stats().in_flight or wire.lane.stats().write_ios)
        wire.lane.abort()
        reply = wire.receive()
        assert (reply.unique, reply.error) == (unique, 0)


def test_dropping_the_last_reference_ends_the_threads():
    kernel, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kernel.settimeout(TIMEOUT)
    lane = Lane(ours.detach(), threads=3)
    store = Store(MIB)
    lane.set_store(store)
    lane.start()
    circle = [lane, store]
    circle.append(circle)
    del lane, store, circle
    with kernel:
        kernel.send(b"\0" * 8)
        gc.collect()
        assert kernel.recv(1) == b""
    assert not lane_threads()


def test_a_lane_that_was_never_started_closes_its_descriptor():
    kernel, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kernel.settimeout(TIMEOUT)
    lane = Lane(ours.detach())
    with pytest.raises(RuntimeError, match="call start"):
        lane.join(0)
    assert not lane.alive
    del lane
    with kernel:
        assert kernel.recv(1) == b""


def test_an_unexpected_error_of_reading_is_told():
    lane = Lane(os.open("/", os.O_RDONLY), threads=2)
    lane.start()
    assert lane.join(TIMEOUT)
    assert lane.error == f"reading requests from the kernel failed: {os.strerror(errno.EISDIR)}"


def test_join_gives_up_in_time_and_lets_others_run():
    with wired() as wire:
        ticks = []
        ticker = threading.Thread(target=lambda: ticks.extend(time.sleep(0.02) or n for n in range(5)))
        ticker.start()
        began = time.monotonic()
        assert not wire.lane.join(0.3)
        assert 0.3 <= time.monotonic() - began < 5
        assert ticks
        ticker.join()


def test_join_can_be_interrupted():
    with wired() as wire:
        def interrupt(number, frame):
            raise InterruptedError

        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(InterruptedError):
                wire.lane.join()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def test_wrong_use():
    for threads in (0, -1, 65):
        with pytest.raises(ValueError, match=f"expected 1 to 64 threads, got {threads}"):
            Lane(-1, threads=threads)
    with pytest.raises(OSError, match="Bad file descriptor"):
        Lane(-1)
    with wired() as wire:
        with pytest.raises(RuntimeError, match="started before"):
            wire.lane.start()
        closed = Store(PAGE)
        closed.close()
        assert wire.lane.claim()
        with pytest.raises(ValueError, match="closed"):
            wire.lane.set_store(closed)


def test_a_reply_that_cannot_be_sent_becomes_an_error():
    """Without any answer the caller would hang for ever."""
    kernel, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 10)
    with kernel, wired(start=False) as wire:
        lane = Lane(ours.detach())
        lane.set_store(wire.store)
        lane.start()
        kernel.settimeout(TIMEOUT)
        wire.kernel = kernel
        assert wire.call(Op.READ, read_in(0, MIB)).error == errno.EIO
        assert lane.stats().reply_errors == 1
        assert wire.read(0, PAGE) == bytes(PAGE)
        lane.abort()
        assert lane.join(TIMEOUT)


# --- open files, claims, stores

def test_claims_and_open_files_exclude_each_other():
    with wired() as wire:
        lane = wire.lane
        assert [wire.call(Op.OPEN, bytes(8)).error for _ in range(3)] == [0, 0, 0]
        assert lane.open_count == 3 and not lane.claim()
        for left in (2, 1, 0):
            assert not lane.claim()
            assert wire.call(Op.RELEASE, bytes(24)).error == 0
            assert lane.open_count == left
        assert lane.claim() and not lane.claim()
        assert lane.open_count == 0
        assert wire.call(Op.OPEN, bytes(8)).error == errno.EBUSY
        # what comes by path needs no open file
        assert wire.attributes()["size"] == MIB
        lane.release_claim()
        assert wire.call(Op.OPEN, bytes(8)).error == 0
        with pytest.raises(RuntimeError, match="without a successful claim"):
            lane.release_claim()
        assert lane.open_count == 1


def test_claim_waits_for_a_release_that_is_on_its_way():
    """close(2) returns before its RELEASE is answered; "close; reset" must not meet EBUSY."""
    with wired(threads=1, algo="zstd", level=19) as wire:
        for _ in range(20):
            assert wire.call(Op.OPEN, bytes(8)).error == 0
            wire.send(Op.WRITE, write_in(0, PAGE) + os.urandom(PAGE))
            wire.send(Op.RELEASE, bytes(24))
            assert wire.lane.claim()
            wire.lane.release_claim()
            assert [wire.receive().error for _ in range(2)] == [0, 0]


def test_claims_and_opens_race_for_one_winner():
    with wired(threads=4) as wire:
        for _ in range(200):
            wire.send(Op.OPEN, bytes(8))
            claimed = wire.lane.claim()
            opened = wire.receive().error == 0
            assert opened != claimed
            if claimed:
                wire.lane.release_claim()
            else:
                assert wire.call(Op.RELEASE, bytes(24)).error == 0


def test_release_of_nothing_is_a_protocol_error():
    with wired() as wire:
        assert wire.call(Op.RELEASE, bytes(24)).error == errno.EINVAL
        assert wire.lane.claim()
        assert wire.call(Op.RELEASE, bytes(24)).error == errno.EINVAL
        assert wire.lane.stats().protocol_errors == 2 and wire.lane.open_count == 0


def test_a_running_lane_changes_its_store_only_while_claimed():
    with wired() as wire, pytest.raises(RuntimeError, match="only after claim"):
        wire.lane.set_store(None)


def test_stores_change_under_requests_for_attributes():
    """stat(2) needs no open file, so it may meet the change of a store; it must never meet a freed one."""
    stores = [Store(size * PAGE) for size in (1, 2, 3)]
    with wired(None, threads=4) as wire:
        stop = threading.Event()
        seen = set()

        def look() -> None:
            while not stop.is_set():
                seen.add(wire.attributes()["size"])
                assert wire.call(Op.STATFS).error == 0

        looking = threading.Thread(target=look)
        looking.start()
        assert wire.lane.claim()
        end = time.monotonic() + TIMEOUT
        changes = 0
        while changes < 300 or len(seen) < 4:
            assert time.monotonic() < end, f"only {seen} seen in {changes} changes"
            wire.lane.set_store((None, *stores)[changes % 4])
            changes += 1
            time.sleep(0)
        wire.lane.set_store(None)
        for store in stores:
            store.close()
        stop.set()
        looking.join(TIMEOUT)
        assert seen == {0, PAGE, 2 * PAGE, 3 * PAGE}
        wire.lane.release_claim()


def test_a_device_without_a_store():
    with wired(None) as wire:
        assert wire.attributes()["size"] == wire.attributes()["blocks"] == 0
        assert wire.call(Op.OPEN, bytes(8)).error == 0
        for opcode, body in (
            (Op.READ, read_in(0, 1)), (Op.WRITE, write_in(0, 1) + b"x"), (Op.LSEEK, lseek_in(0, SEEK_DATA)),
            (Op.FALLOCATE, fallocate_in(0, 1, PUNCH_HOLE | KEEP_SIZE)),
        ):
            assert wire.call(opcode, body).error == errno.ENXIO
        assert wire.call(Op.SETATTR, setattr_in(valid=8, size=0)).error == 0
        assert wire.call(Op.SETATTR, setattr_in(valid=8, size=PAGE)).error == errno.EINVAL
        for opcode in (Op.FSYNC, Op.FLUSH, Op.STATFS):
            assert wire.call(opcode, bytes(24)).error == 0
        assert wire.call(Op.RELEASE, bytes(24)).error == 0
        assert wire.lane.claim()
        store = Store(PAGE)
        wire.lane.set_store(store)
        wire.lane.release_claim()
        wire.write(0, b"now")
        assert wire.read(0, 3) == b"now"
        wire.lane.abort()
        assert wire.lane.join(TIMEOUT)
        store.close()


def test_notify_size_names_the_file():
    with wired() as wire:
        wire.lane.notify_size()
        note = wire.kernel.recv(100)
        # length, code FUSE_NOTIFY_INVAL_INODE, unique 0; inode 1, everything from offset 0
        assert note == bytes.fromhex("28000000 02000000 0000000000000000 0100000000000000") + bytes(16)
        wire.kernel.close()
        assert wire.lane.join(TIMEOUT)
        wire.lane.notify_size()


# --- counters

def test_counters():
    with wired() as wire:
        wire.write(0, bytes(range(256)) * 48)
        wire.write(100, b"x" * 412)
        wire.write(600, b"x" * 100)
        for _ in range(5):
            wire.read(0, 3 * PAGE)
        wire.read(MIB - 512, PAGE)
        wire.read(MIB, PAGE)
        wire.call(Op.FALLOCATE, fallocate_in(0, 2 * PAGE, PUNCH_HOLE | KEEP_SIZE))
        wire.call(Op.FSYNC, bytes(16))
        wire.call(Op.FLUSH, bytes(24))
        stats = wire.lane.stats()
        assert (stats.write_ios, stats.write_sectors) == (3, 25)
        assert (stats.read_ios, stats.read_sectors) == (6, 5 * 24 + 1)
        assert (stats.discard_ios, stats.discard_sectors) == (1, 16)
        assert (stats.flush_ios, stats.in_flight, stats.protocol_errors, stats.reply_errors) == (2, 0, 0, 0)
        assert 0 < stats.longest_us < 1_000_000


def test_latencies():
    """What a request adds to the time of its kind is the time by which it is counted."""
    kinds = ("write", "read", "discard", "flush")
    with wired(4 * MIB) as wire:
        before = wire.lane.stats()
        for n in range(160):
            size = 1 << n % 20
            kind = kinds[n // 20 % 4]
            if kind == "write":
                wire.write(0, os.urandom(size))
            elif kind == "read":
                wire.read(0, size)
            elif kind == "discard":
                wire.call(Op.FALLOCATE, fallocate_in(0, size, PUNCH_HOLE | KEEP_SIZE))
            else:
                wire.call(Op.FSYNC, bytes(16))
            after = wire.lane.stats()
            for operation, now, then in zip(OPERATIONS, after.latency, before.latency, strict=True):
                new = now - then
                bucket = bisect.bisect_left(BUCKET_BOUNDS, new.ns)
                expected = [int(operation == kind and b == bucket) for b in range(len(BUCKET_BOUNDS) + 1)]
                assert list(new.counts) == expected, (kind, size, new)
            before = after
        counts = [each.count for each in after.latency]
        assert counts == [after.read_ios, after.write_ios, after.discard_ios, after.flush_ios]
        times = [each.ns // 1_000_000 for each in after.latency]
        assert times == [after.read_ms, after.write_ms, after.discard_ms, after.flush_ms]
        used = {b for each in after.latency for b, n in enumerate(each.counts) if n}
        assert len(used) > 3, "requests of 1 byte and of 512 KiB take different times"


def test_times():
    """Compressing noise with zstd 19 takes measurable time: with two threads at it the sum of the
    times passes the time in which anything was in hand, which cannot pass the wall's."""
    with wired(16 * MIB, algo="zstd", level=19, threads=2) as wire:
        began = time.monotonic()
        size = 1 << 17
        for n in range(24):
            wire.send(Op.WRITE, write_in(n * size, size) + os.urandom(size))
        assert not any(wire.receive().error for _ in range(24))
        wall = (time.monotonic() - began) * 1000
        stats = wire.lane.stats()
        assert stats.write_ms == stats.queue_ms and stats.read_ms == 0
        assert 0 < stats.io_ms <= wall + 1
        assert stats.io_ms <= stats.queue_ms <= 2 * stats.io_ms + 2
        assert stats.longest_us / 1000 <= stats.write_ms <= 24 * stats.longest_us / 1000
        assert stats.io_ms >= wall / 4, "the lane was busy for most of the time"
