# SPDX-License-Identifier: Apache-2.0
"""Questions to a device that may hang, and whose daemon may be dead.

Each is asked by a child process (see host/bounded.py). A child never outlives the command: one that is
left behind in a write would keep the device in use, and `zramfs stop` would refuse.
"""
from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from zramfs.errors import ZramfsError
from zramfs.host import bounded
from zramfs.lifecycle import rundir

from .output import leave

_PR_SET_PDEATHSIG = 1
# A tree that is still mounted, but whose daemon is gone, answers these.
_DEAD = (errno.ENOTCONN, errno.ECONNABORTED)
_PATIENCE = 1.0  # seconds


def ask_device(directory: Path, action: Callable[[], Any], timeout: float | None) -> Any:
    """What `action` answers, run in a child: JSON. timeout: seconds, None to wait as long as it takes.

    Raises ZramfsError: ETIMEDOUT, and ENOTCONN with what to do if the daemon is dead; OSError of `action`;
    SystemExit on SIGTERM and SIGHUP.
    """
    caller = os.getpid()

    def act() -> Any:
        _end_with(caller)
        return action()

    with _signals_as_exit():
        try:
            return bounded.call(act, timeout)
        except TimeoutError:
            raise ZramfsError(
                errno.ETIMEDOUT, f"{directory} has not answered for {timeout:g} s; if its daemon is stopped, "
                "`kill -CONT` lets it go on, and its log says what it does") from None
        except OSError as error:
            if error.errno in _DEAD or (error.errno == errno.ENOENT and _is_dead(directory)):
                raise ZramfsError(errno.ENOTCONN, dead_sentence(directory)) from None
            raise


def dead_sentence(directory: Path) -> str:
    """What became of the device, and what to do."""
    found = rundir.find(str(directory))
    state = found.read() if found else None
    place = state.where if state else directory
    # It may have died since it was read. A keeper that has given up goes within the patience.
    if found is not None and state is not None and (state.alive() or found.is_served(_PATIENCE)):
        return (f"{place}: the daemon died before it answered, and another process takes over with the data; "
                "what it was told may not be done, so look, and say it again")
    return f"{place}: the daemon is dead, and its data is lost; `zramfs stop {place}` cleans up"


def _is_dead(directory: Path) -> bool:
    found = rundir.find(str(directory))
    state = found.read() if found else None
    return state is not None and not state.alive()


def _end_with(caller: int) -> None:
    """Has the kernel kill this process when `caller` ends, also by SIGKILL."""
    import ctypes  # takes 5 ms, and only the child needs it

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != caller:
        os._exit(1)


@contextlib.contextmanager
def _signals_as_exit() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit meanwhile, so that the child is killed on the way out. What is
    ignored (nohup) stays ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    ours = [number for number, handler in before.items() if handler == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
