# SPDX-License-Identifier: Apache-2.0
# Order of the trio locks: Device._busy, then the policies' turn (policies.py), then Compactor.lock.
# - _busy: held by a short command from its beginning to its end, by a long one only until it is a job
#   (jobs.py), by reset() and close() also while they wait for the jobs. So no job ever waits for _busy.
# - Compactor.lock: held by whoever drives the store's migration and balloon, or takes the store away.
# - WorkThread._lock: innermost, held by one call in the device's thread.
"""One device: its configuration, its life from disksize to reset, and its commands.

The tree talks to a device through command() and stats() and the read-only tables beside it, and through
nothing else.
"""
from __future__ import annotations

import errno
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from allocator.background import prepare_thread
from zramfs.codecs.spec import parse_spec
from zramfs.errors import ZramfsError
from zramfs.host.work_thread import WorkThread, run_in_thread
from zramfs.model.config import DEFAULT_ALGO, MAX_DISKSIZE, Algorithm, DeviceConfig
from zramfs.model.device_stats import DeviceStats
from zramfs.model.policy import Policy
from zramfs.model.stats import TaskStats
from zramfs.text.kernel_numbers import page_align
from zramfs.text.sizes import format_size

from . import algorithms, commands, takeover
from .backing_store import BackingStore
from .ballast import Ballast
from .compactor import Compactor
from .density import Density
from .dictionaries import Dictionaries
from .governor import Governor
from .handlers import ALONE, LONG, SHORT
from .host_memory import HostMemory
from .idle_work import IdleWork, expect_able
from .jobs import Jobs
from .kept_image import KeptImage
from .long_work import LongWork
from .mapped_memory import MappedMemory
from .policies import Policies
from .postprocess import PostProcessor
from .read_only import ReadOnlyTables
from .restoring import restore_image
from .saving import Saver
from .size import change_size, make_store, most_memory
from .statistics import statistics_of

if TYPE_CHECKING:
    from pathlib import Path

    from zramfs.lane.lane import Lane
    from zramfs.model.stats import LaneStats, RestoreStats
    from zramfs.store.store import Store

log = logging.getLogger(__package__)

# Threads for jobs: compaction, idle marks, and one of recompression and write-back, or a policy's round. More
# jobs than that take turns.
MAX_JOBS = 4


