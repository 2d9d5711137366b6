# SPDX-License-Identifier: Apache-2.0
"""What a device does for its policies and for density: finds what nobody has used, and recompresses it,
shares it, makes units of it, or writes it back; and the upkeep of units."""
from __future__ import annotations

import errno
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

from zramfs.errors import ZramfsError
from zramfs.model.policy import Policy, Recompress, Units, Writeback
from zramfs.model.stats import Progress, StepStats
from zramfs.store import secondary
from zramfs.text.sizes import PAGE

from . import density
from .algorithms import Entry, RecompressArguments, highest, with_density, with_entry
from .jobs import AfterSlice, Jobs
from .policies import Did, Rest
from .postprocess import PostProcessor, ShareArguments, UnitArguments

if TYPE_CHECKING:
    from zramfs.store.store import Store

    from .backing_store import BackingStore
    from .compactor import Compactor
    from .device import Device

log = logging.getLogger(__package__)

T = TypeVar("T", Progress, StepStats)


class _Pause:
    """Rests in proportion to the time since the last rest."""

    def __init__(self, rest: Rest) -> None:
        self._rest = rest
        self._began = time.monotonic()

    async def __call__(self) -> None:
        await self._rest(time.monotonic() - self._began)
        self._began = time.monotonic()


class _Count(Generic[T]):
    """Hands on what was done since the last time, and rests. total: all that was ever done."""

    def __init__(
        self, total: Callable[[], T], did: Callable[[T], None], rest: Callable[[T], Awaitable[None]]
    ) -> None:
        self._total: Callable[[], T] = total
        self._did: Callable[[T], None] = did
        self._rest: Callable[[T], Awaitable[None]] = rest
        self._counted: T = total()

    async def __call__(self) -> None:
        await self._rest(self.count())

    def count(self) -> T:
        """Without a rest: of a round that was cut short, the last slice too."""
        before, self._counted = self._counted, self._total()
        done = self._counted - before
        self._did(done)
        return done


def expect_able(device: Device, policy: Policy) -> None:
    """Raises ZramfsError(EINVAL): the device lacks what the policy needs."""
    if device.store and isinstance(policy, Recompress):
        device.secondary(policy.algo)
    if device.store and isinstance(policy, Writeback) and device.backing_store.backing is None:
        raise ZramfsError(
            errno.EINVAL, "there is no backing store to write back to; write backing_dev before disksize")
    if isinstance(policy, Units) and device._config.wipe:
        raise ZramfsError(
            errno.EINVAL, "this device wipes what is discarded at once, and a unit would keep it")


# Share of dead places from which on upkeep looks for them: less is not worth the look.
WORN = 64


