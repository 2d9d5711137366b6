# SPDX-License-Identifier: Apache-2.0
# Lock order: device.py. A round has the turn of the policies (policies.py), and takes no other lock.
"""Density: a device becomes denser by itself, in four steps, as its pages grow old.

1. recompress: a page that nobody has used for a minute is compressed again, with a better algorithm.
2. dictionaries: where there are many of these pages, one is trained on them and judged. If it wins enough,
   they are compressed with it (dictionaries.py).
3. share: pages of ten minutes with equal contents become one object.
4. units: what is left of them becomes units of neighbouring pages, with the newest dictionary.

Later steps leave out what an earlier one has made final: units and shared pages are no single pages any more.
In the mode `max` all ages are the same, and recompression comes last: it takes 125 us a page with zstd 9, and
would take them for pages that a unit (100 us a page) packs once more. So a dictionary is judged there by what
it wins in units. Units that `auto` has made are made anew in `max`, if that makes them smaller. A step goes
by the access times alone. Idle marks belong to those who make them.

A task looks at regular times. A step is due when a page may have reached its age since its last look. That
takes I/O: without any, the task does nothing but ask for the number of requests. A round works in slices of
10 ms. After each it rests, so that the thread's CPU time stays within the share that is allowed.

The thread runs as others do, not as SCHED_IDLE. It holds locks of slots and of the pool, for which the
threads of the lane spin, and Python's own between two slices. A thread that is preempted with one of them
must come back soon. Beside three busy programs on two CPUs, and a sharing of the same 64 pages, the
longest of 800000 reads took 0.15 s, and 1.8 s with the sharing under SCHED_IDLE.
"""
from __future__ import annotations

import errno
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import trio

from zramfs.model.density import AUTO, LEVELS, OFF
from zramfs.model.density import Density as Wanted
from zramfs.model.stats import DENSITY_STEPS, DensityStats, StepStats

log = logging.getLogger(__name__)

# Seconds without use, after which a page is due for a step.
AGES = {"recompress": 60.0, "dictionaries": 60.0, "share": 600.0, "units": 600.0}
# What they are multiplied by, by how much memory there is (HostMemory.supply): sooner if it is short.
FACTORS = {"short": 1 / 6, "fair": 1.0, "plenty": 2.0}
ORDERS = {"auto": DENSITY_STEPS, "max": ("share", "dictionaries", "units", "recompress")}
MAX_AGE = 3.0  # of all steps, in the mode max; times of access are whole seconds

# Seconds between two looks at what is due. While memory is short there may be one after each MIN_INTERVAL.
INTERVALS = {"auto": 15.0, "max": 1.0}
MIN_INTERVAL = 1.0
# A step looks again after this part of its age. After a look that saved fewer than LEAST_GAIN bytes a page it
# waits for twice as long as the last time, up to MAX_DEFER times.
LOOKS = 4
LEAST_GAIN = 64
MAX_DEFER = 16
# A device is busy while its lane serves requests for more than this part of the time. Then `auto` takes half
# of its share, unless memory is short.
BUSY = 0.5
# Seconds after which a round makes way for a policy that waits for its turn.
STRETCH = 30.0
# Seconds: access times are whole seconds, and a pass reads the clock when it has begun.
SLACK = 2.0

Did = Callable[[StepStats], None]  # counts at once what was done, since the rest may be cut short
Rest = Callable[[float], Awaitable[None]]  # after a slice that took so many seconds of CPU


class DensityWork(Protocol):
    """What a device does for density. ZramfsError: EINTR when it was cut short, and others."""

    @property
    def ready(self) -> bool:
        """Whether there is a store to look at."""

    @property
    def supply(self) -> str:
        """How much memory there is: one of FACTORS."""

    @property
    def lacks(self) -> dict[str, str]:
        """By step, why the device can't have it, as a sentence."""

    def requests(self) -> int:
        """How many I/O requests the device has had."""

    def served_ms(self) -> int:
        """For how long it has had at least one."""

    async def keep_access_times(self) -> None: ...

    async def make_denser(self, step: str, older: int, level: int, did: Did, rest: Rest) -> None:
        """One pass of a step over the pages that were not used for more than `older` seconds. level: of zstd,
        for units."""


