# SPDX-License-Identifier: Apache-2.0
"""The commands that take long: `recompress`, `units`, `share`, `dictionary`, `idle`, `writeback`, `compact`,
`save` and `estimate`.

Each function here judges its command and makes nothing yet. What it returns is the work, which runs as a
job (jobs.py) beside the commands that come meanwhile.
"""
from __future__ import annotations

import errno
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from zramfs.errors import ZramfsError
from zramfs.text.sizes import PAGE

from . import algorithms
from .backing_store import parse_ranges
from .dictionaries import parse_dictionary
from .jobs import JobWork
from .postprocess import parse_share, parse_units

if TYPE_CHECKING:
    from .backing_store import BackingStore
    from .commands import SaveArguments
    from .compactor import Compactor
    from .device import Device
    from .policies import Policies
    from .postprocess import PostProcessor

log = logging.getLogger(__name__)


class LongWork:
    """won: what the last `compact` has won, in words; None before the first one."""

    def __init__(self, device: Device, post: PostProcessor, backing: BackingStore, compactor: Compactor,
                 policies: Policies) -> None:
        self._device = device
        self._post = post
        self._backing = backing
        self._compactor = compactor
        self._policies = policies
        self.won: str | None = None

    def recompress(self, text: str) -> JobWork:
        """Raises ZramfsError: EINVAL, ERANGE; the work: see PostProcessor.recompress()."""
        wanted = algorithms.parse_recompress(text)
        store = self._device.expect_store("nothing to recompress")
        priority = self._device.secondary(wanted.algo, wanted.priority)

        async def work() -> None:
            async with self._policies.aside():
                await self._post.recompress(store, priority, wanted)
            self._compactor.poke()

        return work

    def make_units(self, text: str) -> JobWork:
        """Raises ZramfsError: EINVAL, ERANGE; the work: see PostProcessor.make_units()."""
        wanted = parse_units(text)
        store = self._device.expect_store("nothing to make units of")

        async def work() -> None:
            async with self._policies.aside():
                await self._post.make_units(store, wanted)
            self._compactor.poke()

        return work

    def share(self, text: str) -> JobWork:
        """Raises ZramfsError: EINVAL, ERANGE; the work: see PostProcessor.share()."""
        wanted = parse_share(text)
        store = self._device.expect_store("nothing to share")

        async def work() -> None:
            async with self._policies.aside():
                await self._post.share(store, wanted)
            self._compactor.poke()

        return work

    def learn(self, text: str) -> JobWork:
        """Raises ZramfsError: EINVAL, ERANGE; the work: see Dictionaries.consider()."""
        wanted = parse_dictionary(text)
        store = self._device.expect_store("nothing to train a dictionary on")

        async def work() -> None:
            async with self._policies.aside():
                if wanted.age is not None:
                    await self._post.mark_idle(store, wanted.age)
                await self._device.dictionaries.consider(
                    trio.lowlevel.checkpoint, marked=wanted.marked, level=wanted.level, asked=True)
            self._compactor.poke()

        return work

    def mark_idle(self, age: int | None) -> JobWork:
        """age in seconds, None = all pages. Raises ZramfsError(EINVAL); the work: see
        PostProcessor.mark_idle()."""
        store = self._device.expect_store("no pages to mark")

        async def work() -> None:
            async with self._policies.aside():
                await self._post.mark_idle(store, age)

        return work

    def write_back(self, text: str) -> JobWork:
        """Raises ZramfsError: EINVAL, ERANGE, ENODEV; the work: see BackingStore.write_back()."""
        store = self._device.expect_store("nothing to write back")
        self._backing.expect_backing()
        ranges = parse_ranges(text, store.disksize // PAGE)

        async def work() -> None:
            async with self._policies.aside():
                await self._backing.write_back(store, ranges)
            self._compactor.poke()

        return work

    def save(self, wanted: SaveArguments) -> JobWork:
        """Raises ZramfsError: EINVAL, ENODATA (no path, and no image is kept); the work: see Saver.save()."""
        store = self._device.expect_store("nothing to save")
        wanted = replace(wanted, path=wanted.path or self._device.kept_image.path)
        if wanted.path is None:
            raise ZramfsError(errno.ENODATA, "the device keeps no image: expected save=/PATH")

        async def work() -> None:
            await self._device.saver.save(store, wanted)

        return work

    def estimate(self, sample: int) -> JobWork:
        """sample: bytes. Raises ZramfsError(EINVAL); the work: see Estimator.estimate()."""
        store = self._device.expect_store("nothing to estimate")

        async def work() -> None:
            await self._post.estimator.estimate(store, sample)

        return work

    def compact(self, what: str) -> JobWork:
        """what: "objects" (fewer zspages), "pages" (fewer pageblocks) or "all". The work ends when nothing
        is left to win; what it won is in the log, in `control` and in memory/compaction."""
        store = self._device.expect_store("nothing to compact")

        async def work() -> None:
            try:
                pages, blocks = await self._compactor.compact(store, what)
            except MemoryError as error:
                raise ZramfsError(errno.ENOMEM, str(error)) from None
            self.won = (f"{pages} pool pages by object compaction, {blocks} pageblocks of 2 MiB by page "
                        "migration")
            log.info("compaction won %s", self.won)

        return work
