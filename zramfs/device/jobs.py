# SPDX-License-Identifier: Apache-2.0
"""The long work of a device (recompression, write-back, idle marks), which `reset` and the end of the
device cut short."""
from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from zramfs.errors import ZramfsError


class Jobs:
    """Work that runs inside job() is cancelled at its next checkpoint when somebody cuts it; what it did
    until then must be complete, and its own clean-up must need no checkpoint, or be shielded."""

    def __init__(self) -> None:
        self._scopes: set[trio.CancelScope] = set()
        self._reasons: list[str] = []

    @contextmanager
    def job(self, what: str) -> Iterator[None]:
        """Raises ZramfsError(EINTR) if the work is cut short, or may not begin."""
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            if self._reasons:
                scope.cancel()
            try:
                yield
            finally:
                self._scopes.discard(scope)
        if scope.cancelled_caught:
            reason = self._reasons[0] if self._reasons else "somebody"
            raise ZramfsError(errno.EINTR, f"{what} was cut short by {reason}; what it had done stays")

    def resume(self) -> None:
        """As Device.resume(). What was cut short for a reason that has its own end, as a reset, is over with
        it."""
        self._scopes.clear()
        self._reasons.clear()

    def cut(self, reason: str) -> None:
        """Ends all jobs, and lets none begin until allow(reason)."""
        self._reasons.append(reason)
        for scope in self._scopes:
            scope.cancel()

    def allow(self, reason: str) -> None:
        self._reasons.remove(reason)
