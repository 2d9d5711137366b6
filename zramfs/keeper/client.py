# SPDX-License-Identifier: Apache-2.0
"""A daemon's line to its keeper (keeper.c), and the place of a process that is to take over.

The two speak in packets of eight bytes with descriptors beside them (messages.h). What a daemon has sent
before it is killed is still read, so none of it needs an answer.
"""
from __future__ import annotations

import contextlib
import errno
import gc
import os
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from zramfs.errors import ZramfsError

PROGRAM = Path(__file__).with_name("zramfs-keeper")
SUCCESSOR_FD = 3  # where a process that the keeper has started finds its end of the line
HANG_MS = 30_000  # a request in hand for longer ends the daemon
SURVIVES, WANTS_STANDBY = 1, 2  # bits of serving()
# What a keeper tells a daemon, beside None, its end: hear().
STANDBY, GREETING, NOT_UPGRADED = 4, 5, 6
_KEEP, _SERVING, _ENDING, _STANDBY, _HELLO, _UPGRADE, _WAY_BACK = range(1, 8)
MESSAGES_VERSION = 1  # of these, of the keeper's words, and of what it reads of kept_page.h
_MESSAGE = struct.Struct("=Ii")
_MOST_FDS = 9
# Seconds between looks of a process that waits: before the first one, when its predecessor serves, and before
# each other.
LOOK_PAUSES = (1.0, 10.0)
HELLO_TIMEOUT = 30.0  # seconds; the keeper is there in a few milliseconds, where the machine goes on


