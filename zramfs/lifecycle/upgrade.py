# SPDX-License-Identifier: Apache-2.0
"""Another version of zramfs under a device that is in use: that of whoever calls this.

    1  what the daemon writes (state.json) is compared with what this version reads; its keeper and its Python
       files are run once, apart from any device
    2  the daemon has its keeper become this version's, in the same process, and that starts a standby
    3  when the standby is ready the daemon ends, and the keeper has the standby take over
    4  if that ends before it serves, or by its own fault within a minute, the keeper becomes the old one
       again, and starts a daemon of the old version

Up to the third step a failure leaves the daemon as it is. The third is that of any daemon that is killed.
"""
from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zramfs import __version__
from zramfs.errors import ZramfsError
from zramfs.host import bounded

from .rundir import Rundir, State
from .serve import successor_command, trial_command
from .stop import is_elsewhere

PATIENCE = 300.0  # seconds for another upgrade of the same device
TRIAL_TIMEOUT = 120.0  # seconds to load all of a daemon; it takes half a second
# Seconds for the daemon's answer: more than it waits for its keeper (20), a standby (120), the way back (20).
ORDER_TIMEOUT = 180.0
CONNECT_TIMEOUT = 20.0  # seconds for a daemon to take orders; it does so within 0.1 s on an idle machine
# Seconds for the first answer of the next daemon. One that hangs is ended after 120, and then one of the old
# version starts. Five of these may die within a minute before the device is given up.
LANE_TIMEOUT = 300.0
TREE_TIMEOUT = 20.0  # seconds for its tree, which is there a second after the lane
_PAUSE = 0.02  # seconds between two looks at what has changed
_USAGE = 2  # status of a keeper without words


@dataclass(frozen=True)
class Served:
    """Who serves a device. release: of zramfs."""

    release: str
    pid: int

    @classmethod
    def of(cls, state: State) -> Served:
        return cls(state.release or "an older version", state.pid)

    def __str__(self) -> str:
        return f"{self.release} (pid {self.pid})"


@dataclass(frozen=True)
class Upgraded:
    """pause: seconds during which no request was answered. has_tree: its files answer again."""

    before: Served
    after: Served
    pause: float
    has_tree: bool


def expect_startable() -> None:
    """Once for all devices. Raises ZramfsError if no daemon or no keeper of this version would start."""
    from zramfs.daemon.keeper_line import PROGRAM, expect_program

    expect_program()
    for words, status in (([os.fspath(PROGRAM)], _USAGE), (trial_command(), 0)):
        try:
            done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False,
                                  stdin=subprocess.DEVNULL, timeout=TRIAL_TIMEOUT)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ZramfsError(errno.ENOEXEC, f"this version of zramfs does not start: {error}") from None
        if done.returncode != status:
            said = (done.stderr.strip().splitlines() or [f"{words[0]} ended with {done.returncode}"])[-1]
            raise ZramfsError(errno.ENOEXEC, f"this version of zramfs does not start: {said}")


def upgrade_device(old: Rundir) -> Upgraded:
    """Returns when the next daemon serves. To be called after expect_startable(). Raises ZramfsError: ENODEV
    for a device that is dead, EBUSY for one that starts, is resized or ends, EOPNOTSUPP where this version or
    this kernel can't take it over; EIO where a daemon of the old version has had to take over again; and what
    the daemon has answered."""
    with old.changing(PATIENCE):
        state = _expect_able(old)
        ordered = _order(old, state)
        lane = bounded.Call(lambda: os.statvfs(old.disk) and time.monotonic())
        try:
            answered = float(lane.result(time.monotonic() + LANE_TIMEOUT))
        except OSError as error:
            raise ZramfsError(
                errno.EIO, f"no other daemon has taken over from process {state.pid} ({error.strerror}); "
                f"{old.log} says why") from None
        after = _wait_for_other(old, state)
        if after.release != __version__:
            raise ZramfsError(
                errno.EIO, f"{__version__} took over from process {state.pid}, and did not hold; "
                f"{Served.of(after)} serves again, with the same data; {old.log} says why")
        return Upgraded(Served.of(state), Served.of(after), answered - ordered, _wait_for_tree(after))


