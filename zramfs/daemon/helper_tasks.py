# SPDX-License-Identifier: Apache-2.0
"""The tasks beside the lane (compactor, policies, watchers, notifier): each is started again when it fails.

A device can do without any of them for a while, so no failure of theirs ends it. The first failure of an
episode is in the log; all are counted in `metrics` and in `control`.
"""
from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import replace

import trio

from zramfs.model.stats import TaskStats

log = logging.getLogger(__package__)

# Between a failure and the next start, doubling: a machine without descriptors or memory gets time.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds
HEALTHY = 60.0  # seconds without a failure after which an episode is over


class HelperTasks:
    """stats: what happened to each task, by its name; written here, read by others."""

    def __init__(self, device: str, stats: MutableMapping[str, TaskStats]) -> None:
        self._device = device
        self._stats = stats

    async def keep_running(
        self, name: str, task: Callable[..., Awaitable[object]], *arguments: object
    ) -> None:
        """Returns when the task does. Whatever it raises, MemoryError included, starts it again."""
        pause = FIRST_PAUSE
        self._stats.setdefault(name, TaskStats(name))
        while True:
            began = trio.current_time()
            try:
                await task(*arguments)
                return
            except BaseException as error:
                failure = _failure_of(error)
                if failure is None:
                    raise
            if trio.current_time() - began >= HEALTHY:
                pause = FIRST_PAUSE
            # Without memory even this can fail; the task is started again all the same.
            with contextlib.suppress(Exception):
                self._note_failure(name, failure, pause)
            del failure  # its trace holds the frames of the task
            await trio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _note_failure(self, name: str, failure: BaseException, pause: float) -> None:
        before = self._stats[name]
        said = f"{type(failure).__name__}: {failure}"
        self._stats[name] = replace(before, failures=before.failures + 1, last_error=said)
        if pause > FIRST_PAUSE and said == before.last_error:
            return
        # A machine that runs short is no fault of ours, and needs no trace.
        trace = None if isinstance(failure, (OSError, MemoryError)) else failure
        log.error(
            "%s: the task %s failed, and is started again in %g s, after repeated failures in %g s: %s",
            self._device, name, pause, LONGEST_PAUSE, said, exc_info=trace,
        )


def _failure_of(error: BaseException) -> BaseException | None:
    """The first exception in a group that is not the cancellation of the task; None if it was cancelled,
    since then the task is to end, whatever else went wrong in it."""
    if isinstance(error, Exception) and not isinstance(error, ExceptionGroup):
        return error
    if isinstance(error, BaseExceptionGroup):
        cancelled, failures = error.split((trio.Cancelled, KeyboardInterrupt, SystemExit))
        if cancelled is not None:
            raise cancelled from None
        while isinstance(failures, BaseExceptionGroup):
            failures = failures.exceptions[0]
        return failures
    return None
