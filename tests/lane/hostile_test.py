# SPDX-License-Identifier: Apache-2.0
"""Any bytes at all as requests to the lane, against a model of the device and its protocol."""
from __future__ import annotations

import errno
import struct

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.scale import scaled
from tests.support.wire import (
    ARGUMENTS,
    FORGET_LIKE,
    KEEP_SIZE,
    MIB,
    PAGE,
    PUNCH_HOLE,
    SEEK_DATA,
    SEEK_HOLE,
    ZERO_RANGE,
    Op,
    Reply,
    fallocate_in,
    init_in,
    lseek_in,
    read_in,
    setattr_in,
    wired,
    write_in,
)

U64 = 1 << 64
FATTR_SIZE, FATTR_FH = 8, 64


class Model:
    """What the device holds and answers, from the bytes of a request."""

    SIZE = 6 * PAGE

    def __init__(self) -> None:
        self.data = bytearray(self.SIZE)
        self.handles: set[int] = set()  # of open files
        self.latest = None  # the handle of the latest open file, unless anybody has read or written since

    def expect(self, opcode: int, nodeid: int, body: bytes, honest: bool) -> tuple[int, bytes | None]:
        """(errno, data), data None where the model does not say."""
        need = {Op.INIT: 16}.get(opcode, len(ARGUMENTS.get(opcode, b"")))
        if not honest or len(body) < need:
            return errno.EINVAL, None
        if opcode == Op.DESTROY:
            return 0, b""
        if opcode == Op.INIT:
            major, minor = struct.unpack_from("=II", body)
            return (errno.EPROTO if major < 7 or (major == 7 and minor < 23) else 0), None
        if opcode not in ARGUMENTS:
            return errno.ENOSYS, None
        if nodeid != 1:
            return errno.EINVAL, None
        return getattr(self, Op(opcode).name.lower(), lambda body: (0, None))(body)

    def open(self, body: bytes) -> tuple[int, bytes | None]:
        return 0, None

    def opened(self, data: bytes) -> None:
        self.latest, flags, _ = struct.unpack("=QII", data)
        assert flags == 1 | 2 | 64 and self.latest not in self.handles
        self.handles.add(self.latest)

    def release(self, body: bytes) -> tuple[int, bytes | None]:
        handle = struct.unpack_from("=Q", body)[0]
        if handle not in self.handles:
            return errno.EINVAL, None
        if handle == self.latest:
            self.latest = None
        self.handles.remove(handle)
        return 0, b""

    def read(self, body: bytes) -> tuple[int, bytes | None]:
        _, offset, size = struct.unpack_from("=QQI", body)
        if size > MIB:
            return errno.EINVAL, None
        if offset < self.SIZE:
            self.latest = None
        return 0, bytes(self.data[offset:offset + size])

    def write(self, body: bytes) -> tuple[int, bytes | None]:
        _, offset, size = struct.unpack_from("=QQI", body)
        payload = body[40:]
        if size > len(payload):
            return errno.EINVAL, None
        if offset >= self.SIZE:
            return errno.ENOSPC, None
        self.latest = None
        written = payload[:min(size, self.SIZE - offset)]
        self.data[offset:offset + len(written)] = written
        return 0, struct.pack("=II", len(written), 0)

    def fallocate(self, body: bytes) -> tuple[int, bytes | None]:
        _, offset, length, mode = struct.unpack_from("=QQQI", body)
        if offset + length >= 1 << 63:
            return errno.EINVAL, None
        if mode not in (PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE):
            return errno.EOPNOTSUPP, None
        if not length or offset >= self.SIZE or (offset + length > self.SIZE and not mode & KEEP_SIZE):
            return errno.EINVAL, None
        self.latest = None
        stop = min(self.SIZE, offset + length)
        self.data[offset:stop] = bytes(stop - offset)
        return 0, b""

    def lseek(self, body: bytes) -> tuple[int, bytes | None]:
        _, offset, whence = struct.unpack_from("=QQI", body)
        if whence not in (SEEK_DATA, SEEK_HOLE):
            return errno.EINVAL, None
        if offset >= self.SIZE:
            return errno.ENXIO, None
        data = next((n for n in range(offset, self.SIZE) if self.data[n]), None)
        # Bytes that are not zero are data for certain; zeros may be either.
        if whence == SEEK_HOLE or data is None:
            return -1, None
        return 0, b""

    def setattr(self, body: bytes) -> tuple[int, bytes | None]:
        fields = struct.unpack_from("=IIQQQQQQ8I", body)
        if max(fields[8:11]) >= 10**9:
            return errno.EINVAL, None
        if fields[0] & FATTR_SIZE and fields[3] > self.SIZE:
            return errno.EINVAL, None
        if fields[0] & FATTR_SIZE and fields[3] == 0:
            if len(self.handles) > bool(fields[0] & FATTR_FH or self.latest):
                return errno.EBUSY, None
            self.data[:] = bytes(self.SIZE)
            self.latest = None
        return 0, None


