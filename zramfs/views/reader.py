# SPDX-License-Identifier: Apache-2.0
"""Reads the file `metrics` of devices, any of which may hang.

At most one read of a device is under way. If the device hangs, that same read is waited for until it comes
back, because nothing can end it (see bounded.py).
"""
from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path

from zramfs.host import bounded


class Reader:
    """One device, by the directory of its tree."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._call: bounded.Call | None = None
        self._asked = 0.0

    @property
    def path(self) -> Path:
        return self.directory / "metrics"

    @property
    def waited(self) -> float:
        """Seconds since the read that is under way began."""
        return time.monotonic() - self._asked

    def ask(self) -> bounded.Call:
        """Begins a read, unless one is under way."""
        if self._call is None:
            path = self.path
            self._call = bounded.Call(lambda: path.read_text(encoding="utf-8"))
            self._asked = time.monotonic()
        return self._call

    def take(self) -> str:
        """The answer, which is there. Raises OSError, ZramfsError."""
        assert self._call is not None
        call, self._call = self._call, None
        text = call.result(time.monotonic() + bounded.ANSWER_TIMEOUT)
        assert isinstance(text, str)
        return text

    def close(self) -> None:
        if self._call is not None:
            self._call.abandon()
            self._call = None


def wait_answers(readers: Collection[Reader], patience: float) -> list[Reader]:
    """Asks all of them at once, and waits at most `patience` seconds: those whose answer is there."""
    until = bounded.Patience(patience)
    waiting = {reader.ask().fileno(): reader for reader in readers}
    answered = []
    while waiting and (readable := until.wait(list(waiting))):
        answered += [waiting.pop(fd) for fd in readable]
    return answered
