# SPDX-License-Identifier: Apache-2.0
"""A lane on the connection and the page of one that is gone, with the kernel's end played by the test."""
from __future__ import annotations

import contextlib
import errno
import mmap
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from tests.support.whole import wait_until
from tests.support.wire import (
    MIB,
    PAGE,
    TIMEOUT,
    Op,
    Wire,
    init_in,
    read_in,
    setattr_in,
    write_in,
)
from zramfs.lane.lane import PAGE_BYTES, Lane
from zramfs.store.store import Store

RESENT = 1 << 63
NOTIFY_RESEND = struct.pack("=IiQ", 16, 7, 0)
# kept_page.h
REFUSED_COUNT_AT, OWN_ENDS_AT, HANDS_AT, HAND, HANDS = 8, 16, 64, 64, 68
REFUSED_AT = HANDS_AT + HANDS * (HAND + 16)
OPENS = 1024


class Connection:
    """One connection and one page, on which lanes come and go."""

    def __init__(self) -> None:
        self.kernel, self._ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.kernel.settimeout(TIMEOUT)
        self.kernel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MIB)  # cut to the limit
        self.page = os.memfd_create("page")
        os.ftruncate(self.page, PAGE_BYTES)
        self.store = Store(MIB, algo="zstd", level=19)
        self.words = mmap.mmap(self.page, PAGE_BYTES)

    @contextlib.contextmanager
    def lane(self, takeover: bool = False, threads: int = 1) -> Iterator[Wire]:
        lane = Lane(os.dup(self._ours.fileno()), threads=threads, page=self.page, takeover=takeover)
        lane.set_store(self.store)
        lane.start()
        wire = Wire(self.kernel, lane, self.store)
        if takeover:
            assert self.kernel.recv(100) == NOTIFY_RESEND, "before it reads anything"
        try:
            yield wire
        finally:
            lane.abort()
            assert lane.join(TIMEOUT)

    def close(self) -> None:
        self.kernel.close()
        self._ours.close()
        self.words.close()
        os.close(self.page)
        self.store.close()

    def hand(self, number: int) -> int:
        return struct.unpack_from("=Q", self.words, HANDS_AT + number * HAND)[0]


@pytest.fixture
def connection() -> Iterator[Connection]:
    made = Connection()
    yield made
    made.close()


def test_what_comes_again_is_answered_with_its_own_number(connection: Connection) -> None:
    with connection.lane() as wire:
        assert wire.write(0, b"one") == 3
    with connection.lane(takeover=True) as wire:
        assert wire.call(Op.READ, read_in(0, 3), unique=RESENT | 44).data == b"one"
        assert wire.call(Op.WRITE, write_in(0, 3) + b"two", unique=RESENT | 46).error == 0
        assert wire.call(Op.FALLOCATE, bytes(32), unique=RESENT | 48).unique == RESENT | 48
        assert wire.read(0, 3) == b"two"


def test_an_init_that_was_read_and_not_answered_comes_again(connection: Connection) -> None:
    with connection.lane(takeover=True) as wire:
        assert wire.call(Op.INIT, init_in(), nodeid=0, unique=RESENT | 2).error == 0
        assert wire.attributes()["size"] == MIB


def test_what_was_agreed_on_and_the_attributes_of_the_file_stay(connection: Connection) -> None:
    with connection.lane() as wire:
        wire.init(flags=1 << 39 | 1 << 30)
        assert wire.lane.stats().can_resend
        wire.call(Op.SETATTR, setattr_in(valid=1 | 2 | 4, mode=0o640, uid=12, gid=13))
        wire.write(0, b"x")
        before = wire.attributes()
        told = wire.lane.stats()
    with connection.lane(takeover=True) as wire:
        after = wire.attributes()
        assert after == before and after["mode"] & 0o7777 == 0o640 and after["uid"] == 12
        assert wire.lane.stats().can_resend and wire.lane.stats().protocol_minor == told.protocol_minor


