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
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

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
    """`actions` running in one child, at the same time. Their results must be JSON; their OSErrors are known
    here again."""

    def __init__(self, *actions: Callable[[], Any]) -> None:
        self._number = len(actions)
        self._fd, write_end = os.pipe()
        # A signal at the wrong moment would run the caller's handlers in the child too.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self._pid = os.fork()
        if self._pid == 0:
            # Ctrl-C and Ctrl-Z are for the caller.
            os.setpgid(0, 0)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            _serve(actions, write_end)
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
        """Readable when result() has something to wait no longer for. Of a call with one action."""
        return self._fd

    def abandon(self) -> None:
        """Instead of result(), for an answer that nobody wants any more."""
        self.outcomes(time.monotonic())

    def result(self, deadline: float | None = None) -> Any:
        """Of the only action: what outcomes() returns, or raises if that is an exception. Call once."""
        [outcome] = self.outcomes(deadline)
        if isinstance(outcome, OSError):
            raise outcome
        return outcome

    def outcomes(self, deadline: float | None = None) -> list[Any]:
        """Waits until `deadline` (time.monotonic), as Patience does. Returns for each action its result, its
        OSError, or TimeoutError if it was late. Call once."""
        text, is_late = b"", False
        patience = None if deadline is None else Patience(max(deadline - time.monotonic(), _LEAST))
        try:
            while True:
                if patience and not patience.wait([self._fd]):
                    is_late = True
                    break
                if not (chunk := os.read(self._fd, 65536)):
                    break
                text += chunk
        except BaseException:
            self._kill()
            raise
        finally:
            os.close(self._fd)
        missing: OSError
        if is_late:
            self._kill()
            missing = TimeoutError(errno.ETIMEDOUT, "no answer in time")
        else:
            _, status = os.waitpid(self._pid, 0)
            missing = ZramfsError(
                errno.EIO, f"a helper process ended with status {status} and without a result")
        found: list[Any] = [missing] * self._number
        for line in text.splitlines(keepends=True):
            if line.endswith(b"\n"):
                number, answer = json.loads(line)
                found[number] = answer["result"] if "result" in answer else OSError(*answer["error"])
        return found


def call(action: Callable[[], Any], timeout: float | None) -> Any:
    """What `action` returns, within `timeout` seconds. TimeoutError, or its OSError."""
    return Call(action).result(None if timeout is None else time.monotonic() + timeout)


def _serve(actions: Sequence[Callable[[], Any]], write_end: int) -> NoReturn:
    """The child: the first action here, and each other one in a thread. One line for each that returned."""
    status = 1
    try:
        lock = threading.Lock()
        out = os.fdopen(write_end, "wb")

        def answer(number: int) -> None:
            line = json.dumps([number, _answer_of(actions[number])])
            with lock:
                out.write(line.encode() + b"\n")
                out.flush()

        threads = [threading.Thread(target=answer, args=(number,)) for number in range(1, len(actions))]
        for thread in threads:
            thread.start()
        answer(0)
        for thread in threads:
            thread.join()
        status = 0
    finally:
        # Never back into the caller's stack: this is a copy of it.
        os._exit(status)


def _answer_of(action: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"result": action()}
    except OSError as error:
        name = None if error.filename is None else str(error.filename)
        return {"error": [error.errno, error.strerror, name]}