class Turns(Protocol):
    """See Policies."""

    @property
    def is_awaited(self) -> bool: ...

    async def take_turn(self, work: Callable[[], Awaitable[None]]) -> None: ...


@dataclass
class _Step:
    """Times in seconds of the trio clock. covered: what was not used since then has been looked at. ended: of
    the last look. defer: how many times longer than usual it waits for the next one."""

    covered: float = -math.inf
    ended: float = -math.inf
    defer: int = 1


class Density:
    """clock: seconds, the same in all processes of the boot."""

    def __init__(
        self, work: DensityWork, turns: Turns, wanted: Wanted = OFF,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._work = work
        self._turns = turns
        self._clock = clock
        self.wanted = wanted
        self._followed = AUTO  # what the task works for until it notices a change
        self._done = dict.fromkeys(DENSITY_STEPS, StepStats())
        self._errors: dict[str, str] = {}  # of the last pass of a step
        self._begin()
        self._changed = trio.Event()
        self._hurry = trio.Event()

    def _begin(self) -> None:
        self._offset = 0.0  # of the clock before the trio clock
        self._inherited: dict[str, Any] | None = None
        self._steps = {name: _Step() for name in DENSITY_STEPS}
        self._began = self._last_io = math.inf
        self._requests = -1
        self._supply = "fair"
        self._is_working = False

    def resume(self) -> None:
        """As Device.resume()."""
        kept = self.kept()
        self._begin()
        self._inherited = kept
        self._changed = trio.Event()
        self._hurry = trio.Event()

    def set(self, wanted: Wanted) -> None:
        """What is under way is cut short."""
        self.wanted = wanted
        self._errors = {}
        self._begin()
        self._changed.set()

    async def change(self, wanted: Wanted) -> None:
        """As set(), by command. MemoryError: access times find no room."""
        if wanted.mode != "off":
            await self._work.keep_access_times()
        self.set(wanted)

    def hurry(self) -> None:
        """Memory is short: the next look is due at once, or after MIN_INTERVAL."""
        self._hurry.set()

    def kept(self) -> dict[str, Any]:
        """For inherit() in another process of the same boot: what the steps have looked at, for how long they
        wait with their next look, and what they have done. Times by the clock, None for never."""
        return self._inherited or {
            "began": self._shared_time(self._began),
            "steps": {name: [self._shared_time(step.covered), self._shared_time(step.ended), step.defer]
                      for name, step in self._steps.items()},
            "done": {name: asdict(done) for name, done in self._done.items()},
        }

    def inherit(self, found: dict[str, Any] | None) -> None:
        """To be called before run(), after set(). None: the predecessor's version kept none."""
        if found is not None:
            self._inherited = found
            for name in self._done.keys() & found["done"].keys():
                self._done[name] = StepStats(**found["done"][name])

    def _shared_time(self, at: float) -> float | None:
        return round(at + self._offset, 3) if math.isfinite(at) else None

    def _own_time(self, at: float | None) -> float:
        return -math.inf if at is None else at - self._offset

    def _take_inherited(self, found: dict[str, Any]) -> None:
        # A device that was off, or whose task had not begun, has no such time.
        if found["began"] is not None:
            self._began = self._own_time(found["began"])
        for name, (covered, ended, defer) in found["steps"].items():
            if name in self._steps:
                self._steps[name] = _Step(self._own_time(covered), self._own_time(ended), defer)

    def forget(self) -> None:
        """Off, and what it has done is forgotten."""
        self._done = dict.fromkeys(DENSITY_STEPS, StepStats())
        self.set(OFF)

    @property
    def level(self) -> int | None:
        """Of units, None while it is off."""
        return LEVELS.get(self.wanted.mode)

    def stats(self) -> DensityStats:
        is_on = self.wanted.mode != "off"
        lacks = self._work.lacks if is_on else {}
        return DensityStats(
            mode=self.wanted.mode, share=self.wanted.share, steps=dict(self._done),
            is_resting=is_on and not self._is_working and self._work.requests() == self._requests
            and not any(self._is_pending(name) for name in DENSITY_STEPS if name not in lacks),
            lacks="; ".join(lacks.values()) or None, last_error="; ".join(self._errors.values()) or None)

    async def run(self) -> None:
        """The task. May be started again after any exception: it keeps nothing but what stats() shows."""
        while True:
            self._changed = trio.Event()
            async with trio.open_nursery() as nursery:
                if self.wanted.mode != "off":
                    self._followed = self.wanted
                    nursery.start_soon(self._rounds)
                await self._changed.wait()
                nursery.cancel_scope.cancel()

    async def _rounds(self) -> None:
        inherited = self._inherited
        self._begin()
        self._began = trio.current_time()
        self._offset = self._clock() - self._began
        if inherited is not None:
            self._take_inherited(inherited)
        interval = INTERVALS[self._followed.mode]
        while True:
            await trio.sleep(MIN_INTERVAL)
            self._hurry = trio.Event()
            with trio.move_on_after(interval - MIN_INTERVAL):
                await self._hurry.wait()
            if self._work.ready and (due := self._due_steps()):
                await self._one_round(due)

    def _due_steps(self) -> list[str]:
        self._note_io()
        lacks = self._work.lacks
        order = ORDERS[self._followed.mode]
        pending = [name for name in order if self._is_pending(name) and name not in lacks]
        if pending:
            self._supply = self._work.supply
        return [name for name in pending if self._is_due(name)]

    def _note_io(self) -> None:
        """Remembers when there were requests, to the length of an interval later."""
        requests = self._work.requests()
        if requests != self._requests:
            self._requests = requests
            self._last_io = trio.current_time()

    def _is_pending(self, name: str) -> bool:
        """Whether a page has been used since what the last look of the step has covered."""
        return self._last_io >= self._steps[name].covered

    def _is_due(self, name: str) -> bool:
        step, age, now = self._steps[name], self._age(name), trio.current_time()
        defer = 1 if self._supply == "short" else step.defer
        return (now - age > max(self._began, step.covered)
                and now >= step.ended + max(age / LOOKS, MIN_INTERVAL) * defer)

    def _age(self, name: str) -> float:
        return MAX_AGE if self._followed.mode == "max" else AGES[name] * FACTORS[self._supply]

    async def _one_round(self, due: list[str]) -> None:
        self._is_working = True
        try:
            await self._turns.take_turn(partial(self._take_steps, due))
        finally:
            self._is_working = False

    async def _take_steps(self, due: list[str]) -> None:
        began = trio.current_time()
        for name in due:
            try:
                if not await self._take_step(name, began):
                    return
            except (OSError, MemoryError) as error:
                if getattr(error, "errno", None) == errno.EINTR:
                    return
                sentence = f"{name}: {str(error) or 'memory is short'}"
                # The same reason again and again would say nothing new.
                if sentence != self._errors.get(name):
                    log.warning("density %s: %s", self.wanted, sentence)
                self._errors[name] = sentence
            else:
                self._errors.pop(name, None)

    async def _take_step(self, name: str, round_began: float) -> bool:
        """False: it has made way for somebody else."""
        step, age = self._steps[name], self._age(name)
        began, before = trio.current_time(), self._done[name]
        try:
            with trio.CancelScope() as scope:
                await self._work.make_denser(
                    name, math.ceil(age), LEVELS[self._followed.mode], partial(self._count, name),
                    partial(self._rest, scope, round_began))
        except (OSError, MemoryError):
            step.ended, step.defer = trio.current_time(), MAX_DEFER
            raise
        self._count(name, StepStats(rounds=1))
        # One that has made way has not seen all, and is due again.
        if scope.cancelled_caught:
            return False
        done = self._done[name]
        is_poor = done.bytes - before.bytes < LEAST_GAIN * (done.pages - before.pages)
        step.covered, step.ended = began - age - SLACK, trio.current_time()
        step.defer = min(2 * step.defer, MAX_DEFER) if is_poor else 1
        return True

    def _count(self, name: str, did: StepStats) -> None:
        self._done[name] += did

    async def _rest(self, scope: trio.CancelScope, began: float, cpu: float) -> None:
        """scope: of the step. began: when the round has."""
        if self._followed.mode == "max":
            await trio.lowlevel.checkpoint()
        else:
            pause = cpu * (100 / self._followed.share - 1)
            served = self._work.served_ms()
            await trio.sleep(pause)
            is_busy = (self._work.served_ms() - served) / 1e3 > BUSY * pause
            if is_busy and self._supply != "short":
                await trio.sleep(cpu + pause)
        self._note_io()
        if self._turns.is_awaited and trio.current_time() - began > STRETCH:
            scope.cancel()
