# SPDX-License-Identifier: Apache-2.0
"""The command `estimate`: what `density=max` would win, from a sample, while the device is in use."""
from __future__ import annotations

import errno
import logging
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import trio

from zramfs.errors import ZramfsError
from zramfs.store.estimate import Estimating
from zramfs.text.sizes import format_size

from .jobs import SLICE_NS, InThread, finish_job

if TYPE_CHECKING:
    from zramfs.model.estimate import Estimate
    from zramfs.store.store import Store

log = logging.getLogger(__name__)


class Estimator:
    """in_thread: runs a call in a worker thread. last: the result of the last estimate."""

    def __init__(self, in_thread: InThread) -> None:
        self._in_thread = in_thread
        self.last: Estimate | None = None

    def forget(self) -> None:
        self.last = None

    async def estimate(self, store: Store, sample: int) -> None:
        """sample: bytes. To be cancelled between two slices; the caller sees to it that the store stays open.
        ZramfsError(ENOMEM)."""
        # As `recompress` without more words does it.
        priority = next((n for n, codec in enumerate(store.codecs) if n and codec is not None), None)
        try:
            work = await self._in_thread(partial(Estimating, store, priority=priority, sample=sample))
            try:
                while await self._in_thread(partial(work.step, SLICE_NS)):
                    await trio.lowlevel.checkpoint()
                found = await self._in_thread(work.result)
            finally:
                await finish_job(self._in_thread, work.finish)
        except MemoryError as error:
            raise ZramfsError(errno.ENOMEM, str(error)) from None
        self.last = found = replace(found, taken_at=int(time.time()))
        log.info(
            "estimate: %s of data in %s of memory would take %s, with a standard error of %s, for %.1f s of "
            "CPU; %d of %d groups of 16 pages were tried", format_size(found.data), format_size(found.memory),
            format_size(found.after), format_size(found.error), found.cpu_ns / 1e9, found.sampled_groups,
            found.groups)
