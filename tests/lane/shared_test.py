# SPDX-License-Identifier: Apache-2.0
"""Large requests that several threads of the lane work on."""
from __future__ import annotations

import errno
import time

import pytest

from tests.support.memory_file import MemoryFile
from tests.support.page_kinds import block
from tests.support.wire import MIB, PAGE, Op, read_in, wired, write_in

SIZE = 8 * MIB
PIECE = 32 << 10
# Borders of pages, pieces and chunks of 2 MiB, and places that are none.
OFFSETS = (0, 1, PAGE - 1, PIECE, 2 * MIB - 5 * PAGE, 2 * MIB - 777, 5 * MIB + 12345, SIZE - MIB)
LENGTHS = (4 * PIECE - 1, 4 * PIECE, 4 * PIECE + 1, MIB - 4097, MIB)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_large_requests_at_any_place_read_and_write_what_they_should(threads):
    model = bytearray(SIZE)
    with wired(SIZE, threads=threads) as wire:
        for number, offset in enumerate(OFFSETS):
            for length in LENGTHS:
                data = block("mixed", number, min(length, SIZE - offset))
                assert wire.write(offset, data) == len(data)
                model[offset : offset + len(data)] = data
                assert wire.read(offset, length) == model[offset : offset + length]
        for offset in range(0, SIZE, MIB):
            assert wire.read(offset, MIB) == model[offset : offset + MIB]
        wire.store.check(3)
        helped = wire.lane.stats().helped_pieces
        assert helped == 0 if threads == 1 else helped >= 0


def test_a_thread_at_rest_takes_pieces_of_a_large_request():
    data = block("mixed", 1, MIB)
    with wired(SIZE) as wire:
        end = time.monotonic() + 60
        while wire.lane.stats().helped_pieces == 0:
            assert time.monotonic() < end, "nobody ever helped"
            wire.write(0, data)
        # One that had nothing to do but to help is at rest again, and helps again.
        before = wire.lane.stats().helped_pieces
        while wire.lane.stats().helped_pieces == before:
            assert time.monotonic() < end, "nobody helped again"
            wire.write(0, data)
        assert wire.read(0, MIB) == data


@pytest.mark.parametrize("threads", [1, 3])
def test_a_pool_that_fills_in_the_middle_refuses_the_request_and_keeps_whole_pages(threads):
    old = block("random", 1, MIB)
    new = block("random", 2, MIB)
    with wired(SIZE, threads=threads, mem_limit=MIB + MIB // 4) as wire:
        wire.write(0, old)
        for _ in range(20):
            assert wire.call(Op.WRITE, write_in(4 * MIB, MIB) + new).error == errno.ENOSPC
            wire.store.check(3)
            assert wire.read(0, MIB) == old
            got = wire.read(4 * MIB, MIB)
            for at in range(0, MIB, PAGE):
                assert got[at : at + PAGE] in (bytes(PAGE), new[at : at + PAGE])
            wire.store.zero(4 * MIB, MIB)
        assert wire.store.stats().failed_writes >= 20


def test_a_damaged_page_fails_the_large_read_around_it_and_no_other():
    data = block("half random", 3, 2 * MIB)
    with wired(SIZE, threads=3) as wire:
        wire.write(0, data[:MIB])
        wire.write(MIB, data[MIB:])
        file = MemoryFile(wire.store.migration.arena.fileno())
        file.set_slot_word(100, file.slot_word(100) & (1 << 24) - 1 | 5000 << 32)  # holds no object
        for _ in range(20):
            assert wire.call(Op.READ, read_in(0, MIB)).error == errno.EIO
            assert wire.read(MIB, MIB) == data[MIB:]
        assert wire.read(0, 100 * PAGE) == data[: 100 * PAGE]
