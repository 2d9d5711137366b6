# SPDX-License-Identifier: Apache-2.0
"""Idle marks, recompression, units and shared pages of a device: the slices, off the trio loop, and what they
have done."""
from __future__ import annotations

import errno
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from zramfs.codecs.spec import LEVELS
from zramfs.errors import ZramfsError
from zramfs.model.stats import BackUpkeepStats, RecompressionStats, SharingStats, UnitMakingStats
from zramfs.store.back_upkeep import BackUpkeep
from zramfs.store.recompress import Recompression
from zramfs.store.sharing import Sharing
from zramfs.store.store import Store
from zramfs.store.unit_making import UnitMaking
from zramfs.text.key_values import number, pairs, shown

from .algorithms import RecompressArguments
from .commands import age_of
from .estimator import Estimator
from .jobs import SLICE_NS, AfterSlice, InThread, finish_job

log = logging.getLogger(__name__)


def parse_idle(text: str, command: str, *takes: str) -> dict[str, Any]:
    """What is written to a command that works on idle pages, as fields of its arguments: `idle` is marked and
    age, `level` is that of zstd. takes: of these two. ZramfsError: EINVAL, ERANGE."""
    found: dict[str, Any] = {}
    for key, value in pairs(text):
        if key not in takes:
            known = " and ".join(f"{each}=" for each in takes)
            raise ZramfsError(errno.EINVAL, f"{command} takes {known}, not {shown(key)}")
        if key == "idle":
            age = age_of(value)
            found |= {"marked": age is not None, "age": age}
        else:
            found["level"] = number(key, value, *LEVELS["zstd"])
            if found["level"] == 0:
                raise ZramfsError(errno.EINVAL, "zstd has no level 0")
    return found


@dataclass(frozen=True)
class UnitArguments:
    """marked: only pages that are marked idle. age: before that they are marked, if they were not used for so
    many seconds; None = the marks stay as they are. older: only pages that were not used for more than so
    many seconds, None = any; such passes are no news for the log. level: of zstd; None = the device's. joins,
    thorough: as UnitMaking has them."""

    marked: bool = True
    age: int | None = None
    older: int | None = None
    level: int | None = None
    joins: bool = True
    thorough: bool = True


def parse_units(text: str) -> UnitArguments:
    """What is written to units. ZramfsError: EINVAL, ERANGE."""
    return UnitArguments(**parse_idle(text, "units", "idle", "level"))


@dataclass(frozen=True)
class ShareArguments:
    """As the first three of UnitArguments."""

    marked: bool = True
    age: int | None = None
    older: int | None = None


def parse_share(text: str) -> ShareArguments:
    """What is written to share. ZramfsError: EINVAL, ERANGE."""
    return ShareArguments(**parse_idle(text, "share", "idle"))


