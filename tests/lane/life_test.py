# SPDX-License-Identifier: Apache-2.0
"""How the lane ends: by itself, by abort, by its last reference, and by errors."""
from __future__ import annotations

import errno
import gc
import os
import select
import signal
import socket
import threading
import time

import pytest

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
from zramfs.lane.lane import Lane
from zramfs.store.store import Store


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
        wait_until(lambda: wire.lane.stats().in_flight or wire.lane.stats().write_ios, "the write has begun")
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
        over, ticks = threading.Event(), 0

        def tick() -> None:
            nonlocal ticks
            while not over.wait(0.02):
                ticks += 1

        ticker = threading.Thread(target=tick)
        ticker.start()
        try:
            for _ in range(200):  # a busy machine may let the other thread wait
                before, began = ticks, time.monotonic()
                assert not wire.lane.join(0.3)
                assert 0.3 <= time.monotonic() - began < 60
                if ticks > before:
                    break
            assert ticks > before
        finally:
            over.set()
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