class IdleWork:
    """A PolicyWork and a DensityWork. Each round is a job: `reset` and the end of the device cut it short,
    and keep the store until it has ended."""

    def __init__(
        self, device: Device, jobs: Jobs, post: PostProcessor, backing: BackingStore, compactor: Compactor
    ) -> None:
        self._device = device
        self._jobs = jobs
        self._post = post
        self._backing = backing
        self._compactor = compactor
        # The backing store that was looked at last, and BackingStats.unit_left of it then. None: one that was
        # adopted may have worn units from before.
        self._looked_at: tuple[object, int] | None = None

    @property
    def ready(self) -> bool:
        return self._device.store is not None

    @property
    def units_worn(self) -> bool:
        return self._is_worn_in_pool or self._is_worn_in_back

    @property
    def _is_worn_in_pool(self) -> bool:
        store = self._device.store
        if store is None:
            return False
        now = store.stats()
        return now.unit_dead * WORN > now.unit_pages + now.unit_dead

    @property
    def _is_worn_in_back(self) -> bool:
        """Whether a page has left a unit on the backing store since the last look at all of them. What is
        worn there costs no memory, so it stays while that is short."""
        back = self._backing.stats()
        return (back is not None and back.used > 0 and self.ready and self.supply != "short"
                and self._looked_at != (self._backing.backing, back.unit_left))

    @property
    def supply(self) -> str:
        return self._device.host_memory.supply

    @property
    def _better(self) -> int | None:
        """The priority of what single pages are recompressed with."""
        return self._device.dictionaries.newest or highest(self._device._algorithms)

    @property
    def _brings(self) -> tuple[int, Entry] | None:
        """The algorithm that density gives to a device that has none to recompress with, and its priority;
        None: the primary one is as good."""
        old = self._device._algorithms
        new = with_density(old, self._device.density.wanted)
        return next(((priority, each) for priority, each in enumerate(new)
                     if each and each is not old[priority]), None)

    @property
    def lacks(self) -> dict[str, str]:
        found = {}
        if self.ready and self._better is None and self._brings is None:
            found["recompress"] = (
                "pages are not recompressed, as they were compressed with what density would take")
        if self._device._config.wipe:
            found["units"] = "no units are made, as this device wipes what is discarded at once"
        return found

    def requests(self) -> int:
        return self._device.requests()

    def served_ms(self) -> int:
        return self._device._lane.stats().io_ms

    async def keep_access_times(self) -> None:
        await self._device.set_access_times(True)

    async def make_denser(
        self, step: str, older: int, level: int, did: density.Did, rest: density.Rest
    ) -> None:
        """ZramfsError: EINVAL (access times are not kept), EINTR, and those of PostProcessor."""
        job = self._jobs.begin("step of density", alone=True)
        await job.run(partial(self._make_denser, step, older, level, did, rest))

    async def recompress_idle(self, policy: Recompress, did: Did, rest: Rest) -> None:
        """ZramfsError: EINVAL, EINTR, and those of PostProcessor.recompress()."""
        job = self._jobs.begin("policy of recompression", alone=True)
        await job.run(partial(self._recompress_idle, policy, did, rest))

    async def make_units_idle(self, policy: Units, did: Did, rest: Rest) -> None:
        """ZramfsError: EINTR, and those of PostProcessor.make_units()."""
        job = self._jobs.begin("policy of units", alone=True)
        wanted = UnitArguments(age=policy.idle, level=policy.level, thorough=False)
        await job.run(partial(self._make_units, wanted, did, rest))

    async def keep_units(self, level: int | None, rest: Rest) -> None:
        """ZramfsError: EINTR, and those of PostProcessor.make_units()."""
        job = self._jobs.begin("upkeep of units", alone=True)
        await job.run(partial(self._keep_units, level, rest))

    async def write_back_idle(self, policy: Writeback, budget: int | None, did: Did, rest: Rest) -> None:
        """budget: bytes, None = any number. ZramfsError: EINTR, and those of BackingStore."""
        job = self._jobs.begin("policy of write-back", alone=True)
        await job.run(partial(self._write_back_idle, policy, budget, did, rest))

    async def _recompress_idle(self, policy: Recompress, did: Did, rest: Rest) -> None:
        store, pause = self._store(), _Pause(rest)
        priority = self._device.secondary(policy.algo)

        def total() -> Progress:
            done = self._post.recompression
            return Progress(done.tried, done.won, done.bytes_saved)

        count = _Count(total, did, lambda _: pause())
        try:
            await self._post.mark_idle(store, policy.idle, pause)
            await self._post.recompress(store, priority, RecompressArguments(idle=True), count)
        finally:
            count.count()
        self._compactor.poke()

    async def _make_units(self, wanted: UnitArguments, did: Did, rest: Rest) -> None:
        store = self._store()

        def total() -> Progress:
            done = self._post.units
            return Progress(done.tried, done.packed, done.bytes_saved)

        pause = _Pause(rest)
        count = _Count(total, did, lambda _: pause())
        try:
            await self._post.make_units(store, wanted, count)
        finally:
            count.count()
        self._compactor.poke()

    async def _keep_units(self, level: int | None, rest: Rest) -> None:
        if self._is_worn_in_pool:
            wanted = UnitArguments(level=level, joins=False, thorough=False)
            await self._make_units(wanted, lambda progress: None, rest)
        if self._is_worn_in_back:
            back, looked_at = self._backing.stats(), self._backing.backing
            done = await self._post.return_worn_units(self._store(), _Pause(rest))
            # Without room it has not seen all.
            self._looked_at = None if done.no_room or back is None else (looked_at, back.unit_left)

    async def _make_denser(
        self, step: str, older: int, level: int, did: density.Did, rest: density.Rest
    ) -> None:
        before = self._cost_of(step)
        # Each rest is in proportion to the CPU time of the slice before it.
        count = _Count(partial(self._cost_of, step), did, lambda done: rest(done.cpu_seconds))
        try:
            await self._pass_of(step, older, level, count)
        finally:
            count.count()
        if self._cost_of(step).bytes != before.bytes:
            self._compactor.poke()

    def _cost_of(self, step: str) -> StepStats:
        """So far, of all passes of the kind."""
        match step:
            case "recompress":
                tried = self._post.recompression
                return StepStats(0, tried.tried, tried.bytes_saved, tried.cpu_ns / 1e9)
            case "dictionaries":  # the recompression with them, too
                tried, learning = self._post.recompression, self._device.dictionaries.cpu_seconds
                return StepStats(0, tried.tried, tried.bytes_saved, tried.cpu_ns / 1e9 + learning)
            case "share":
                looked = self._post.sharing
                return StepStats(0, looked.looked, looked.bytes_saved, looked.cpu_ns / 1e9)
        made = self._post.units
        return StepStats(0, made.tried, made.bytes_saved, made.cpu_ns / 1e9)

    async def _pass_of(self, step: str, older: int, level: int, rest: AfterSlice) -> None:
        store = self._store()
        match step:
            case "recompress":
                if self._better is None and self._brings is not None:
                    await self._take_algorithm(store, *self._brings)
                if self._better is not None:  # density may have been switched off since lacks was asked
                    await self._post.recompress(store, self._better, RecompressArguments(older=older), rest)
            case "dictionaries":
                await self._device.dictionaries.consider(
                    rest, marked=False, older=older, level=level,
                    in_units=self._device.density.wanted.mode == "max" and not self._device._config.wipe)
            case "share":
                await self._post.share(store, ShareArguments(marked=False, older=older), rest)
            case "units":
                wanted = UnitArguments(marked=False, older=older, level=level, thorough=False)
                await self._post.make_units(store, wanted, rest)

    async def _take_algorithm(self, store: Store, priority: int, entry: Entry) -> None:
        """ZramfsError: EBUSY (a save is under way), ENOMEM."""
        device = self._device
        try:
            await device._job_thread(
                lambda: secondary.set_secondary(store, priority, entry.codec(), generation=False))
        except MemoryError as error:
            raise ZramfsError(errno.ENOMEM, str(error)) from None
        device._algorithms = with_entry(device._algorithms, priority, entry)
        log.info("%s: recompresses with %s from its next pass on", device._config.name, entry.algorithm.name)
        device.on_change()

    async def _write_back_idle(
        self, policy: Writeback, budget: int | None, did: Did, rest: Rest
    ) -> None:
        store, pause = self._store(), _Pause(rest)
        blocks = None if budget is None else budget // PAGE

        def count(pages: int, written: int) -> None:
            did(Progress(pages, pages, written * PAGE))

        await self._post.mark_idle(store, policy.idle, pause)
        await self._backing.write_back_idle(store, blocks, count, pause)
        self._compactor.poke()

    def _store(self) -> Store:
        """Raises ZramfsError(EINTR): a reset or the end of the device came before the round did."""
        store = self._device.store
        if store is None:
            raise ZramfsError(errno.EINTR, "the device was reset before the policy began")
        return store
