# SPDX-License-Identifier: Apache-2.0
"""What a device does for its policies: finds what nobody has used, and recompresses it or writes it back."""
from __future__ import annotations

import time
from typing import TYPE_CHECKING

from zramfs.model.policy import Recompress, Writeback
from zramfs.model.stats import Progress

from .algorithms import RecompressArguments
from .policies import Did, Rest
from .postprocess import PostProcessor

if TYPE_CHECKING:
    from zramfs.store.store import Store

    from .backing_store import BackingStore
    from .compactor import Compactor
    from .device import Device

BLOCK = 4096


class _Pause:
    """Rests in proportion to the time since the last rest."""

    def __init__(self, rest: Rest) -> None:
        self._rest = rest
        self._began = time.monotonic()

    async def __call__(self) -> None:
        await self._rest(time.monotonic() - self._began)
        self._began = time.monotonic()


class IdleWork:
    """The policies' Work. Holds none of the device's locks: policies.aside() keeps the store there."""

    def __init__(
        self, device: Device, post: PostProcessor, backing: BackingStore, compactor: Compactor
    ) -> None:
        self._device = device
        self._post = post
        self._backing = backing
        self._compactor = compactor

    @property
    def ready(self) -> bool:
        return self._device.store is not None

    def requests(self) -> int:
        return self._device.requests()

    async def recompress_idle(self, policy: Recompress, did: Did, rest: Rest) -> None:
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

    async def write_back_idle(self, policy: Writeback, budget: int | None, did: Did, rest: Rest) -> None:
        store, pause = self._store(), _Pause(rest)
        blocks = None if budget is None else budget // BLOCK

        def count(pages: int, written: int) -> None:
            did(Progress(pages, pages, written * BLOCK))

        await self._post.mark_idle(store, policy.idle, pause)
        await self._backing.write_back_idle(store, blocks, count, pause)
        self._compactor.poke()

    def _store(self) -> Store:
        store = self._device.store
        assert store is not None  # ready, and kept there while a round runs
        return store