class Keeper:
    """pid: of the keeper. standby_pid: of the process that waits to take over, 0 = there is none."""

    def __init__(self, sock: socket.socket, pid: int) -> None:
        self._sock = sock
        self.pid = pid
        self.standby_pid = 0

    @classmethod
    def fork(cls, rundir: Path, command: Sequence[str], hang_ms: int = HANG_MS) -> Keeper:
        """Forks: the caller's process becomes the keeper, and this returns in its child, the daemon. To be
        called while the process has one thread. Raises ZramfsError, in the child if the keeper can't be
        started."""
        expect_program()
        ours, theirs = _pair()
        parent = os.getpid()
        pid = os.fork()
        if pid:
            os.set_inheritable(theirs.fileno(), True)
            try:
                os.execv(PROGRAM, _words(theirs, pid, rundir, command, hang_ms))
            finally:
                os._exit(127)
        theirs.close()
        return cls._met(ours, parent)

    @classmethod
    def start(cls, rundir: Path, command: Sequence[str], hang_ms: int = HANG_MS) -> Keeper:
        """A keeper in another process, for the daemon that calls this, in place of one that has died. Raises
        OSError."""
        expect_program()
        ours, theirs = _pair()
        with theirs:
            words = _words(theirs, os.getpid(), rundir, command, hang_ms)
            # Its end is nobody's business but ours, and we see it by the socket.
            process = subprocess.Popen(words, pass_fds=[theirs.fileno()], start_new_session=True)
        process.returncode = 0  # no warning that it still runs
        return cls._met(ours, process.pid)

    @classmethod
    def _met(cls, sock: socket.socket, pid: int) -> Keeper:
        keeper = cls(sock, pid)
        if not select.select([sock], [], [], HELLO_TIMEOUT)[0] or (told := keeper.hear()) is None:
            raise ZramfsError(errno.EIO, f"{PROGRAM} did not start: expected its greeting, got none")
        assert told == (_HELLO, pid)
        return keeper

    def fileno(self) -> int:
        """Readable when hear() has something to say."""
        return self._sock.fileno()

    def hear(self) -> tuple[int, int] | None:
        """One message of the keeper; None if it is gone. Does not wait."""
        try:
            told, fds = _receive(self._sock, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return (0, 0)
        for fd in fds:
            os.close(fd)
        if told is not None and told[0] == _STANDBY:
            self.standby_pid = told[1]
        return told

    def keep(self, fds: Sequence[int]) -> None:
        """What a successor gets, in this order: the connection, its page (kept_page.h), and more."""
        self._send(_KEEP, len(fds), fds)

    def serving(self, *, survives: bool, standby: bool) -> None:
        """survives: another daemon could take over from here on."""
        self._send(_SERVING, SURVIVES * survives | WANTS_STANDBY * standby)

    def ending(self) -> None:
        """Nobody is to take over, and no descriptor is kept any more."""
        self._send(_ENDING, 0)

    def upgrade(
        self, program: Path, command: Sequence[str], back: tuple[Path, Sequence[str]] | None = None
    ) -> None:
        """It is to become the keeper `program` with this command, in the same process and with all that it
        keeps. hear() tells GREETING then, or NOT_UPGRADED and an errno. back: the program and the command of
        this version, to which it returns when the daemon of the other one does not hold."""
        self._send_words(_WAY_BACK, back)
        self._send_words(_UPGRADE, (program, command))

    def forget_way_back(self) -> None:
        """It does not return to the version before."""
        self._send_words(_WAY_BACK, None)

    def _send_words(self, what: int, words: tuple[Path, Sequence[str]] | None) -> None:
        if words is None:
            self._send(what, 0)
            return
        fd = os.memfd_create("zramfs-words")
        try:
            os.write(fd, b"".join(os.fsencode(word) + b"\0" for word in (os.fspath(words[0]), *words[1])))
            self._send(what, 0, [fd])
        finally:
            os.close(fd)

    def register(self, pid: int, sock: socket.socket) -> None:
        """Process `pid` waits as Place(sock's other end)."""
        self._send(_STANDBY, pid, [sock.fileno()])

    def close(self) -> None:
        self._sock.close()

    def detach(self) -> None:
        """Its descriptor is closed already."""
        self._sock.detach()

    def _send(self, what: int, value: int, fds: Sequence[int] = ()) -> None:
        """A keeper that is gone is told by fileno()."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self._sock, [_MESSAGE.pack(what, value)], fds)


class Place:
    """The place of a process that is to take over, at once or later."""

    def __init__(self, sock: socket.socket, keeper_pid: int) -> None:
        self._sock = sock
        self._fds: list[int] = []  # the kept ones, and behind them the one that says whose turn it is
        self._keeper_pid = keeper_pid

    @classmethod
    def of_keeper(cls) -> Place:
        """Of a process that the keeper has started."""
        os.set_inheritable(SUCCESSOR_FD, False)
        settle_objects()  # here, and not in the pause
        return cls(socket.socket(fileno=SUCCESSOR_FD), os.getppid())

    def wait_turn(
        self, prepare: Callable[[list[int]], None] = lambda kept: None,
        look: Callable[[list[int]], None] = lambda kept: None,
    ) -> tuple[list[int], Keeper] | None:
        """What was kept, and the line to the keeper, once the predecessor is gone; None if the keeper is gone
        instead: see orphaned(). prepare: called once, with what is kept until then; afterwards the process
        counts as a standby. look: called with it every LOOK_PAUSES seconds. Nothing is kept for a standby of
        the version before an upgrade."""
        is_prepared = False
        pauses = iter(LOOK_PAUSES)
        pause: float | None = None  # until it is a standby: there is nothing to look at
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        turn = -1
        while True:
            ready = dict(poll.poll(pause and pause * 1000))
            if not ready:
                pause = next(pauses, pause)
                look(self._fds[:-1])
            # First: what is kept may have changed just before.
            if self._sock.fileno() in ready:
                told, fds = _receive(self._sock)
                if told is None:
                    return None
                if told[0] == _KEEP:
                    if turn >= 0:
                        poll.unregister(turn)
                    for fd in self._fds:
                        os.close(fd)
                    self._fds, turn = fds, fds[-1]
                    if not is_prepared:
                        prepare(self._fds[:-1])
                        is_prepared = True
                        pause = next(pauses)
                        with contextlib.suppress(OSError):
                            self._sock.send(_MESSAGE.pack(_STANDBY, 0))
                    poll.register(turn, select.POLLIN)
            elif turn in ready:
                os.close(self._fds.pop())
                return self._fds, Keeper(self._sock, self._keeper_pid)

    def fork_spare(self) -> Place | Spare:
        """Forks a process that is to be the next standby once this one has taken over. Returns its place in
        there, and it here. It shares all memory with this one until either writes to it. To be called while
        the process has one thread. Raises OSError."""
        return _fork_place(self._keeper_pid, lambda: self._sock.detach())

    def orphaned(self) -> tuple[list[int], Keeper]:
        """As wait_turn(), after that has returned None and nobody else is left to take over: what was kept,
        none if the keeper died too early for that, and the line to a keeper that is gone."""
        return self._fds[:-1], Keeper(self._sock, self._keeper_pid)


class Spare:
    """A process that waits in a Place, and of which the keeper does not know yet. It ends with this one."""

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self._pid = pid
        self._sock = sock

    def register(self, keeper: Keeper) -> bool:
        """Makes it the standby. False, and nothing has changed, if it has ended: its pid may be another
        process's."""
        with self._sock as sock:
            if select.select([sock], [], [], 0)[0]:  # it says nothing before it is told something
                return False
            keeper.register(self._pid, sock)
            keeper.standby_pid = self._pid
            return True


def fork_standby(keeper: Keeper) -> Place | None:
    """Forks a process that shares all memory with this one until either writes to it. Returns its place in
    there, and None here. The keeper is its parent. To be called while the process has one thread."""
    forked = _fork_place(keeper.pid, keeper.detach)
    if isinstance(forked, Place):
        return forked
    forked.register(keeper)
    return None


def _fork_place(keeper_pid: int, detach: Callable[[], object]) -> Place | Spare:
    """detach: called in the new process, where the descriptors of the old one are closed."""
    settle_objects()
    ours, theirs = _pair()
    read_end, write_end = os.pipe()
    middle = os.fork()
    if middle == 0:
        pid = 0
        try:
            os.close(read_end)
            pid = os.fork()
            if pid:
                os.write(write_end, struct.pack("=i", pid))
        finally:
            if pid or sys.exc_info()[1]:  # the caller may have been killed meanwhile
                os._exit(0)
        # Locks and pipes of the parent must not outlive it in here.
        os.closerange(3, theirs.fileno())
        os.closerange(theirs.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        ours.detach()
        detach()
        return Place(theirs, keeper_pid)
    os.close(write_end)
    theirs.close()
    os.waitpid(middle, 0)
    (pid,) = struct.unpack("=i", os.read(read_end, 4))
    os.close(read_end)
    return Spare(pid, ours)


def settle_objects() -> None:
    """The collector writes to each object that it looks at: pages that a fork has shared would be there
    twice. It looks at none of these any more."""
    gc.collect()
    gc.freeze()


def expect_program() -> None:
    """Raises ZramfsError(ENOEXEC) for an installation without the keeper."""
    if not os.access(PROGRAM, os.X_OK):
        raise ZramfsError(
            errno.ENOEXEC, f"expected the program {PROGRAM}, which keeps a device when its daemon dies, and "
            "it cannot be run: install zramfs anew (in a checkout: scripts/setup)")


def _pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _words(
    sock: socket.socket, pid: int, rundir: Path, command: Sequence[str], hang_ms: int
) -> list[str]:
    return [str(PROGRAM), str(sock.fileno()), str(pid), str(rundir), str(hang_ms), *command]


def _receive(sock: socket.socket, flags: int = 0) -> tuple[tuple[int, int] | None, list[int]]:
    """A message with its descriptors; None for it when the other end is gone."""
    room = socket.CMSG_SPACE(_MOST_FDS * struct.calcsize("i"))
    try:
        text, control, _, _ = sock.recvmsg(_MESSAGE.size, room, flags | socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        return None, []
    fds = [fd for level, kind, data in control if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
           for (fd,) in struct.iter_unpack("i", data[:len(data) - len(data) % 4])]
    return (_MESSAGE.unpack(text) if len(text) == _MESSAGE.size else None), fds