def test_an_open_that_comes_again_is_counted_once(connection: Connection) -> None:
    with connection.lane() as wire:
        first = wire.call(Op.OPEN, bytes(8), unique=40)
        wire.call(Op.OPEN, bytes(8), unique=42)
    with connection.lane(takeover=True) as wire:
        assert wire.lane.open_count == 2
        assert wire.call(Op.OPEN, bytes(8), unique=RESENT | 40).data == first.data, "was counted before"
        assert wire.lane.open_count == 2
        assert wire.call(Op.OPEN, bytes(8), unique=RESENT | 44).error == 0, "was not"
        assert wire.lane.open_count == 3


def test_a_release_that_comes_again_ends_no_other_file(connection: Connection) -> None:
    with connection.lane() as wire:
        handle = wire.call(Op.OPEN, bytes(8), unique=40).data[:8]
        assert wire.call(Op.RELEASE, handle + bytes(16), unique=42).error == 0
        # Until one of them has the place of the first.
        others = [wire.call(Op.OPEN, bytes(8)).data[:8] for _ in range(OPENS)]
        assert any(int.from_bytes(each, "little") % 2048 == int.from_bytes(handle, "little") % 2048
                   for each in others)
    with connection.lane(takeover=True) as wire:
        assert wire.lane.open_count == OPENS
        assert wire.call(Op.RELEASE, handle + bytes(16), unique=RESENT | 42).error == 0
        assert wire.lane.open_count == OPENS
        assert wire.call(Op.RELEASE, handle + bytes(16)).error == errno.EINVAL, "a new one is a fault"
        assert wire.call(Op.RELEASE, others[0] + bytes(16), unique=RESENT | 44).error == 0
        assert wire.lane.open_count == OPENS - 1


def test_more_open_files_than_there_are_places_are_counted_too(connection: Connection) -> None:
    with connection.lane() as wire:
        handles = [wire.call(Op.OPEN, bytes(8)).data[:8] for _ in range(OPENS + 3)]
        assert wire.lane.open_count == OPENS + 3
    with connection.lane(takeover=True) as wire:
        assert wire.lane.open_count == OPENS + 3
        for handle in handles:
            assert wire.call(Op.RELEASE, handle + bytes(16)).error == 0
        assert wire.lane.open_count == 0 and wire.lane.claim()


def test_a_claim_does_not_outlive_the_lane(connection: Connection) -> None:
    with connection.lane() as wire:
        assert wire.lane.claim()
    with connection.lane(takeover=True) as wire:
        assert wire.call(Op.OPEN, bytes(8)).error == 0


def test_a_request_that_ended_too_many_lanes_is_refused_and_never_done(connection: Connection) -> None:
    struct.pack_into("=Q", connection.words, REFUSED_COUNT_AT, 2)
    struct.pack_into("=QQ", connection.words, REFUSED_AT, 46, 44)
    with connection.lane(takeover=True) as wire:
        for unique in (44, 46):
            assert wire.call(Op.WRITE, write_in(0, 3) + b"bad", unique=RESENT | unique).error == errno.EIO
        assert wire.read(0, 3) == bytes(3)
        assert wire.call(Op.WRITE, write_in(0, 4) + b"good", unique=RESENT | 48).error == 0
        assert wire.read(0, 4) == b"good"


def test_a_request_that_was_in_hand_at_three_ends_in_a_row_is_refused_from_then_on(
    connection: Connection,
) -> None:
    for end in range(1, 5):
        put_hand(connection, 0, 44 if end < 3 else 48)  # twice only
        put_hand(connection, 67, 46)
        struct.pack_into("=Q", connection.words, OWN_ENDS_AT, end)
        with connection.lane(takeover=True) as wire:
            assert wire.lane.blamed == (end == 3)
            assert connection.hand(0) == connection.hand(67) == 0
            answer = wire.call(Op.WRITE, write_in(0, 3) + b"bad", unique=RESENT | 46)
            assert answer.error == (errno.EIO if end >= 3 else 0)
            for unique in (44, 48):
                assert wire.call(Op.READ, read_in(0, 3), unique=RESENT | unique).error == 0


