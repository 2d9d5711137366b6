# SPDX-License-Identifier: Apache-2.0
"""Saves a device into an image while it is in use."""
from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from zramfs import __version__
from zramfs.errors import ZramfsError
from zramfs.host.idle_io import idle_io
from zramfs.image.layout import Head, SavedAlgorithm
from zramfs.image.writer import ImageWriter
from zramfs.model.stats import SaveStats
from zramfs.store.saving import SaveRun
from zramfs.text.sizes import format_size

from .freeze import ThawedError, frozen, mounted_on
from .jobs import InThread, finish_job

if TYPE_CHECKING:
    from zramfs.host.mounts import Mount
    from zramfs.model.stats import LaneStats
    from zramfs.store.store import Store

    from .commands import SaveArguments

log = logging.getLogger(__package__)

# As of the other work in slices (postprocess.py). A part of 256 KiB is filled in 0.5 to 1 ms.
SLICE_NS = 5_000_000
# A save that rests while the lane is busy is late for what writers overwrite: they wait for it when 8 MiB
# wait.
BEHIND = 2 << 20
# Tries to have the instant while all file systems are frozen. The first one writes out what waits in the page
# cache, and may take seconds. The next one finds little of that.
INSTANTS = 5


@dataclass
class _Pace:
    """Rests so that the rate is kept, and as long as it worked when others use the device."""

    rate: int  # bytes a second, 0 = any
    requests: Callable[[], int]

    def __post_init__(self) -> None:
        self._began = self._last = time.monotonic()
        self._seen = self.requests()

    async def rest(self, written: int, waiting: int) -> None:
        now, seen = time.monotonic(), self.requests()
        pause = 0.0
        if waiting < BEHIND:
            if self.rate:
                pause = self._began + written / self.rate - now
            if seen != self._seen:
                pause = max(pause, now - self._last)
        # In short pieces: what writers overwrite must not wait for the end of a long one.
        await trio.sleep(min(max(pause, 0.0), 0.1))
        self._last, self._seen = time.monotonic(), seen

    def is_ahead(self, written: int, waiting: int) -> bool:
        """Whether the rate allows nothing more at the moment."""
        return (self.rate > 0 and waiting < BEHIND
                and written > self.rate * (time.monotonic() - self._began) + (1 << 20))


class Saver:
    """in_thread: runs a call in a worker thread. disk: the file under the loop devices of the file systems
    that are frozen. lane: what the lane has done."""

    def __init__(self, in_thread: InThread, disk: Path, lane: Callable[[], LaneStats]) -> None:
        self._in_thread = in_thread
        self._disk = disk
        self._lane = lane
        self._saved_at: tuple[Path, int] | None = None  # the last image, and _changes() before it
        self.stats = SaveStats()

    def _requests(self) -> int:
        lane = self._lane()
        return lane.read_ios + lane.write_ios + lane.discard_ios

    def _changes(self) -> int:
        lane = self._lane()
        return lane.write_ios + lane.discard_ios

    def forget(self) -> None:
        self._saved_at = None

    def is_saved(self, path: Path) -> bool:
        """Whether the last image is this file, and nothing has changed since."""
        return self._saved_at == (path, self._changes())

    async def save(self, store: Store, wanted: SaveArguments) -> None:
        """Returns when the image is on the disk. To be cancelled between two slices: the file that was there
        before stays then. Raises ZramfsError."""
        path = wanted.path
        assert path is not None
        self.stats = replace(self.stats, path=str(path), pages=0, taken=0, written=0, is_running=True)
        began = time.monotonic()
        try:
            changes = await self._save(store, path, wanted)
        except BaseException as error:
            said = str(error) if isinstance(error, OSError) else "it was cut short"
            self.stats = replace(
                self.stats, is_running=False, failures=self.stats.failures + 1, last_error=said)
            raise
        self._saved_at = (path, changes)
        done = self.stats = replace(
            self.stats, is_running=False, saves=self.stats.saves + 1, last_error=None,
            saved_at=int(time.time()))
        log.info("saved %d pages in %s to %s in %.1f s; %d of them were overwritten meanwhile", done.taken,
                 format_size(done.written), path, time.monotonic() - began, done.kept)

    async def _save(self, store: Store, path: Path, wanted: SaveArguments) -> int:
        """What _changes() was before the instant."""
        writer = await self._in_thread(partial(ImageWriter, path, force=wanted.force))
        try:
            places = await self._in_thread(partial(mounted_on, self._disk))
            _expect_elsewhere(path, writer, places)
            run, changes = await self._begin_at_rest(store, places)
            try:
                await self._write(store, run, writer, _Pace(wanted.rate, self._requests))
            except OSError as error:
                if isinstance(error, ZramfsError):
                    raise
                raise ZramfsError(error.errno or errno.EIO, error.strerror or str(error)) from None
            finally:
                await finish_job(self._in_thread, run.finish)
            await self._in_thread(partial(_idly, writer.commit))
        finally:
            await finish_job(self._in_thread, writer.close)
        return changes

    async def _begin_at_rest(self, store: Store, places: list[Mount]) -> tuple[SaveRun, int]:
        """A run whose instant has come while all of them were frozen, and what _changes() was before that."""
        left = INSTANTS
        while True:
            run = await self._in_thread(partial(_begin, store))
            try:
                async with frozen(places):
                    changes = self._changes()
                    run.start()
                return run, changes
            except BaseException as error:
                await finish_job(self._in_thread, run.finish)
                left -= 1
                if not isinstance(error, ThawedError) or not left:
                    raise
                log.info("%s; the save begins again", error.sentence)

    async def _write(self, store: Store, run: SaveRun, writer: ImageWriter, pace: _Pace) -> None:
        while await self._in_thread(partial(run.scan, SLICE_NS)):
            await trio.lowlevel.checkpoint()
        head = Head(os.urandom(16), run.disksize, run.pages, int(time.time()), _algorithms(store),
                    run.chunks(), __version__)
        await self._in_thread(partial(writer.head, head))
        while not run.done:
            if not pace.is_ahead(writer.written, run.waiting):
                await self._in_thread(partial(_slice, run, writer))
            self.stats = replace(self.stats, pages=run.pages, taken=run.taken, kept=run.kept, lost=run.lost,
                                 written=writer.written)
            await pace.rest(writer.written, run.waiting)


def _slice(run: SaveRun, writer: ImageWriter) -> None:
    if run.fill(SLICE_NS):
        directory, data = run.take()
        if directory:
            _idly(partial(writer.part, directory, data))


def _idly(work: Callable[[], object]) -> None:
    # Not of the CPU: a thread of low priority that is put aside while it has a slot locked would hold up who
    # wants that page.
    with idle_io():
        work()


def _begin(store: Store) -> SaveRun:
    try:
        return SaveRun(store)
    except ValueError as error:
        raise ZramfsError(errno.EINVAL, str(error)) from None
    except MemoryError as error:
        raise ZramfsError(errno.ENOMEM, str(error)) from None


def _algorithms(store: Store) -> tuple[SavedAlgorithm | None, ...]:
    return tuple(
        SavedAlgorithm(each.algo, each.level, each.dictionary) if each else None for each in store.codecs)


def _expect_elsewhere(path: Path, writer: ImageWriter, places: Sequence[Mount]) -> None:
    device = writer.device
    for each in places:
        if each.dev == f"{os.major(device)}:{os.minor(device)}":
            raise ZramfsError(
                errno.EINVAL, f"{path} lies on the device itself: expected a file on a disk")