def _expect_able(old: Rundir) -> State:
    """Without touching it. Raises ZramfsError."""
    from zramfs.daemon.layouts import refusal

    state = old.read()
    if state is None or state.phase == "failed" or not state.alive():
        where = state.where if state else old.name
        raise ZramfsError(
            errno.ENODEV, f"its daemon is dead, and its data with it; `zramfs stop {where}` cleans up")
    if state.phase != "ready":
        raise ZramfsError(errno.EBUSY, "it is just being started: try again when it is ready")
    if is_elsewhere(state.pid):
        raise ZramfsError(
            errno.EXDEV, f"it is in another mount namespace: run this there (nsenter --target {state.pid} "
            "--mount)")
    if not state.layouts:
        raise ZramfsError(
            errno.EOPNOTSUPP, "its daemon is of a version that can't be replaced while it serves, or its "
            f"state.json is lost; it goes on, and `zramfs stop {state.where}` ends it")
    if reason := refusal(state.layouts):
        raise ZramfsError(
            errno.EOPNOTSUPP,
            f"{__version__} can't take over from {Served.of(state)}, which goes on: {reason}")
    return state


def _order(old: Rundir, state: State) -> float:
    """Returns when the daemon has ended for its successor: when that began, on the monotonic clock. Raises
    ZramfsError."""
    from zramfs.daemon.keeper_line import PROGRAM
    from zramfs.daemon.orders import address

    order = json.dumps({"program": os.fspath(PROGRAM), "command": successor_command(old)})
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        try:
            with address(old.path) as place:
                _connect(sock, place)
            sock.settimeout(ORDER_TIMEOUT)
            sock.send(order.encode())
            answer: dict[str, Any] = json.loads(sock.recv(1 << 16) or b"{}")
            now = time.monotonic()
        except TimeoutError:
            raise ZramfsError(
                errno.ETIMEDOUT, f"its daemon, process {state.pid}, has not answered for {ORDER_TIMEOUT:g} s"
            ) from None
        except (ConnectionResetError, BrokenPipeError):
            answer = {}
        except OSError as error:
            raise ZramfsError(
                error.errno or errno.EIO,
                f"its daemon, process {state.pid}, takes no orders: {error.strerror}") from None
        if "standby" in answer:
            _wait_for_end(sock, state)
            return now
    died = f"its daemon, process {state.pid}, has died before it was replaced: try again"
    raise ZramfsError(errno.EIO, answer.get("error", died))


def _connect(sock: socket.socket, place: str) -> None:
    """Raises OSError. A daemon that has just taken over makes its socket a moment later."""
    end = time.monotonic() + CONNECT_TIMEOUT
    while True:
        try:
            return sock.connect(place)
        except (ConnectionRefusedError, FileNotFoundError):
            if time.monotonic() >= end:
                raise
        time.sleep(_PAUSE)


def _wait_for_end(sock: socket.socket, state: State) -> None:
    """Its last thread closes the connection: from then on only another daemon answers."""
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    except OSError as error:
        raise ZramfsError(
            errno.EIO, f"its daemon, process {state.pid}, has not ended: {error.strerror or error}") from None


def _wait_for_other(old: Rundir, before: State) -> State:
    """The state as the next daemon has written it. Raises ZramfsError."""
    end = time.monotonic() + LANE_TIMEOUT
    while time.monotonic() < end:
        state = old.read_file()
        if state is None:
            break
        if state.said_by != before.said_by:
            return state
        time.sleep(_PAUSE)
    raise ZramfsError(errno.EIO, f"another daemon has taken over, and then ended; {old.log} says why")


def _wait_for_tree(state: State) -> bool:
    end = time.monotonic() + TREE_TIMEOUT
    while time.monotonic() < end:
        try:
            bounded.call(lambda: os.stat(Path(state.directory) / "control") and None, bounded.ANSWER_TIMEOUT)
            return True
        except OSError:
            time.sleep(_PAUSE)
    return False