numbers = st.one_of(
    st.integers(0, Model.SIZE + 2 * PAGE),
    st.sampled_from([0, 1, PAGE - 1, PAGE, PAGE + 1, Model.SIZE - 1, Model.SIZE, Model.SIZE + 1, MIB, MIB + 1,
                     1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, U64 - PAGE, U64 - 1]),
)
sizes = numbers.map(lambda n: n & 0xFFFFFFFF)
payloads = st.one_of(
    st.integers(0, 3 * PAGE).map(bytes), st.binary(max_size=64),
    st.tuples(st.integers(0, 3 * PAGE), st.integers(1, 255)).map(lambda t: bytes([t[1]]) * t[0]),
)
bodies = {
    Op.READ: st.builds(read_in, numbers, sizes),
    Op.WRITE: st.one_of(
        st.builds(lambda offset, data: write_in(offset, len(data)) + data, numbers, payloads),
        st.builds(lambda offset, size, data: write_in(offset, size) + data, numbers, sizes, payloads),
    ),
    Op.FALLOCATE: st.builds(fallocate_in, numbers, numbers,
                            st.sampled_from([0, 1, 2, 3, 0x10, 0x11, 0x13, 0x20])),
    Op.LSEEK: st.builds(lseek_in, numbers, st.integers(0, 6)),
    Op.SETATTR: st.builds(setattr_in, valid=st.integers(0, 0xFFF), size=numbers, mtime=numbers,
                          mtimensec=st.sampled_from([0, 1, 10**9 - 1, 10**9, 0xFFFFFFFF])),
    Op.INIT: st.builds(init_in, st.integers(6, 8), st.integers(0, 60), st.integers(0, U64 - 1)),
}
opcodes = st.one_of(st.sampled_from([Op.READ, Op.WRITE, Op.FALLOCATE, Op.LSEEK]), st.sampled_from(list(Op)),
                    st.integers(0, 0xFFFFFFFF))


@st.composite
def requests(draw) -> tuple[int, int, bytes, int | None]:
    """(opcode, nodeid, body, length that the header claims or None)."""
    opcode = draw(opcodes)
    body = draw(st.one_of(bodies.get(opcode, st.just(ARGUMENTS.get(opcode, b""))), st.binary(max_size=200)))
    if draw(st.integers(0, 9)) == 0:
        body = body[:draw(st.integers(0, len(body)))]
    nodeid = draw(st.sampled_from([1] * 9 + [0, 2, U64 - 1]))
    length = draw(st.sampled_from([None] * 9 + [0, 40, 80, MIB + 80, 0xFFFFFFFF]))
    return opcode, nodeid, body, length


def seek_is_right(model: Model, body: bytes, reply: Reply) -> bool:
    """Between the offset and what SEEK_DATA answers there is nothing but zeros; a hole is zeros."""
    _, offset, whence = struct.unpack_from("=QQI", body)
    if reply.error:
        return reply.error == errno.ENXIO and whence == SEEK_DATA and not any(model.data[offset:])
    found = struct.unpack("=Q", reply.data)[0]
    if not offset <= found <= Model.SIZE:
        return False
    if whence == SEEK_DATA:
        return not any(model.data[offset:found])
    return not any(model.data[found:min(Model.SIZE, (found // PAGE + 1) * PAGE)])


@settings(max_examples=scaled(400, 150), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(requests(), min_size=1, max_size=30))
def test_any_request_gets_the_answer_of_the_model(sequence):
    model = Model()
    with wired(Model.SIZE) as wire:
        for opcode, nodeid, body, length in sequence:
            if opcode == Op.RELEASE and body == ARGUMENTS[opcode] and model.handles:
                body = struct.pack("=QQQ", max(model.handles), 0, 0)
            honest = length is None or length == 40 + len(body)
            error, data = model.expect(opcode, nodeid, body, honest)
            unique = wire.send(opcode, body, nodeid=nodeid, length=length)
            if opcode in FORGET_LIKE:
                continue
            reply = wire.receive()
            assert reply.unique == unique
            if opcode == Op.LSEEK and error in (-1, 0):
                assert seek_is_right(model, body, reply)
                continue
            assert reply.error == error
            assert error or data is None or reply.data == data
            if opcode == Op.OPEN and not error:
                model.opened(reply.data)
        assert wire.lane.open_count == len(model.handles)
        assert wire.read(0, Model.SIZE) == model.data
        assert wire.attributes()["size"] == Model.SIZE
        wire.store.check(1)
