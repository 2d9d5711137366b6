# SPDX-License-Identifier: Apache-2.0
"""The backing store of a device: its settings, which are the kernel's, and the runs of write-back."""
from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from zramfs.errors import ZramfsError
from zramfs.host import safe_paths, signatures
from zramfs.model.stats import BackingSettings, BackingStats, WritebackStats
from zramfs.store.backing import Backing
from zramfs.store.writeback import MODES, WritebackRun
from zramfs.text.key_values import number, shown, words
from zramfs.text.sizes import PAGE

from .jobs import AfterSlice, InThread, finish_job

if TYPE_CHECKING:
    from zramfs.store.store import Store

log = logging.getLogger(__name__)

Range = tuple[int, int, str | None]  # pages [low, high), and what they must be
DidWrite = Callable[[int, int], None]  # pages that were written back, blocks that were written

# A slice may take longer where the device does: it ends after the batch that is under way.
SLICE_NS = 10_000_000
TRIM_PAUSE = 2.0  # seconds between two looks for blocks to give back to the file system
TRIM_BLOCKS = 2048  # a slice: at most 16 holes of 2 MiB where blocks lie together


def parse_ranges(text: str, pages: int) -> list[Range]:
    """What a write to `writeback` asks for: [low, high) and mode, in the order given. As in the kernel, a
    type ends the list, looks at the range before it, and unknown keys are passed over.

    ZramfsError: EINVAL for a bad mode or number, ERANGE outside the device.
    """
    found: list[Range] = []
    low, high = 0, pages
    for key, value in words(text):
        if not value or key == "type":
            return [*found, (low, high, _mode(value or key))]
        if key == "page_index":
            low = number(key, value, 0, pages - 1)
            high = low + 1
            found.append((low, high, None))
        elif key == "page_indexes":
            low, high = _indexes(key, value, pages)
            found.append((low, high, None))
    return found


def _mode(name: str) -> str:
    if name not in MODES:
        modes = ", ".join(mode for mode in MODES if mode)
        raise ZramfsError(errno.EINVAL, f"expected one of {modes}, got {shown(name)}")
    return name


def _indexes(key: str, value: str, pages: int) -> tuple[int, int]:
    first, dash, last = value.partition("-")
    if not dash:
        raise ZramfsError(errno.EINVAL, f"{key} takes FIRST-LAST, not {shown(value)}")
    low, high = number(key, first, 0, pages - 1), number(key, last, 0, pages - 1)
    if low > high:
        raise ZramfsError(errno.ERANGE, f"{key} takes FIRST-LAST, the smaller first, not {shown(value)}")
    return low, high + 1


def _expect_free(path: Path) -> None:
    """Raises ZramfsError(EEXIST) for a device or file that holds something, which would be lost."""
    try:
        held = signatures.held_by(path)
    except ZramfsError:
        raise
    except OSError:
        return  # opening it for writing says it better
    if held:
        is_device = path.is_block_device()
        advice = f"wipefs --all {path}" if is_device else f"truncate -s 0 {path}, then -s its size"
        raise ZramfsError(
            errno.EEXIST,
            f"{path} holds {held}, which write-back would overwrite; nothing was changed. If it may "
            f"go, clear it ({advice}), or take --force")


