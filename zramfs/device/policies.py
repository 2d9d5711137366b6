# SPDX-License-Identifier: Apache-2.0
# Lock order: device.py. A round, of a policy or of density (density.py), holds the turn and takes no other of
# those locks. A command that is aside holds no turn; it only keeps the next round from its beginning.
"""Automatic policies: pages that nobody has used for some time are recompressed, become units, or are written
back. Besides, upkeep: units with dead places are made anew, whether or not there is a policy.

Each policy is a trio task that looks at regular times, and works in slices with rests between them. It needs
access times, so setting a policy switches them on. A command of the user goes first: it cuts the work short,
and the next look takes it up again.
"""
from __future__ import annotations

import errno
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import trio

from zramfs.model.policy import KINDS, Policy, Recompress, Units, Writeback
from zramfs.model.stats import PolicyStats, Progress

log = logging.getLogger(__name__)

# A look costs 40 us for 2048 pages that are there. A quarter of the age is late enough to find many
# pages at once, and early enough that none waits for twice its age.
LOOKS = 4
MIN_INTERVAL, MAX_INTERVAL = 1.0, 600.0  # seconds between two looks
# After a round that made fewer than one page in GAIN smaller the next look is put off, up to so long.
GAIN = 16
MAX_DEFER = 16  # intervals
# Share of the time that slices may take: while nobody uses the device, and while somebody does.
IDLE_DUTY, BUSY_DUTY = 0.5, 0.1

# Upkeep looks so often (seconds), and takes at most this share of the time all in all: a look at 1 GiB takes
# 2 ms, and to make all its units anew 3 to 10 s. A unit that is not more than half dead is due at the second
# look.
UPKEEP_INTERVAL = 15.0
UPKEEP_SHARE = 0.05

DAY = 86400.0
# What was written back counts for a day, and to the end of the hundredth of a day that it fell into:
# the limit holds for any 24 hours, and 101 sums are all there is to remember.
LEDGER_STEP = DAY / 100


