# SPDX-License-Identifier: Apache-2.0
"""The signals that ask a daemon to end, taken by a thread of their own.

A handler in Python runs in the middle of whatever the main thread does. Where memory is short it fails
there, and takes trio's loop with it. A thread that waits for blocked signals disturbs nothing, and needs
no memory: it has been there since the start.
"""
from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from zramfs.host.readable import wait_until_readable


class StopSignals:
    """To be entered in the main thread, before others are begun; the signals are blocked inside, also for the
    programs that are started, which are short. start(): they are taken from then on, also those that have
    come before. Its thread needs a moment of CPU time, which a daemon that takes over does not wait for."""

    def __init__(self, *numbers: signal.Signals) -> None:
        self._numbers = frozenset(numbers)
        self._pending = dict.fromkeys(self._numbers, False)
        self._wake_fd = -1
        self._thread: threading.Thread | None = None
        self._over = False

    @contextlib.contextmanager
    def taken(self) -> Iterator[StopSignals]:
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)
        # A thread that a library began before takes signals too; by default one would end the process.
        handlers = {number: signal.signal(number, self._note) for number in self._numbers}
        try:
            yield self
        finally:
            self._over = True
            if self._thread is not None:
                signal.pthread_kill(self._thread.ident or 0, min(self._numbers))
                self._thread.join()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(self._wake_fd)

    def start(self) -> None:
        """In the main thread. Without effect the second time."""
        if self._thread is not None:
            return
        # The thread itself is to take no other signal, from its first moment on.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            thread = threading.Thread(target=self._take, name="signals", daemon=True)
            thread.start()
            self._thread = thread
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _take(self) -> None:
        while not self._over:
            with contextlib.suppress(Exception):
                number = signal.sigwait(self._numbers)
                if not self._over:
                    self._note(number)

    def _note(self, number: int, _frame: object = None) -> None:
        self._pending[signal.Signals(number)] = True
        os.eventfd_write(self._wake_fd, 1)

    async def next_signal(self) -> signal.Signals:
        """Waits for one; several of a kind that come together are one."""
        while True:
            for number, is_pending in self._pending.items():
                if is_pending:
                    self._pending[number] = False
                    return number
            await wait_until_readable(self._wake_fd)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