def test_a_kill_from_elsewhere_says_nothing_about_a_request(connection: Connection) -> None:
    for end in range(10):
        if end % 2:  # and what was noted before stays
            struct.pack_into("=Q", connection.words, OWN_ENDS_AT, 1)
        put_hand(connection, 0, 46)
        with connection.lane(takeover=True) as wire:
            assert wire.lane.blamed == 0 and connection.hand(0) == 0
            assert wire.call(Op.READ, read_in(0, 3), unique=RESENT | 46).error == 0


def put_hand(connection: Connection, number: int, unique: int) -> None:
    struct.pack_into("=Q", connection.words, HANDS_AT + number * HAND, unique)


def test_a_request_is_in_hand_from_its_reading_to_its_answer(connection: Connection) -> None:
    with connection.lane() as wire:
        data = os.urandom(1 << 17)  # takes 50 ms at this level, for which a busy machine may forget us
        seen = [is_seen_in_hand(connection, wire, data, unique) for unique in range(50, 70)]
        assert any(seen)


def is_seen_in_hand(connection: Connection, wire: Wire, data: bytes, unique: int) -> bool:
    before, hands = wire.lane.stats().write_ios, set()
    wire.send(Op.WRITE, write_in(0, len(data)) + data, unique=RESENT | unique)

    def is_over() -> bool:
        hands.add(connection.hand(0))
        return unique in hands or wire.lane.stats().write_ios > before

    wait_until(is_over, "it is in hand")
    assert wire.receive().unique == RESENT | unique
    wait_until(lambda: connection.hand(0) == 0, "it is answered")
    assert hands <= {0, unique}
    return unique in hands


def test_a_discard_counts_the_chunks_that_it_has_freed(connection: Connection) -> None:
    """By which the keeper sees that it moves on."""
    with connection.lane() as wire:
        steps_at = HANDS_AT + 16
        for count in range(1, 4):
            assert wire.write(0, b"x" * PAGE) == PAGE
            whole = struct.pack("=QQQII", 0, 0, MIB, 1 | 2, 0)  # KEEP_SIZE, PUNCH_HOLE
            assert wire.call(Op.FALLOCATE, whole).error == 0
            assert struct.unpack_from("=Q", connection.words, steps_at)[0] == count


def test_what_was_counted_goes_on_being_counted(connection: Connection) -> None:
    for count in range(1, 4):
        with connection.lane(takeover=count > 1) as wire:
            wire.write(0, b"x" * PAGE)
            wire.read(0, PAGE)
            wire.call(Op.READ, bytes(4), unique=50)
            told = wire.lane.stats()
            assert (told.write_ios, told.read_ios, told.protocol_errors) == (count, count, count)
            assert told.write_sectors == told.read_sectors == count * PAGE // 512


@pytest.mark.parametrize("content", [b"", bytes(PAGE_BYTES - 1), b"x" * PAGE_BYTES])
def test_a_file_that_is_no_such_page_is_refused(connection: Connection, content: bytes) -> None:
    fd = os.memfd_create("other")
    os.write(fd, content)
    null = os.open("/dev/null", os.O_RDWR)
    with pytest.raises(OSError, match="can't be mapped") as caught:
        Lane(null, page=fd)
    assert caught.value.errno == errno.EINVAL
    os.close(fd)
    os.close(null)


def test_the_page_has_the_size_that_the_header_says(connection: Connection) -> None:
    assert PAGE_BYTES % PAGE == 0 and PAGE_BYTES >= REFUSED_AT + 32 * 8 + 9 * 8 + OPENS * 8