class PostProcessor:
    """in_thread: runs a call in a worker thread. recompression, units, back_upkeep, sharing: what was done
    since the device was set up.

    What runs long here is cancelled between two slices. The caller sees to it that the store stays open.
    """

    def __init__(self, in_thread: InThread) -> None:
        self._in_thread = in_thread
        self.recompression = RecompressionStats()
        self.estimator = Estimator(in_thread)
        self.forget()

    def forget(self) -> None:
        self.recompression = RecompressionStats()
        self.units = UnitMakingStats()
        self.back_upkeep = BackUpkeepStats()
        self.sharing = SharingStats()
        self.estimator.forget()

    async def mark_idle(
        self, store: Store, age: int | None, rest: AfterSlice = trio.lowlevel.checkpoint
    ) -> None:
        """age in seconds, None = all pages; rest comes after each slice. ZramfsError: EINVAL (access times
        are not kept)."""
        at: int | None = 0
        try:
            while at is not None:
                at = await self._in_thread(partial(store.mark_idle, age, at, SLICE_NS))
                await rest()
        except ValueError as error:
            raise ZramfsError(
                errno.EINVAL, f"{error}; access_times=on in control begins to keep them") from None

    async def recompress(
        self, store: Store, priority: int, wanted: RecompressArguments,
        rest: AfterSlice = trio.lowlevel.checkpoint, *, again: bool = False,
    ) -> None:
        """rest comes after each slice. again: also pages that count as incompressible. ZramfsError: EINVAL
        (threshold), EBUSY, ENOMEM."""
        begin = partial(
            Recompression, store, priority, idle=wanted.idle, huge=wanted.huge, threshold=wanted.threshold,
            max_pages=wanted.max_pages, age=wanted.older, again=again)
        try:
            level = logging.INFO if wanted.older is None else logging.DEBUG
            stats = await self._drive(await self._in_thread(begin), rest, level)
        except ValueError as error:
            raise ZramfsError(errno.EINVAL, str(error)) from None
        except MemoryError as error:
            raise ZramfsError(errno.ENOMEM, str(error)) from None
        if stats.no_room and not stats.won:
            raise ZramfsError(
                errno.ENOMEM, f"{stats.no_room} pages could become smaller, but their new objects found "
                "no room: the pool is full, far beyond mem_limit or for the machine")

    async def make_units(
        self, store: Store, wanted: UnitArguments, rest: AfterSlice = trio.lowlevel.checkpoint
    ) -> None:
        """rest comes after each slice. ZramfsError: EINVAL (access times are not kept; the device wipes),
        EBUSY, ENOMEM."""
        if wanted.age is not None:
            await self.mark_idle(store, wanted.age, rest)
        try:
            making = await self._in_thread(
                partial(UnitMaking, store, idle=wanted.marked, level=wanted.level, joins=wanted.joins,
                        thorough=wanted.thorough, age=wanted.older))
        except ValueError as error:
            raise ZramfsError(errno.EINVAL, str(error)) from None
        except MemoryError as error:
            raise ZramfsError(errno.ENOMEM, str(error)) from None
        is_news = wanted.joins and wanted.older is None
        done = await self._drive_units(making, rest, logging.INFO if is_news else logging.DEBUG)
        if done.no_room and not done.made:
            raise ZramfsError(
                errno.ENOMEM, f"{done.no_room} units could be made, but their objects found no room: the "
                "pool is full, far beyond mem_limit or for the machine")

    async def _drive_units(self, making: UnitMaking, rest: AfterSlice, level: int) -> UnitMakingStats:
        """level: of the log."""
        before = self.units
        try:
            while await self._in_thread(partial(making.step, SLICE_NS)):
                self.units = before + making.stats()
                await rest()
        finally:
            done = await finish_job(self._in_thread, making.finish)
            self.units = before + done
            log.log(
                level if done.groups else logging.DEBUG,
                "units: %d made of %d groups, %d pages joined, %d bytes saved, %d dissolved, %d without room",
                done.made, done.groups, done.pages, done.bytes_saved, done.dissolved, done.no_room)
        return done

    async def return_worn_units(self, store: Store, rest: AfterSlice) -> BackUpkeepStats:
        """Of those on the backing store. rest comes after each slice. ZramfsError: EBUSY, ENOMEM."""
        try:
            upkeep = await self._in_thread(partial(BackUpkeep, store))
        except MemoryError as error:
            raise ZramfsError(errno.ENOMEM, str(error)) from None
        before = self.back_upkeep
        try:
            while await self._in_thread(partial(upkeep.step, SLICE_NS)):
                self.back_upkeep = before + upkeep.stats()
                await rest()
        finally:
            done = await finish_job(self._in_thread, upkeep.finish)
            self.back_upkeep = before + done
            log.debug(
                "backing store: %d pages of %d worn units came back to memory, %d were used meanwhile, %d "
                "could not be read", done.pages, done.units, done.busy, done.failed)
        return done

    async def share(
        self, store: Store, wanted: ShareArguments, rest: AfterSlice = trio.lowlevel.checkpoint
    ) -> None:
        """rest comes after each slice. ZramfsError: EINVAL (access times are not kept), EBUSY, ENOMEM."""
        if wanted.age is not None:
            await self.mark_idle(store, wanted.age, rest)
        try:
            sharing = await self._in_thread(partial(Sharing, store, idle=wanted.marked, age=wanted.older))
        except ValueError as error:
            raise ZramfsError(errno.EINVAL, str(error)) from None
        except MemoryError as error:
            raise ZramfsError(errno.ENOMEM, str(error)) from None
        level = logging.INFO if wanted.older is None else logging.DEBUG
        done = await self._drive_sharing(sharing, rest, level)
        if done.no_room and not done.joined:
            raise ZramfsError(
                errno.ENOMEM, f"{done.no_room} pages could share an object, but it found no room: the pool "
                "is full, far beyond mem_limit or for the machine")

    async def _drive_sharing(self, sharing: Sharing, rest: AfterSlice, level: int) -> SharingStats:
        """level: of the log."""
        before = self.sharing
        try:
            while await self._in_thread(partial(sharing.step, SLICE_NS)):
                self.sharing = before + sharing.stats()
                await rest()
        finally:
            done = await finish_job(self._in_thread, sharing.finish)
            self.sharing = before + done
            log.log(
                level if done.looked else logging.DEBUG,
                "share: %d of %d pages joined, %d objects made, %d bytes saved, %d pages were alone, %d "
                "found no room",
                done.joined, done.looked, done.made, done.bytes_saved, done.alone, done.no_room)
        return done

    async def _drive(self, job: Recompression, rest: AfterSlice, level: int) -> RecompressionStats:
        """level: of the log."""
        before = self.recompression
        try:
            while await self._in_thread(partial(job.select, SLICE_NS)):
                self.recompression = before + job.stats()
                await rest()
            while await self._in_thread(partial(job.step, SLICE_NS)):
                self.recompression = before + job.stats()
                await rest()
        finally:
            done = await finish_job(self._in_thread, job.finish)
            self.recompression = before + done
            log.log(
                level if done.tried else logging.DEBUG,
                "recompress: %d pages tried, %d won, %d bytes saved, %d marked incompressible, %d without "
                "room", done.tried, done.won, done.bytes_saved, done.incompressible, done.no_room)
        return done
