# SPDX-License-Identifier: Apache-2.0
"""Open files and claims of a lane, and who may replace its store when."""
from __future__ import annotations

import errno
import os
import threading
import time

import pytest

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
from zramfs.store.store import Store


def test_claims_and_open_files_exclude_each_other():
    with wired() as wire:
        lane = wire.lane
        assert [wire.call(Op.OPEN, bytes(8)).error for _ in range(3)] == [0, 0, 0]
        assert lane.open_count == 3 and not lane.claim()
        for left in (2, 1, 0):
            assert not lane.claim()
            assert wire.call(Op.RELEASE, wire.release_in()).error == 0
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
            wire.send(Op.RELEASE, wire.release_in())
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
                assert wire.call(Op.RELEASE, wire.release_in()).error == 0


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


def test_an_open_file_that_goes_meanwhile_lets_nobody_truncate_under_another():
    """A truncation by path waits a moment for releases on their way. One of the caller's own must not make
    the file that somebody else has open count as his."""
    with wired(threads=2) as wire:
        wire.write(0, b"kept")
        assert wire.call(Op.OPEN, bytes(8), pid=1).error == 0
        opened = wire.call(Op.OPEN, bytes(8), pid=2)
        handle = opened.data[:8]
        truncation = wire.send(Op.SETATTR, setattr_in(valid=8, size=0), pid=2)
        time.sleep(0.01)  # it takes 50 ms
        release = wire.send(Op.RELEASE, handle + bytes(16), pid=2)
        answers = {each.unique: each.error for each in (wire.receive(), wire.receive())}
        assert answers == {truncation: errno.EBUSY, release: 0}
        assert wire.read(0, 4) == b"kept"


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
        assert wire.call(Op.STATFS).error == 0
        assert wire.call(Op.RELEASE, wire.release_in()).error == 0
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
