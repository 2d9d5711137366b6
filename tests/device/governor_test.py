# SPDX-License-Identifier: Apache-2.0
"""What the governor decides, with a warden that only writes down what it is told."""
from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zramfs.device import governor as module
from zramfs.device.governor import BRAKED_BYTES, Governor, allowance, reserve_for
from zramfs.errors import ZramfsError
from zramfs.store.store import Store

MIB = 1 << 20
PAGE = 4096
LIMIT = 32 * MIB
RESERVE = reserve_for(LIMIT)


class Warden:
    """free: of the file system, in bytes. fails: requests that it refuses."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, object]] = []
        self.free = 500 * MIB
        self.frozen = "no"
        self.fails: set[str] = set()

    async def ask(self, what: str, **arguments: object) -> dict[str, object]:
        self.asked.append((what, arguments.get("bytes")))
        if what in self.fails:
            raise ZramfsError(errno.ENOSPC, "refused")
        if what == "freeze":
            self.frozen = "yes"
        elif what == "thaw":
            self.frozen = "no"
        return {"frozen": self.frozen, "free": self.free, "withheld": 0, "quick": True, "prompt": True}

    def last(self, what: str) -> object:
        return next(value for name, value in reversed(self.asked) if name == what)

    def count(self, what: str) -> int:
        return sum(name == what for name, _ in self.asked)


class Case:
    def __init__(self, limit: int = LIMIT) -> None:
        self.store = Store(256 * MIB, mem_limit=limit)
        self.host: int | None = None
        self.warden = Warden()
        self.governor = Governor(lambda: self.store, lambda: self.host, Path("/run/none/disk"))
        self.governor._link = self.warden
        self.end = 0

    async def look(self) -> None:
        await self.governor._look(self.warden, self.store)

    def write(self, size: int) -> None:
        """Of data that does not compress."""
        for off in range(self.end, self.end + size, MIB):
            self.store.write(off, os.urandom(MIB))
        self.end += size

    def lower(self, limit: int) -> None:
        self.governor.expect_limit(limit)
        self.store.set_mem_limit(limit)


@pytest.fixture
def case() -> Iterator[Case]:
    made = Case()
    yield made
    made.store.close()


@given(st.integers(-(1 << 40), 1 << 40), st.integers(0, 1 << 40), st.floats(0.1, 1000), st.booleans())
def test_an_allowance_is_what_the_room_takes_at_the_ratio_as_far_as_that_is_safe(room, limit, ratio, quick):
    reserve = reserve_for(limit)
    allowed = allowance(room, reserve, ratio, quick=quick)
    if room <= 0:
        assert allowed == 0
        return
    assert 0 <= allowed <= ratio * room + 1
    safe = room + reserve // 4
    if not quick or safe <= module.REACTION:
        # All of it may come at once and not compress: half of the reserve is not touched by that.
        assert allowed <= safe
    elif ratio >= 1:
        assert allowed >= min(room, int(ratio * room))


def test_a_reserve_is_a_sixteenth_within_bounds():
    assert [reserve_for(limit) // MIB for limit in (0, 40 * MIB, 1024 * MIB, 1 << 40)] == [12, 12, 64, 256]


async def test_free_blocks_follow_the_pool(case):
    await case.look()
    first = case.warden.last("allow")
    case.write(8 * MIB)
    await case.look()
    assert first - 9 * MIB < case.warden.last("allow") < first - 7 * MIB
    case.write(LIMIT - 8 * MIB)
    await case.look()
    assert case.warden.last("allow") == 0
    assert case.governor.stats.state == "on"


async def test_without_any_limit_nothing_is_withheld(case):
    case.lower(0)
    await case.look()
    assert case.warden.last("allow") is None
    assert case.warden.count("wait") == 0


async def test_the_host_is_a_limit_too(case):
    """The less of the two counts, and the reserve is kept from the host's room."""
    case.host = 10 * MIB + RESERVE
    await case.look()
    assert case.governor.stats.room == 10 * MIB
    case.host = 1 << 40
    await case.look()
    assert case.governor.stats.room == LIMIT
    case.lower(0)
    case.host = 10 * MIB + reserve_for(0)
    await case.look()
    assert case.governor.stats.room == 10 * MIB
    case.host = reserve_for(0) // 3
    await case.look()
    assert (case.warden.last("allow"), case.governor.stats.state) == (0, "frozen")
    case.host = 1 << 40
    await case.look()
    assert (case.warden.frozen, case.governor.stats.state) == ("no", "on")


async def test_writers_are_braked_and_then_frozen_and_let_go_when_there_is_room(case):
    await case.look()
    assert case.warden.last("wait") == RESERVE // 4
    case.write(LIMIT + RESERVE // 4 + MIB)
    await case.look()
    assert (case.governor.stats.state, case.warden.last("wait")) == ("braked", BRAKED_BYTES)
    case.write(RESERVE // 4)
    await case.look()
    assert (case.governor.stats.state, case.warden.frozen) == ("frozen", "yes")
    await case.look()
    assert case.warden.count("freeze") == 1
    case.store.zero(0, 2 * MIB)  # still past the limit
    await case.look()
    assert case.governor.stats.state == "frozen"
    case.store.zero(0, RESERVE)
    await case.look()
    assert (case.governor.stats.state, case.warden.frozen) == ("on", "no")
    assert case.warden.last("wait") == RESERVE // 4
    assert case.governor.stats.freezes == 1


async def test_a_limit_below_what_is_stored_freezes_nothing_and_refuses_no_write(case):
    case.write(30 * MIB)
    await case.look()
    case.lower(10 * MIB)
    case.write(MIB)  # before the governor has looked
    await case.look()
    assert (case.warden.last("allow"), case.governor.stats.state) == (0, "on")
    case.write(MIB)
    assert case.store.stats().failed_writes == 0


async def test_what_was_stored_above_a_lowered_limit_does_not_come_back(case):
    case.write(30 * MIB)
    await case.look()
    case.lower(10 * MIB)
    await case.look()
    case.store.zero(0, 15 * MIB)
    await case.look()
    case.write(RESERVE // 2 + MIB)
    await case.look()
    assert case.governor.stats.state == "frozen"


async def test_blocks_that_cannot_be_withheld_keep_nobody_from_freezing(case):
    await case.look()
    case.warden.fails.add("allow")
    case.write(LIMIT + RESERVE // 2 + MIB)
    with pytest.raises(ZramfsError):
        await case.look()
    assert case.warden.frozen == "yes"


async def test_a_file_system_that_cannot_be_frozen_is_complained_of_once(case, caplog):
    await case.look()
    case.write(LIMIT + RESERVE // 2 + MIB)
    await case.look()
    case.warden.frozen = "Operation not supported"
    for _ in range(3):
        await case.look()
    assert [r.message for r in caplog.records if "could not be frozen" in r.message] == [
        ": it could not be frozen: Operation not supported"]
