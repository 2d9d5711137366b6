# SPDX-License-Identifier: Apache-2.0
"""What `zramfs upgrade` has to say to a daemon: a socket in the run directory, for one order at a time.

An order is a packet with JSON: {"program": PATH, "command": [WORD...]}, a keeper and how it starts a daemon.
The answer is {"error": SENTENCE}, and the device goes on as before; or {"standby": PID}, and the end of the
connection when the daemon has ended.

A file of the tree would not do: `control` may belong to a group, and an order names a program.
"""
from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import signal
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import trio

from zramfs.errors import ZramfsError

log = logging.getLogger(__package__)

NAME = "orders"  # of the socket
ORDER_TIMEOUT = 10.0  # seconds for an order, once somebody is connected
MOST = 64 << 10  # bytes of an order; a command has the paths of Python in it, about 1 KiB
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
Upgrade = Callable[[Path, list[str]], Awaitable[int]]


@contextlib.contextmanager
def address(rundir: Path) -> Iterator[str]:
    """Of the socket. The name of a run directory may be longer than an address."""
    fd = os.open(rundir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{NAME}"
    finally:
        os.close(fd)


async def take_orders(rundir: Path, upgrade: Upgrade, let_go: Callable[[], None]) -> None:
    """The task. May be started again after any exception.

    upgrade: given the words of an order, returns the pid of a process that is ready to take over, or raises
    ZramfsError. let_go: called when that has been answered, to end this process.
    """
    with contextlib.suppress(FileNotFoundError):
        (rundir / NAME).unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    os.fchmod(listener.fileno(), 0o600)  # of the file that bind() makes
    with address(rundir) as place:
        listener.bind(place)
    listener.listen(8)
    with trio.socket.from_stdlib_socket(listener) as orders:
        while True:
            other, _ = await orders.accept()
            with other:
                await _take_order(other, upgrade, let_go)


async def _take_order(
    other: trio.socket.SocketType, upgrade: Upgrade, let_go: Callable[[], None]
) -> None:
    try:
        _expect_owner(other)
        program, command = await _read_order(other)
        log.warning("an upgrade is ordered, to %s", program)
        standby = await upgrade(program, command)
    except ZramfsError as error:
        log.error("not upgraded: %s", error)
        with contextlib.suppress(OSError):
            await other.send(json.dumps({"error": str(error)}).encode())
        return
    # Whoever has ordered it may be gone.
    with contextlib.suppress(OSError):
        await other.send(json.dumps({"standby": standby}).encode())
    let_go()


def _expect_owner(other: trio.socket.SocketType) -> None:
    credentials = other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(credentials)
    if uid not in (0, os.geteuid()):
        raise ZramfsError(
            errno.EPERM, f"expected an order of uid {os.geteuid()} or of root, got one of uid {uid}")


async def _read_order(other: trio.socket.SocketType) -> tuple[Path, list[str]]:
    try:
        with trio.fail_after(ORDER_TIMEOUT):
            found: Any = json.loads(await other.recv(MOST))
        program, command = found["program"], found["command"]
        if not all(isinstance(word, str) and "\0" not in word for word in (program, *command)):
            raise TypeError("words")
    except (trio.TooSlowError, OSError, ValueError, TypeError, KeyError, RecursionError):
        raise ZramfsError(
            errno.EINVAL, "expected an order with a program and a command, as `zramfs upgrade` sends it"
        ) from None
    return Path(program), command


def end_process() -> NoReturn:
    """As by anybody's SIGKILL, which the keeper answers with the next daemon, and blames no request for."""
    while True:
        os.kill(os.getpid(), signal.SIGKILL)
