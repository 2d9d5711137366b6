# SPDX-License-Identifier: Apache-2.0
"""Idle marks and recompression of a device: the slices, off the trio loop, and what they have done."""
from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from zramfs.errors import ZramfsError
from zramfs.model.stats import RecompressionStats
from zramfs.store.recompress import Recompression
from zramfs.store.store import Store

from .algorithms import RecompressArguments
from .jobs import InThread, finish_job

log = logging.getLogger(__name__)

# A slice runs in a worker thread without the GIL and holds no lock for longer than a page, so it delays
# nobody; its length is how long `reset` waits for it. Going through a thread costs about 0.1 ms.
SLICE_NS = 10_000_000

Rest = Callable[[], Awaitable[None]]


class PostProcessor:
    """in_thread: runs a call in a worker thread. recompression: what was done since the device was set up.

    What runs long here is cancelled between two slices. The caller sees to it that the store stays open.
    """

    def __init__(self, in_thread: InThread) -> None:
        self._in_thread = in_thread
        self.recompression = RecompressionStats()

    def forget(self) -> None:
        self.recompression = RecompressionStats()

    async def mark_idle(self, store: Store, age: int | None, rest: Rest = trio.lowlevel.checkpoint) -> None:
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
        self, store: Store, priority: int, wanted: RecompressArguments, rest: Rest = trio.lowlevel.checkpoint
    ) -> None:
        """rest comes after each slice. ZramfsError: EINVAL (threshold), EBUSY, ENOMEM."""
        begin = partial(
            Recompression, store, priority, idle=wanted.idle, huge=wanted.huge, threshold=wanted.threshold,
            max_pages=wanted.max_pages)
        try:
            stats = await self._drive(await self._in_thread(begin), rest)
        except ValueError as error:
            raise ZramfsError(errno.EINVAL, str(error)) from None
        except MemoryError as error:
            raise ZramfsError(errno.ENOMEM, str(error)) from None
        if stats.no_room and not stats.won:
            raise ZramfsError(
                errno.ENOMEM, f"{stats.no_room} pages could become smaller, but their new objects found "
                "no room: the pool is full, far beyond mem_limit or for the machine")

    async def _drive(self, job: Recompression, rest: Rest) -> RecompressionStats:
        before = self.recompression
        try:
            while await self._in_thread(partial(job.select, SLICE_NS)):
                await rest()
            while await self._in_thread(partial(job.step, SLICE_NS)):
                self.recompression = before + job.stats()
                await rest()
        finally:
            done = await finish_job(self._in_thread, job.finish)
            self.recompression = before + done
            log.log(
                logging.INFO if done.tried else logging.DEBUG,
                "recompress: %d pages tried, %d won, %d bytes saved, %d marked incompressible, %d without "
                "room", done.tried, done.won, done.bytes_saved, done.incompressible, done.no_room)
        return done
