# SPDX-License-Identifier: Apache-2.0
"""The long work of a device: recompression, write-back, idle marks, compaction by command.

A job runs beside the commands and holds none of their locks. `reset` and the end of the device cut all jobs
short, and wait until the last of them has ended.
"""
from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from zramfs.errors import ZramfsError

# A slice runs in a worker thread without the GIL and holds no lock for longer than a page, so it delays
# nobody; its length is how long `reset` waits for it. Going through a thread costs about 0.1 ms.
SLICE_NS = 10_000_000

T = TypeVar("T")
JobWork = Callable[[], Awaitable[None]]
AfterSlice = Callable[[], Awaitable[None]]  # called between two slices of work
InThread = Callable[[Callable[[], T]], Awaitable[T]]  # runs a call in a worker thread


class Job:
    """Counts as under way from Jobs.begin() to the end of run(), which must follow at once."""

    def __init__(self, jobs: Jobs, kind: str) -> None:
        self._jobs = jobs
        self._scope = trio.CancelScope()
        self.kind = kind

    async def run(self, work: JobWork) -> None:
        """The work is cancelled at its next checkpoint when it is cut short. What it did until then must be
        complete. Its own clean-up must need no checkpoint, or be shielded. Raises ZramfsError(EINTR) then."""
        try:
            with self._scope:
                await work()
        finally:
            self._jobs.end(self)
        if self._scope.cancelled_caught:
            raise self._jobs.interrupted(self.kind)

    def cancel(self) -> None:
        self._scope.cancel()


class Jobs:
    def __init__(self) -> None:
        self._running: list[Job] = []
        self._reasons: list[str] = []  # why no job may begin
        self._none_runs = trio.Event()
        self._none_runs.set()

    def begin(self, kind: str, *, alone: bool) -> Job:
        """alone: there may be one of this kind at a time. Raises ZramfsError: EBUSY (there is one), EINTR
        (between cut() and allow())."""
        if self._reasons:
            raise self.interrupted(kind)
        if alone and any(job.kind == kind for job in self._running):
            raise ZramfsError(
                errno.EBUSY, f"another {kind} is under way on this device; try again when it has ended")
        if not self._running:
            self._none_runs = trio.Event()
        job = Job(self, kind)
        self._running.append(job)
        return job

    def end(self, job: Job) -> None:
        """Called by the job itself, perhaps after resume() has forgotten it."""
        if job in self._running:
            self._running.remove(job)
        if not self._running:
            self._none_runs.set()

    def interrupted(self, kind: str) -> ZramfsError:
        return ZramfsError(
            errno.EINTR, f"{kind} was cut short by {self._reasons[0]}; what it had done stays")

    def resume(self) -> None:
        """As Device.resume(). What was cut short for a reason that has its own end, as a reset, is over with
        it."""
        self._running.clear()
        self._reasons.clear()
        self._none_runs = trio.Event()
        self._none_runs.set()

    def cut(self, reason: str) -> None:
        """Ends all jobs, and lets none begin until allow(reason)."""
        self._reasons.append(reason)
        for job in self._running:
            job.cancel()

    def allow(self, reason: str) -> None:
        self._reasons.remove(reason)

    async def wait_ended(self) -> None:
        """Returns when no job is under way. After cut() that takes as long as one slice of each."""
        await self._none_runs.wait()


async def finish_job(in_thread: InThread[T], finish: Callable[[], T]) -> T:
    """Ends a run of the store's whatever has happened: a run that is not finished would keep every later one
    out."""
    with trio.CancelScope(shield=True):
        done = await in_thread(finish)
    return done
