# SPDX-License-Identifier: Apache-2.0
"""Starts a daemon that outlives the command, and learns from it whether it is ready."""
from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from zramfs.errors import ZramfsError
from zramfs.host import process

# Long enough for a machine that pages the interpreter in from a slow disk.
READY_TIMEOUT = 60.0
END_TIMEOUT = 10.0  # seconds; what has told its failure ends within milliseconds, where the machine goes on
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(
    body: Callable[[Callable[[], None]], int], log: Path, timeout: float = READY_TIMEOUT
) -> None:
    """Runs body(on_ready) in a daemon; returns when that calls on_ready.

    To be called while this process has one thread. The daemon has a session of its own, / as its
    directory, /dev/null as its input and `log` as its output, and no other descriptor of ours.
    Raises what body raises before it is ready, as ZramfsError with the same errno and sentence, when the
    processes of the daemon have ended. ETIMEDOUT when nothing came for `timeout` seconds (the daemon may
    still be there).
    """
    read_end, write_end = os.pipe()
    if sys.stdout is not None:
        sys.stdout.flush()  # or the daemon would write the caller's text once more, into its log
    # What a signal raises inside Python's own hooks around fork is printed and lost.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        _middle(body, log, write_end)
    try:
        os.close(write_end)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.waitpid(pid, 0)
        try:
            _expect_ready(read_end, log, timeout)
        except ZramfsError as error:
            if error.errno != errno.ETIMEDOUT:
                _wait_gone(pid)
            raise
    finally:
        os.close(read_end)


def _expect_ready(read_end: int, log: Path, timeout: float) -> None:
    text, end = b"", time.monotonic() + timeout
    while not text.endswith(b"\n"):
        if not select.select([read_end], [], [], max(0.0, end - time.monotonic()))[0]:
            raise ZramfsError(errno.ETIMEDOUT, f"the daemon was not ready within {timeout:g} s")
        chunk = os.read(read_end, 65536)
        if not chunk:
            raise ZramfsError(errno.EIO, "the daemon ended before it was ready" + _tail(log))
        text += chunk
    answer = json.loads(text)
    if "sentence" in answer:
        raise ZramfsError(answer["errno"], answer["sentence"])


def _wait_gone(group: int) -> None:
    """Until all processes of the daemon have ended, which have its log open and so hold the file system
    of the log."""
    end = time.monotonic() + END_TIMEOUT
    while process.is_group_alive(group) and time.monotonic() < end:
        time.sleep(0.002)


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
    except OSError:
        lines = []
    return ("; the end of its log:\n" + "\n".join(lines)) if lines else ", and its log is empty"


def _middle(body: Callable[[Callable[[], None]], int], log: Path, write_end: int) -> NoReturn:
    """The child: leads a new session, whose second generation can never get a terminal again."""
    try:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        os.setsid()
        if os.fork() == 0:
            _daemon(body, log, write_end)
    finally:
        os._exit(0)


def _daemon(body: Callable[[Callable[[], None]], int], log: Path, write_end: int) -> NoReturn:
    def tell(**answer: object) -> None:
        nonlocal write_end
        if write_end >= 0:
            os.write(write_end, json.dumps(answer).encode() + b"\n")
            os.close(write_end)
            write_end = -1

    status = 1
    try:
        os.chdir("/")
        os.umask(0o022)
        try:
            write_end = _redirect(log, write_end)
        except OSError as error:  # there is no log for a trace, and its caller's terminal is no place for one
            tell(errno=error.errno or errno.EIO, sentence=f"cannot write the log {log}: {error.strerror}")
        else:
            status = body(tell)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        # Before the trace, for which there may be no room.
        tell(errno=error.errno or errno.EIO, sentence=f"{where}{error.strerror or error}")
        traceback.print_exc()
    except BaseException:
        tell(errno=errno.EIO, sentence=f"the daemon failed:\n{traceback.format_exc().rstrip()}")
        traceback.print_exc()
    finally:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _redirect(log: Path, write_end: int) -> int:
    """Standard descriptors, and the pipe as 3; everything else is closed: a caller that waits for the
    end of a pipe of its own (a shell's $(...), a test) must not wait for the daemon."""
    null = os.open(os.devnull, os.O_RDONLY)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    # Out of the way first: any of 0 to 3 may be one of these, if the caller had closed it.
    null, out, pipe = (fcntl.fcntl(fd, fcntl.F_DUPFD, 4) for fd in (null, out, write_end))
    for source, target in ((null, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    os.dup2(pipe, 3, inheritable=False)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    # The caller's may be closed, or stand on a descriptor that is closed now.
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    return 3