class BackingStore:
    """in_thread: runs a call in a worker thread, one at a time. job_thread: the same for slices of
    write-back, for which nobody else waits. wipe: of Backing. done: since the device was set up.

    Settings but the path outlive a reset, as in the kernel.
    """

    def __init__(
        self, in_thread: InThread, job_thread: InThread, store: Callable[[], Store | None], *,
        wipe: bool = False,
    ) -> None:
        self._in_thread = in_thread
        self._job_thread = job_thread
        self._store = store
        self._wipe = wipe
        self._opened: Backing | None = None
        self.settings = BackingSettings()
        self.done = WritebackStats()

    def stats(self) -> BackingStats | None:
        """None while there is none."""
        opened = self._opened
        # A store that is being closed in the worker thread closes it too.
        return None if opened is None or opened.closed else opened.stats()

    @property
    def backing(self) -> Backing | None:
        """What a store is to be made with, which then closes it."""
        return self._opened

    def set(self, **values: Any) -> None:
        self.settings = BackingSettings(**{**vars(self.settings), **values})

    async def open(self, path: str, *, overwrite: bool = False) -> None:
        """Opens a block device or file in place of the last one. overwrite: whatever it holds.

        ZramfsError: what open(2) says, ENOTBLK, EBUSY, EINVAL, ENOMEM, EEXIST for one that holds something;
        the last one stays then.
        """
        if not path:
            raise ZramfsError(errno.ENOENT, "expected the path of a block device or a file, got nothing")
        if not os.path.isabs(path):
            raise ZramfsError(
                errno.ENOENT,
                f"expected an absolute path, got {shown(path)}: a device has no working directory")
        if not overwrite:
            await self._in_thread(partial(_expect_free, Path(path)))
        try:
            opened = await self._in_thread(partial(Backing, path, self._wipe, safe_paths.open_path))
        except ZramfsError:
            raise
        except MemoryError as error:
            raise ZramfsError(errno.ENOMEM, f"no memory for {shown(path)}: {error}") from None
        except (OSError, ValueError) as error:
            number = error.errno if isinstance(error, OSError) else None
            raise ZramfsError(
                number or errno.EINVAL, f"{shown(path)} can't be opened: {getattr(error, 'strerror', error)}"
            ) from None
        await self.close()
        self._opened = opened
        await self._in_thread(partial(signatures.mark, Path(path)))
        self.set(path=opened.path)
        log.info("backing store: %s, %d blocks of 4 KiB", shown(opened.path), opened.stats().blocks)
        if Path(opened.path).stat().st_mode & 0o077 and opened.is_file:
            log.warning("backing store: others may read %s; chmod 600 it", shown(opened.path))

    def fileno(self) -> int | None:
        opened = self._opened
        return None if opened is None or opened.closed else opened.fileno()

    async def adopt(self, settings: dict[str, Any], fd: int) -> None:
        """What a predecessor has opened, with its settings. Raises OSError, ValueError."""
        self._opened = await self._in_thread(
            partial(Backing, settings["path"], self._wipe, safe_paths.open_path, fd))
        self.set(**settings)

    async def close(self) -> None:
        """After the store that has it was closed."""
        opened, self._opened = self._opened, None
        self.set(path=None)
        self.done = WritebackStats()
        if opened:
            await self._in_thread(opened.close)

    async def reopen(self) -> None:
        """After the making of a store failed, which may have closed it."""
        path = self.settings.path
        if path is not None and self._opened is not None and self._opened.closed:
            try:
                await self.open(path, overwrite=True)
            except ZramfsError as error:
                await self.close()
                log.error("backing store: lost: %s", error)

    async def write_back(self, store: Store, ranges: list[Range]) -> None:
        """ZramfsError: EIO: the budget is used up; ENOSPC: the backing store is full; EBUSY, ENOMEM; or the
        errno of the last write that failed, whose pages stay."""
        await self._write_back(store, ranges)

    async def write_back_idle(
        self, store: Store, blocks: int | None, did: DidWrite, rest: AfterSlice
    ) -> None:
        """What is marked idle, at most so many blocks. did, rest: after each slice. As write_back(), and
        ENODEV."""
        self.expect_backing()
        await self._write_back(store, [(0, store.disksize // PAGE, "idle")], blocks, did, rest)

    def expect_backing(self) -> None:
        """Raises ZramfsError(ENODEV) without a backing store."""
        if self._opened is None:
            raise ZramfsError(errno.ENODEV, "there is no backing store; write backing_dev before disksize")

    async def _write_back(
        self, store: Store, ranges: list[Range], most: int | None = None,
        did: DidWrite = lambda pages, blocks: None, rest: AfterSlice = trio.lowlevel.checkpoint,
    ) -> None:
        try:
            run = await self._job_thread(partial(WritebackRun, store, self.settings.batch_size))
        except MemoryError as error:
            raise ZramfsError(errno.ENOMEM, str(error)) from None
        try:
            await self._select(run, ranges, rest)
            await self._write(run, most, did, rest)
        except MemoryError as error:
            raise ZramfsError(errno.ENOMEM, str(error)) from None
        finally:
            await finish_job(self._job_thread, run.finish)
            self.done += WritebackStats(runs=1, pages=run.pages, passed=run.passed, failed=run.failed)
            log.log(logging.INFO if run.pages or run.failed else logging.DEBUG,
                    "writeback: %d pages written back, in them %d whole units; %d used meanwhile, %d failed",
                    run.pages, run.units, run.passed, run.failed)
        if run.error == errno.ENOSPC:
            raise ZramfsError(
                errno.ENOSPC, f"the backing store is full after {run.pages} pages; the others stay")
        if run.error:
            raise ZramfsError(
                run.error, f"{run.failed} pages stay in memory, because the backing store failed: "
                f"{os.strerror(run.error)}")

    async def _select(self, run: WritebackRun, ranges: list[Range], rest: AfterSlice) -> None:
        for low, high, mode in ranges:
            while low < high:
                low = await self._job_thread(partial(run.select, low, high, mode, SLICE_NS))
                await rest()

    async def _write(self, run: WritebackRun, most: int | None, did: DidWrite, rest: AfterSlice) -> None:
        """most: blocks, beside writeback_limit."""
        pages = 0
        while run.left and most != 0:
            budget = self.settings.limit if self.settings.limit_enable else None
            if budget == 0:
                raise ZramfsError(
                    errno.EIO, f"writeback_limit is used up after {run.pages} pages; write a new one, or 0 "
                    "to writeback_limit_enable")
            allowed = budget if most is None else most if budget is None else min(budget, most)
            written = await self._job_thread(partial(run.write, allowed, SLICE_NS))
            if budget is not None:
                self.set(limit=budget - written)
            if most is not None:
                most -= written
            did(run.pages - pages, written)
            pages = run.pages
            await rest()

    async def run(self) -> None:
        """The task that gives the space of freed blocks back to the file system, and zeroes them before with
        wipe. May be started again after any exception."""
        while True:
            await trio.sleep(TRIM_PAUSE)
            while await self._in_thread(self._trim):
                await trio.sleep(0)

    def _trim(self) -> int:
        # In the worker thread, so that no store is closed meanwhile.
        store = self._store()
        backing = store.backing if store else None
        if backing is None or not backing.trims or not backing.stats().stale:
            return 0
        return backing.trim(TRIM_BLOCKS)


