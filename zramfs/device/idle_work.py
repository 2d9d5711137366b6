# SPDX-License-Identifier: Apache-2.0
"""What a device does for its policies: finds what nobody has used, and recompresses it or writes it back."""
from __future__ import annotations

import errno
import time
from functools import partial
from typing import TYPE_CHECKING

from zramfs.errors import ZramfsError
from zramfs.model.policy import Recompress, Writeback
from zramfs.model.stats import Progress
from zramfs.text.sizes import PAGE

from .algorithms import RecompressArguments
from .jobs import Jobs
from .policies import Did, Rest
from .postprocess import PostProcessor

if TYPE_CHECKING:
    from zramfs.store.store import Store

    from .backing_store import BackingStore
    from .compactor import Compactor
    from .device import Device


class _Pause:
    """Rests in proportion to the time since the last rest."""

    def __init__(self, rest: Rest) -> None:
        self._rest = rest
        self._began = time.monotonic()

    async def __call__(self) -> None:
        await self._rest(time.monotonic() - self._began)
        self._began = time.monotonic()


class IdleWork:
    """The policies' Work. Each round is a job: `reset` and the end of the device cut it short, and keep the
    store until it has ended."""

    def __init__(
        self, device: Device, jobs: Jobs, post: PostProcessor, backing: BackingStore, compactor: Compactor
    ) -> None:
        self._device = device
        self._jobs = jobs
        self._post = post
        self._backing = backing
        self._compactor = compactor

    @property
    def ready(self) -> bool:
        return self._device.store is not None

    def requests(self) -> int:
        return self._device.requests()

    async def recompress_idle(self, policy: Recompress, did: Did, rest: Rest) -> None:
        job = self._jobs.begin("policy of recompression", alone=True)
        await job.run(partial(self._recompress_idle, policy, did, rest))

    async def write_back_idle(self, policy: Writeback, budget: int | None, did: Did, rest: Rest) -> None:
        job = self._jobs.begin("policy of write-back", alone=True)
        await job.run(partial(self._write_back_idle, policy, budget, did, rest))

    async def _recompress_idle(self, policy: Recompress, did: Did, rest: Rest) -> None:
        store, pause = self._store(), _Pause(rest)
        priority = self._device.secondary(policy.algo)
        counted = self._post.recompression

        def count() -> None:
            nonlocal counted
            before, counted = counted, self._post.recompression
            did(Progress(counted.tried - before.tried, counted.won - before.won,
                         counted.bytes_saved - before.bytes_saved))

        async def count_and_pause() -> None:
            count()
            await pause()

        try:
            await self._post.mark_idle(store, policy.idle, pause)
            await self._post.recompress(store, priority, RecompressArguments(idle=True), count_and_pause)
        finally:
            count()  # of a round that was cut short, the last slice too
        self._compactor.poke()

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