class Device(ReadOnlyTables):
    """Short commands run one after the other. Those that take long (long_work.py) run beside them."""

    def __init__(self, config: DeviceConfig, lane: Lane, memory: int | None = None) -> None:
        """memory: a memory file that outlives this process, for the store; None = the store has its own."""
        self._config = config
        self.memory_file = memory
        # Called when a command has changed something that a successor must know.
        self.on_change: Callable[[], None] = lambda: None
        self.survival = "it ends with its daemon"
        self._lane = lane
        self._store: Store | None = None
        # Their dictionaries are read by start().
        self._algorithms: algorithms.Table = algorithms.unread(config.primary, config.secondary)
        self._access_times = config.access_times or bool(config.policies) or config.density.mode != "off"
        self._mem_limit = page_align(config.mem_limit)
        self._last_error: str | None = None
        self._lane_before: LaneStats | None = None
        self._busy = trio.Lock()
        self._thread = WorkThread(prepare_thread)
        self._in_thread = self._thread.run
        # Apart from it, so that no short command waits for a slice of a job, or for a slow backing store.
        self._job_limiter = trio.CapacityLimiter(MAX_JOBS)
        self._ballast: Ballast | None = None
        self.jobs = Jobs()
        self._post = PostProcessor(self._job_thread)
        self.dictionaries = Dictionaries(self, self._post, self._job_thread)
        self.backing_store = BackingStore(
            self._in_thread, self._job_thread, lambda: self._store, wipe=config.wipe)
        self._make_tasks(config)
        self.saver = Saver(self._job_thread, config.rundir / "disk", lane.stats)
        self.kept_image = KeptImage(self, config)
        self._restored: RestoreStats | None = None
        self.task_stats = {name: TaskStats(name) for name in self.background_tasks()}

    def _make_tasks(self, config: DeviceConfig) -> None:
        """What works by itself, and the long commands beside it."""
        self.compactor = Compactor(lambda: self._store, self.requests, self._job_thread)
        self.compactor.proactiveness = config.proactiveness
        idle_work = IdleWork(self, self.jobs, self._post, self.backing_store, self.compactor)
        self.policies = Policies(idle_work)
        self.density = Density(idle_work, self.policies, config.density)
        self.policies.unit_level = lambda: self.density.level
        self.long_work = LongWork(self, self._post, self.backing_store, self.compactor, self.policies)
        for policy in config.policies:
            self.policies.set(policy.kind, policy)
        self.host_memory = HostMemory(
            config, lambda: self._store, (self.compactor.poke, self.policies.hurry, self.density.hurry))
        self.compactor.is_short = lambda: self.host_memory.is_near
        self.governor = Governor(
            lambda: self._store, lambda: self.host_memory.headroom.stats().room, config.rundir / "disk")

    async def start(self) -> None:
        """Reads the dictionaries, and sets up a device that is configured with a size. To be called
        before the lane starts.

        Raises ZramfsError: EINVAL (algorithm, level or dictionary), ENOMEM, and what the backing store is
        refused for.
        """
        config = self._config
        self._algorithms = await self._in_thread(
            partial(algorithms.table, config.primary, config.secondary))
        if config.writeback is not None:
            await self.backing_store.open(str(config.writeback), overwrite=config.forced)
        if self._config.size:
            await self._set_up(self._config.size, config.restore)
        self._take_ballast()

    async def take_over(self, saved: dict[str, Any], backing: int | None, mapped: MappedMemory) -> None:
        """In place of start(); as takeover.restore()."""
        await takeover.restore(self, saved, backing, mapped)
        self._take_ballast()

    def _take_ballast(self) -> None:
        if self._config.reserve:
            self._ballast = Ballast(self._lane)

    def background_tasks(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """What is to run beside the lane, by name. Each may be started again; task_stats counts that."""
        return {"compactor": self.compactor.run, "trimmer": self.backing_store.run,
                "policies": self.policies.run, "density": self.density.run,
                "host memory": self.host_memory.run, "governor": self.governor.run,
                "kept image": self.kept_image.run}

    def resume(self) -> None:
        """The trio loop has ended with all its tasks, whatever they were doing, and a new one runs."""
        self._busy = trio.Lock()
        self._thread.resume()
        self._job_limiter = trio.CapacityLimiter(MAX_JOBS)
        self.jobs.resume()
        self.compactor.resume()
        self.policies.resume()
        self.density.resume()
        self.governor.resume()

    def end_jobs(self) -> None:
        """Cuts short what runs for long, and lets nothing of the kind begin: the device is to end."""
        self.jobs.cut("the end of the device")

    async def close(self) -> None:
        """Frees the memory. The lane must have ended."""
        self.end_jobs()
        async with self._busy, self.policies.aside():
            await self.jobs.wait_ended()
            await self._drop_store()
        self.governor.close()
        self.host_memory.close()
        if self._ballast:
            self._ballast.close()

    async def command(self, line: str) -> None:
        """Runs one line of `control`. Raises ZramfsError with the reason, which stats() then shows
        as the last error; whatever else goes wrong comes out as it is."""
        try:
            command, text = commands.parse(line)
            value = command.value(text)
            if command.name == "reset":
                await self._run_reset()
            elif command.name in LONG:
                await self._run_job(command.name, value)
            else:
                async with self._busy:
                    await SHORT[command.name](self, value)
        except OSError as error:
            self.refused(line, error)
            raise
        self.on_change()

    async def _run_job(self, name: str, value: Any) -> None:
        async with self._busy:
            work = LONG[name](self.long_work, value)
            job = self.jobs.begin(name, alone=name in ALONE)
        await job.run(work)

    async def _run_reset(self) -> None:
        """What `reset` would drop is worth no more work; but a device in use is not reset."""
        # Not in the worker thread, which a job may hold until it is cut short.
        if self._lane.open_count and not await trio.to_thread.run_sync(self._lane.wait_unused):
            raise self._in_use()
        self.jobs.cut("reset")
        try:
            async with self._busy, self.policies.aside():
                await self.jobs.wait_ended()
                await self.reset()
        finally:
            self.jobs.allow("reset")

    def refused(self, what: str, error: OSError) -> None:
        """Puts an error that the writer of a file only sees as an errno where people look for it."""
        sentence = error.strerror or str(error)
        # A stranger's bytes need not be UTF-8; a log must.
        what = what.encode("utf-8", "backslashreplace").decode()
        code = errno.errorcode.get(error.errno or 0, "unknown error")
        log.warning("%s: %s: %s (%s)", self._config.name, what, sentence, code)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        self._last_error = f"{now} {what}: {sentence} ({code})"

    def stats(self) -> DeviceStats:
        return statistics_of(self)

    @property
    def store(self) -> Store | None:
        return self._store

    def requests(self) -> int:
        """I/O requests since the start."""
        lane = self._lane.stats()
        return lane.read_ios + lane.write_ios + lane.discard_ios

    def secondary(self, algo: str | None, priority: int | None = None) -> int:
        """The priority of the secondary algorithm that a name, a priority or both mean; neither: the first.
        Raises ZramfsError(EINVAL)."""
        return algorithms.priority_of(self._algorithms, algo, priority, 1)

    @property
    def _primary(self) -> Algorithm:
        return self._algorithms[0].algorithm

    # The commands. They expect _busy to be held by command().

    async def set_disksize(self, size: int) -> None:
        if size == 0:
            raise ZramfsError(
                errno.EINVAL, "expected a disksize above 0; to drop a device's data and size, use reset")
        if self._store:
            raise ZramfsError(
                errno.EBUSY,
                f"the device has a size of {self._store.disksize} bytes already; reset it first, "
                "which drops its data",
            )
        async with self._claim():
            await self._set_up(size)
            await self._in_thread(self._lane.notify_size)

    async def resize(self, size: int, discard: bool) -> None:
        """Of a device that may be in use. Raises ZramfsError: see change_size()."""
        store = self.expect_store("no size to change")
        if self._config.reserve:
            raise ZramfsError(
                errno.EINVAL, "the size of a device for swap stays as it is: the kernel takes the size of a "
                "swap area when that is enabled")
        await self._in_thread(partial(change_size, store, self._lane, size, discard=discard))
        log.info("%s: has %d bytes", self._config.name, store.disksize)
        self.governor.poke()
        self.compactor.poke()

    async def reset(self) -> None:
        async with self._claim():
            self._lane.set_store(None)
            self._lane_before = self._lane.stats()
            self._algorithms = algorithms.unread(Algorithm(DEFAULT_ALGO))
            self._mem_limit = 0
            self.host_memory.forget()
            self._post.forget()
            self.dictionaries.forget()
            self.policies.forget()
            self.density.forget()
            self.saver.forget()
            self._restored = None
            await self._drop_store()
            await self._in_thread(self._lane.notify_size)
        log.info("%s: reset", self._config.name)

    async def set_proactiveness(self, value: int) -> None:
        if not 0 <= value <= 100:
            raise ZramfsError(
                errno.EINVAL, f"expected a proactiveness of 0 (never by itself) to 100, got {value}")
        self.compactor.proactiveness = value
        self.compactor.poke()

    async def set_balloon(self, size: int) -> None:
        """Sets the target, in bytes; the compactor moves the balloon there."""
        store = self.expect_store("no pool to take memory from")
        if size > (most := most_memory(store)):
            raise ZramfsError(
                errno.EINVAL,
                f"expected a balloon of at most {format_size(most)}, all that the pool can ever have, got "
                f"{format_size(size)}")
        store.balloon.set_target(page_align(size) // 4096)
        self.compactor.poke()

    async def set_mem_limit(self, limit: int) -> None:
        limit = page_align(limit)
        if self._store:
            self.governor.expect_limit(limit)
            self._store.set_mem_limit(limit)
            self.compactor.poke()
        self._mem_limit = limit

    async def reset_mem_used_max(self) -> None:
        if self._store:
            self._store.reset_mem_used_max()

    async def set_algorithm(self, text: str) -> None:
        """text: NAME[:LEVEL][:dict=/PATH]."""
        try:
            algorithm = parse_spec(text)
        except ValueError as error:
            raise ZramfsError(errno.EINVAL, str(error)) from None
        if text == algorithm.name:
            self._choose(0, algorithm)
        else:
            await self._set_entry(0, algorithm)

    async def set_secondary(self, text: str) -> None:
        self._choose(*algorithms.parse_secondary_choice(text))

    async def set_parameters(self, text: str) -> None:
        priority, algorithm = algorithms.parse_parameters(text, self._algorithms)
        await self._set_entry(priority, algorithm, written=True)

    async def set_access_times(self, on: bool) -> None:
        if self._store:
            await self._in_thread(partial(setattr, self._store, "access_times", on))
        self._access_times = on

    async def set_policy(self, kind: str, policy: Policy | None) -> None:
        """None: off."""
        if policy is not None:
            expect_able(self, policy)
            await self.set_access_times(True)
        self.policies.set(kind, policy)

    async def set_backing_dev(self, path: str) -> None:
        self._expect_no_store("the backing store stays what it is")
        await self.backing_store.open(path)

    async def set_writeback(self, **values: int | bool) -> None:
        self.backing_store.set(**values)

    async def set_compressed_writeback(self, on: bool) -> None:
        self._expect_no_store("compressed_writeback stays what it is")
        self.backing_store.set(compressed=on)

    def _expect_no_store(self, what: str) -> None:
        if self._store:
            raise ZramfsError(
                errno.EBUSY, f"{what} while the device is set up; reset it first, which drops its data")

    def _choose(self, priority: int, algorithm: Algorithm) -> None:
        """By its name alone."""
        self._expect_no_store(f"the algorithms stay as they are (#0 {self._primary.name})")
        entry = algorithms.successor(self._algorithms[priority], algorithm)
        self._algorithms = algorithms.with_entry(self._algorithms, priority, entry)

    async def _set_entry(self, priority: int, algorithm: Algorithm, *, written: bool = False) -> None:
        self._expect_no_store(f"the algorithms stay as they are (#0 {self._primary.name})")
        entry = await self._in_thread(partial(algorithms.entry, algorithm, written))
        self._algorithms = algorithms.with_entry(self._algorithms, priority, entry)

    async def _set_up(self, size: int, image: Path | None = None) -> None:
        if size > MAX_DISKSIZE:
            # ENOMEM, as the kernel answers for a size whose table it cannot allocate.
            raise ZramfsError(
                errno.ENOMEM, f"expected a disksize of at most {MAX_DISKSIZE} bytes, got {size}")

        entries = algorithms.with_density(self._algorithms, self.density.wanted)

        def make() -> Store:
            store = make_store(size, reserve=self._config.reserve, mem_limit=self._mem_limit,
                               fd=-1 if self.memory_file is None else self.memory_file,
                               backing=self.backing_store.backing, wipe=self._config.wipe,
                               headroom=self.host_memory.headroom,
                               **algorithms.store_arguments(entries))
            try:
                store.access_times = self._access_times
                if image is not None:
                    self._restored = restore_image(store, image, whole=image == self._config.keep)
                self._lane.set_store(store)
            except BaseException:
                store.close()
                raise
            return store

        try:
            store = await self._in_thread(make)
        except (ValueError, MemoryError, OSError, RuntimeError) as error:
            await self.backing_store.reopen()
            if isinstance(error, (ValueError, MemoryError)):
                number = errno.EINVAL if isinstance(error, ValueError) else errno.ENOMEM
                raise ZramfsError(number, str(error)) from None
            raise
        self._store, self._algorithms = store, entries
        self.long_work.won = None
        self.compactor.poke()
        log.info(
            "%s: set up: %d bytes, %s level %d", self._config.name, store.disksize, store.algo, store.level)

    async def _drop_store(self) -> None:
        """Frees all data, when no slice of the compactor is at work on it."""
        async with self.compactor.lock:
            store, self._store = self._store, None
            if store:
                await self._in_thread(store.close)
        await self.backing_store.close()

    @asynccontextmanager
    async def _claim(self) -> AsyncIterator[None]:
        """Keeps everybody from opening `disk`. EBUSY if somebody has it open."""
        if not await self._in_thread(self._lane.claim):
            raise self._in_use()
        try:
            yield
        finally:
            self._lane.release_claim()

    def _in_use(self) -> ZramfsError:
        return ZramfsError(
            errno.EBUSY,
            f"disk is open ({self._lane.open_count} times): unmount, swapoff or losetup -d what uses it",
        )

    async def _job_thread(self, work: Callable[[], Any]) -> Any:
        def prepared() -> Any:
            prepare_thread()
            return work()

        return await run_in_thread(prepared, self._job_limiter)
