# SPDX-License-Identifier: Apache-2.0
"""Calls that may never return: reads and writes below a FUSE mount whose server may hang.

A thread cannot be given up, a process can. Not even SIGKILL ends a process inside a request that
the server has read and not answered; so a child that is late is killed and never waited for.
Only for a process of one thread (the command line), because the child goes on after fork.
"""
from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

from zramfs.errors import ZramfsError

# A server that lives answers in well under a millisecond; a stopped or stuck one never does.
ANSWER_TIMEOUT = 2.0
_SLICE = 0.1  # seconds of a wait, after which this process knows how late it is itself
_LEAST = 0.02  # seconds for an answer that was waited for behind others


class Patience:
    """Seconds to wait for others. What this process itself is late does not count: a machine that stands
    still, or has too much to do, holds up those as well that are to answer."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def wait(self, fds: Sequence[int]) -> list[int]:
        """Those that are readable; none when the time is up."""
        while True:
            began = time.monotonic()
            asked = min(max(self._end - began, 0.0), _SLICE)
            if readable := select.select(fds, [], [], asked)[0]:
                return readable
            if asked < _SLICE:
                return []
            self._end += max(0.0, time.monotonic() - began - asked)


class Call:
    """`action` running in a child. Its result must be JSON; its OSError is raised again here."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self._fd, write_end = os.pipe()
        # A signal at the wrong moment would run the caller's handlers in the child too.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self._pid = os.fork()
        if self._pid == 0:
            # Ctrl-C and Ctrl-Z are for the caller.
            os.setpgid(0, 0)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            _serve(action, write_end)
        os.close(write_end)
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # what came meanwhile may raise here
        except BaseException:
            self._kill()
            os.close(self._fd)
            raise

    def _kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, os.WNOHANG)

    def fileno(self) -> int:
        """Readable when result() has something to wait no longer for."""
        return self._fd

    def abandon(self) -> None:
        """Instead of result(), for an answer that nobody wants any more."""
        with contextlib.suppress(TimeoutError):
            self.result(time.monotonic())

    def result(self, deadline: float | None = None) -> Any:
        """Waits until `deadline` (time.monotonic), as Patience does; then TimeoutError. Call once."""
        chunks = []
        patience = None if deadline is None else Patience(max(deadline - time.monotonic(), _LEAST))
        try:
            while True:
                if patience and not patience.wait([self._fd]):
                    raise TimeoutError(errno.ETIMEDOUT, "no answer in time")
                if not (chunk := os.read(self._fd, 65536)):
                    break
                chunks.append(chunk)
        except BaseException:
            self._kill()
            raise
        finally:
            os.close(self._fd)
        _, status = os.waitpid(self._pid, 0)
        if not chunks:
            raise ZramfsError(errno.EIO, f"a helper process ended with status {status} and without a result")
        answer = json.loads(b"".join(chunks))
        if "errno" in answer:
            raise OSError(answer["errno"], answer["strerror"], answer["filename"])
        return answer["result"]


def call(action: Callable[[], Any], timeout: float | None) -> Any:
    """What `action` returns, within `timeout` seconds. TimeoutError, or its OSError."""
    return Call(action).result(None if timeout is None else time.monotonic() + timeout)


def _serve(action: Callable[[], Any], write_end: int) -> None:
    status = 1
    try:
        try:
            answer = {"result": action()}
        except OSError as error:
            name = None if error.filename is None else str(error.filename)
            answer = {"errno": error.errno, "strerror": error.strerror, "filename": name}
        with os.fdopen(write_end, "w", encoding="utf-8") as out:
            json.dump(answer, out)
        status = 0
    finally:
        # Never back into the caller's stack: this is a copy of it.
        os._exit(status)


