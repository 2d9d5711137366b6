# SPDX-License-Identifier: Apache-2.0
"""A lane whose device becomes larger and smaller while it is open."""
from __future__ import annotations

import errno
import struct

import pytest

from tests.support.wire import (
    MIB,
    PAGE,
    PUNCH_HOLE,
    SEEK_HOLE,
    Op,
    fallocate_in,
    lseek_in,
    read_in,
    setattr_in,
    wired,
    write_in,
)
from zramfs.store.resize import resize

KEEP_SIZE = 1
INVAL_INODE, STORE = 2, 4  # FUSE_NOTIFY_...


def test_requests_meet_the_size_of_their_moment() -> None:
    with wired(4 * MIB, grows_to=16 * MIB) as wire:
        assert wire.call(Op.OPEN, bytes(8)).error == 0
        wire.write(3 * MIB, b"old")
        assert wire.call(Op.WRITE, write_in(8 * MIB, 4) + b"over").error == errno.ENOSPC
        resize(wire.store, 16 * MIB)
        assert wire.attributes()["size"] == 16 * MIB
        assert wire.call(Op.SETATTR, setattr_in(valid=8, size=16 * MIB)).error == 0
        assert wire.write(8 * MIB, b"now") == 3
        assert wire.read(8 * MIB, 3) == b"now" and wire.read(3 * MIB, 3) == b"old"
        statfs = struct.unpack_from("=Q", wire.call(Op.STATFS).data)[0]
        assert statfs == 16 * MIB // PAGE
        resize(wire.store, 6 * MIB, discard=True)
        assert wire.attributes()["size"] == 6 * MIB
        assert wire.call(Op.READ, read_in(8 * MIB, 3)).data == b""
        assert wire.call(Op.WRITE, write_in(8 * MIB, 4) + b"over").error == errno.ENOSPC
        hole = struct.unpack("=Q", wire.call(Op.LSEEK, lseek_in(3 * MIB, SEEK_HOLE)).data)[0]
        assert hole == 3 * MIB + PAGE
        discard = fallocate_in(5 * MIB, 8 * MIB, PUNCH_HOLE | KEEP_SIZE)
        assert wire.call(Op.FALLOCATE, discard).error == 0, "cut at the end"
        assert wire.lane.open_count == 1 and wire.lane.stats().protocol_errors == 0


@pytest.mark.parametrize("larger", [True, False])
def test_the_kernel_hears_of_it_without_losing_mapped_pages(larger: bool) -> None:
    with wired(4 * MIB, grows_to=16 * MIB) as wire:
        resize(wire.store, 16 * MIB if larger else 2 * MIB)
        wire.lane.notify_resize(larger)
        note = wire.kernel.recv(100)
        # The attributes alone: an offset below 0.
        assert note == struct.pack("=IiQQqq", 40, INVAL_INODE, 0, 1, -1, 0)
        if larger:
            # One byte at the end, so that the kernel takes the size at once.
            head = struct.pack("=IiQQQII", 41, STORE, 0, 1, 16 * MIB - 1, 1, 0)
            assert wire.kernel.recv(100) == head + bytes(1)
        assert wire.silent()
