# SPDX-License-Identifier: Apache-2.0
"""What a truncation does to a device, whose size never changes, and when it is refused."""
from __future__ import annotations

import errno
import os
import struct

import pytest

from tests.support.wire import (
    MIB,
    PAGE,
    Op,
    Wire,
    lseek_in,
    read_in,
    setattr_in,
    wired,
    write_in,
)

MODE, SIZE, HANDLE = 1, 8, 64
OURS, THEIRS = 100, 200


def open_by(wire: Wire, pid: int) -> int:
    """The handle."""
    unique = wire.send(Op.OPEN, bytes(8), pid=pid)
    reply = wire.receive()
    assert (reply.unique, reply.error) == (unique, 0)
    return struct.unpack_from("=Q", reply.data)[0]


def truncate_by(wire: Wire, pid: int, size: int = 0, flags: int = 0) -> int:
    """The error. flags: HANDLE, as of ftruncate."""
    wire.send(Op.SETATTR, setattr_in(valid=SIZE | flags, size=size), pid=pid)
    return wire.receive().error


def release(wire: Wire, handle: int) -> None:
    assert wire.call(Op.RELEASE, struct.pack("=QQQ", handle, 0, 0)).error == 0


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("flags", [0, HANDLE])
def test_a_truncation_to_0_discards_all_pages_and_keeps_the_size(flags, threads):
    with wired(4 * MIB, threads=threads) as wire:
        for n in range(4):
            wire.write(n * MIB, os.urandom(MIB))
        open_by(wire, OURS)
        reply = wire.call(Op.SETATTR, setattr_in(valid=SIZE | MODE | HANDLE, size=0, mode=0o640))
        after = wire.attributes(reply)
        assert (after["size"], after["blocks"], after["mode"]) == (4 * MIB, 0, 0o100640)
        assert wire.read(0, MIB) == wire.read(3 * MIB, MIB) == bytes(MIB)
        stats = wire.lane.stats()
        assert (stats.discard_ios, stats.discard_sectors) == (1, 4 * MIB // 512)
        assert wire.store.stats().orig_data_size == 0
        assert wire.lane.open_count == 1
        wire.write(0, b"new")
        assert wire.read(0, 3) == b"new"


@pytest.mark.parametrize(("size", "error"), [
    (MIB, 0), (1, 0), (MIB - 1, 0), (MIB + 1, errno.EINVAL), ((1 << 64) - 1, errno.EINVAL),
])
def test_other_sizes_change_nothing(size, error):
    with wired() as wire:
        wire.write(0, b"kept")
        wire.write(MIB - 4, b"kept")
        reply = wire.call(Op.SETATTR, setattr_in(valid=SIZE | MODE, size=size, mode=0o640))
        assert reply.error == error
        after = wire.attributes()
        assert after["size"] == MIB
        assert after["mode"] == (0o100600 if error else 0o100640), "nothing is half done"
        assert wire.read(0, 4) == wire.read(MIB - 4, 4) == b"kept"
        stats = wire.lane.stats()
        assert (stats.refused_sizes, stats.busy_truncations) == (bool(error), 0)
        assert stats.protocol_errors == 0, "a user's mistake is not the kernel's"


def test_a_device_that_others_have_open_is_not_truncated():
    with wired() as wire:
        wire.write(0, b"kept")
        open_by(wire, THEIRS)
        ours = open_by(wire, OURS)
        assert truncate_by(wire, OURS) == errno.EBUSY  # O_TRUNC
        assert truncate_by(wire, OURS, flags=HANDLE) == errno.EBUSY
        assert truncate_by(wire, OURS, 5) == 0, "this one takes nothing away from anybody"
        release(wire, ours)
        assert truncate_by(wire, OURS) == errno.EBUSY, "by path, which needs no open file"
        assert wire.lane.stats().busy_truncations == 3
        assert wire.read(0, 4) == b"kept" and wire.lane.open_count == 1


def test_a_claimed_device_is_not_truncated():
    with wired() as wire:
        wire.write(0, b"kept")
        assert wire.lane.claim()
        assert truncate_by(wire, OURS) == errno.EBUSY
        wire.lane.release_claim()
        assert wire.read(0, 4) == b"kept"
        assert truncate_by(wire, OURS) == 0, "by path, and nobody has it open"
        assert wire.read(0, 4) == bytes(4)
        assert wire.lane.claim()


USES = {"read": (Op.READ, read_in(0, 1)), "write": (Op.WRITE, write_in(0, 1) + b"x")}


@pytest.mark.parametrize("use", USES)
def test_an_open_file_that_was_used_is_not_taken_for_that_of_a_truncating_open(use):
    """A task that opened the device for a loop device truncates it by its path: the loop's users would lose
    everything. The kernel's requests are those of open(O_TRUNC), but for what came between."""
    with wired() as wire:
        open_by(wire, OURS)
        assert wire.call(Op.GETATTR, bytes(16)).error == wire.call(Op.STATFS).error == 0
        assert wire.call(Op.LSEEK, lseek_in(0, 4)).error == 0
        assert truncate_by(wire, OURS) == 0, "nobody has used it"
        wire.call(*USES[use])
        assert truncate_by(wire, OURS) == errno.EBUSY


def test_an_open_file_of_another_task_is_not_taken_for_that_of_a_truncating_open():
    with wired() as wire:
        open_by(wire, THEIRS)
        assert truncate_by(wire, OURS) == errno.EBUSY
        release(wire, open_by(wire, OURS))
        assert truncate_by(wire, OURS) == errno.EBUSY, "ours was closed, theirs is left"


def test_a_truncation_waits_for_a_release_that_is_on_its_way():
    """close(2) returns before its RELEASE is answered; `cp a disk; cp b disk` must not meet EBUSY."""
    with wired(threads=2) as wire:
        for _ in range(100):
            before = open_by(wire, THEIRS)
            wire.send(Op.RELEASE, struct.pack("=QQQ", before, 0, 0))
            wire.send(Op.OPEN, bytes(8), pid=OURS)
            replies = [wire.receive(), wire.receive()]
            handle = next(reply.data for reply in replies if reply.data)
            assert truncate_by(wire, OURS) == 0
            wire.call(Op.RELEASE, struct.pack("=QQQ", struct.unpack_from("=Q", handle)[0], 0, 0))


def test_nobody_opens_the_device_while_it_is_truncated():
    with wired(16 * MIB, threads=3) as wire:
        met = 0
        # On a busy machine the two seldom meet.
        for rounds in range(3000):
            if met and rounds >= 200:
                break
            for n in range(4):
                wire.write(n * MIB, bytes([1, 2]) * (MIB // 2))
            truncation = wire.send(Op.SETATTR, setattr_in(valid=SIZE), pid=OURS)
            wire.send(Op.OPEN, bytes(8), pid=THEIRS)
            errors = {reply.unique == truncation: reply.error for reply in (wire.receive(), wire.receive())}
            # Whoever comes first has it; a truncation that was over left the device free.
            if errors[True]:
                assert errors == {True: errno.EBUSY, False: 0}
            met += errors[False] == errno.EBUSY
            if not errors[False]:
                assert wire.lane.open_count == 1
                assert wire.call(Op.RELEASE, wire.release_in()).error == 0
            assert errors[True] == errno.EBUSY or wire.read(0, PAGE) == bytes(PAGE)
        assert met, "no OPEN came during a truncation"