class Ledger:
    """What was written in the last 24 hours. Times in seconds, of any clock that does not go back."""

    def __init__(self) -> None:
        self.steps: deque[tuple[int, int]] = deque()  # number of the step, bytes

    def add(self, now: float, size: int) -> None:
        step = int(now // LEDGER_STEP)
        if self.steps and self.steps[-1][0] == step:
            size += self.steps.pop()[1]
        self.steps.append((step, size))

    def sum(self, now: float) -> int:
        """Bytes; forgets what is older."""
        while self.steps and (self.steps[0][0] + 1) * LEDGER_STEP + DAY <= now:
            self.steps.popleft()
        return sum(size for _, size in self.steps)


Did = Callable[[Progress], None]  # counts at once what was done, since the rest may be cut short
Rest = Callable[[float], Awaitable[None]]  # after a slice that took so many seconds


class PolicyWork(Protocol):
    """What a device does for a policy. ZramfsError: EINTR when it was cut short, and others."""

    @property
    def ready(self) -> bool:
        """Whether there is a store to look at."""

    @property
    def units_worn(self) -> bool:
        """Whether units have so many dead places that upkeep is worth a look."""

    def requests(self) -> int:
        """How many I/O requests the device has had."""

    async def recompress_idle(self, policy: Recompress, did: Did, rest: Rest) -> None: ...

    async def write_back_idle(self, policy: Writeback, budget: int | None, did: Did, rest: Rest) -> None:
        """budget: bytes that may be written, None = any number."""

    async def make_units_idle(self, policy: Units, did: Did, rest: Rest) -> None: ...

    async def keep_units(self, level: int | None, rest: Rest) -> None:
        """level: of zstd, None = the device's."""


@dataclass
class _Followed:
    stats: PolicyStats
    changed: trio.Event = field(default_factory=trio.Event)
    hurry: trio.Event = field(default_factory=trio.Event)
    ledger: Ledger = field(default_factory=Ledger)


class Policies:
    """clock: seconds; for the limit of a day."""

    def __init__(self, work: PolicyWork, clock: Callable[[], float] = time.monotonic) -> None:
        self._work = work
        self._clock = clock
        # Of the units that upkeep makes anew, where no policy says it.
        self.unit_level: Callable[[], int | None] = lambda: None
        self._states = {kind: _Followed(PolicyStats(kind)) for kind in KINDS}
        self._upkeep = _Followed(PolicyStats("upkeep"))
        # Held by a round, so that there is one at a time.
        self._turn = trio.Lock()
        self._round = trio.CancelScope()
        self._no_round = trio.Event()
        self._no_round.set()
        # Commands that do the same work, or take the store away. No round begins while there is one.
        self._asides = 0
        self._no_aside = trio.Event()

    def resume(self) -> None:
        """As Device.resume()."""
        self._turn = trio.Lock()
        self._round = trio.CancelScope()
        self._no_round = trio.Event()
        self._no_round.set()
        self._asides = 0
        self._no_aside = trio.Event()
        for state in self._states.values():
            state.changed = trio.Event()

    def set(self, kind: str, policy: Policy | None) -> None:
        state = self._states[kind]
        state.stats = replace(state.stats, policy=policy, last_error=None)
        state.changed.set()

    def hurry(self) -> None:
        """Memory is short: the next round of each is due at once, or after MIN_INTERVAL."""
        for state in self._states.values():
            state.hurry.set()

    def forget(self) -> None:
        """All off, and what they have done is forgotten. What was written in the last 24 hours is not:
        a reset must not make the limit larger."""
        for kind, state in self._states.items():
            state.stats = PolicyStats(kind)
            state.changed.set()

    def stats(self) -> tuple[PolicyStats, ...]:
        now = self._clock()
        return tuple(replace(each.stats, today=each.ledger.sum(now)) for each in self._states.values())

    def ledgers(self) -> dict[str, list[tuple[int, int]]]:
        """By kind, for take_ledgers() in another process of the same boot."""
        return {kind: list(state.ledger.steps) for kind, state in self._states.items()}

    def take_ledgers(self, found: dict[str, list[tuple[int, int]]]) -> None:
        for kind, steps in found.items():
            self._states[kind].ledger.steps.extend((number, size) for number, size in steps)

    @asynccontextmanager
    async def aside(self) -> AsyncIterator[None]:
        """No round runs inside; one that is under way is cut short. Several may be inside at once."""
        self._asides += 1
        try:
            self._round.cancel()  # without effect on one that has ended
            await self._no_round.wait()
            yield
        finally:
            self._asides -= 1
            if not self._asides:
                self._no_aside.set()

    async def run(self) -> None:
        """The task. May be started again after any exception: it keeps nothing but what stats() shows."""
        async with trio.open_nursery() as nursery:
            for state in self._states.values():
                nursery.start_soon(self._follow, state)
            nursery.start_soon(self._keep_units)

    async def _follow(self, state: _Followed) -> None:
        """Follows one policy until it is changed, and then the next."""
        while True:
            state.changed = trio.Event()
            async with trio.open_nursery() as nursery:
                if state.stats.policy is not None:
                    nursery.start_soon(self._rounds, state, state.stats.policy)
                await state.changed.wait()
                nursery.cancel_scope.cancel()

    async def _rounds(self, state: _Followed, policy: Policy) -> None:
        interval = min(max(policy.idle / LOOKS, MIN_INTERVAL), MAX_INTERVAL)
        defer = 1
        while True:
            await trio.sleep(MIN_INTERVAL * defer)
            state.hurry = trio.Event()
            with trio.move_on_after((interval - MIN_INTERVAL) * defer):
                await state.hurry.wait()
            if not self._work.ready:
                continue
            before = state.stats.done
            await self._one_round(state, partial(self._work_for, state, policy))
            tried, won = state.stats.done.tried - before.tried, state.stats.done.pages - before.pages
            defer = min(2 * defer, MAX_DEFER) if won * GAIN < tried else 1

    async def _keep_units(self) -> None:
        """Upkeep, at its intervals."""
        took = 0.0

        async def rest(slice_took: float) -> None:
            nonlocal took
            took += slice_took
            await self._rest(slice_took)

        while True:
            await trio.sleep(max(UPKEEP_INTERVAL, took / UPKEEP_SHARE))
            took = 0.0
            if self._work.ready and self._work.units_worn:
                policy = self._states[Units.kind].stats.policy
                level = policy.level if isinstance(policy, Units) else self.unit_level()
                await self._one_round(self._upkeep, partial(self._work.keep_units, level, rest))

    async def _one_round(self, state: _Followed, work: Callable[[], Awaitable[None]]) -> None:
        error: Exception | None = None
        try:
            await self.take_turn(work)
        except (OSError, MemoryError) as caught:
            error = caught
        self._end_round(state, error)

    async def take_turn(self, work: Callable[[], Awaitable[None]]) -> None:
        """Does it as a round: alone, beside no command, and cut short when one comes."""
        async with self._turn:
            while self._asides:
                self._no_aside = trio.Event()
                await self._no_aside.wait()
            self._no_round = trio.Event()
            try:
                with trio.CancelScope() as self._round:
                    await work()
            finally:
                self._no_round.set()

    @property
    def is_awaited(self) -> bool:
        """Whether a round waits for the end of the one that has its turn."""
        return self._turn.statistics().tasks_waiting > 0

    async def _work_for(self, state: _Followed, policy: Policy) -> None:
        did = partial(self._count, state)
        if isinstance(policy, Recompress):
            await self._work.recompress_idle(policy, did, self._rest)
        elif isinstance(policy, Units):
            await self._work.make_units_idle(policy, did, self._rest)
        else:
            await self._write_back(state, policy, did)

    async def _write_back(self, state: _Followed, policy: Writeback, did: Did) -> None:
        budget = None
        if policy.limit is not None:
            budget = policy.limit - state.ledger.sum(self._clock())
            if budget <= 0:
                return
        await self._work.write_back_idle(policy, budget, did, self._rest)

    def _end_round(self, state: _Followed, error: Exception | None) -> None:
        sentence = None
        if error is not None and getattr(error, "errno", None) != errno.EINTR:
            sentence = str(error) or "memory is short"
            # The same reason every ten minutes would say nothing new.
            if sentence != state.stats.last_error:
                log.warning("policy %s: %s", state.stats.policy or state.stats.kind, sentence)
        state.stats = replace(state.stats, rounds=state.stats.rounds + 1, last_error=sentence)

    def _count(self, state: _Followed, did: Progress) -> None:
        state.stats = replace(state.stats, done=state.stats.done + did)
        if state.stats.kind == Writeback.kind and did.bytes:
            state.ledger.add(self._clock(), did.bytes)

    async def _rest(self, took: float) -> None:
        """In proportion to what a slice took, and for longer while somebody uses the device."""
        requests = self._work.requests()
        await trio.sleep(took * (1 / IDLE_DUTY - 1))
        if self._work.requests() != requests:
            await trio.sleep(took * (1 / BUSY_DUTY - 1 / IDLE_DUTY))
