# SPDX-License-Identifier: Apache-2.0
"""Run directories: one per device, private to its owner, with what other commands must know about it.

    /run/zramfs/NAME              of root
    $XDG_RUNTIME_DIR/zramfs/NAME  of others, or /tmp/zramfs-UID/NAME when there is none
    $ZRAMFS_RUN_DIR/NAME          of whoever sets that
        disk        regular file the lane is mounted on
        tree        where the tree of a RAM disk or a swap device is mounted
        state.json  see State
        log         what the daemon says
        resize      locked by a change of the device's size, or of its version, that is under way
        orders      socket of the daemon, for `zramfs upgrade`

NAME is the device's directory, escaped as systemd does it, so that two directories never share one.
Every change of the set of devices happens under a lock on the directory that holds the NAMEs.
"""
from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from zramfs.errors import ZramfsError
from zramfs.host import locks, mounts, safe_paths
from zramfs.host.paths import AS_PATH, ROOT_BASE, escape, resolve
from zramfs.host.process import process_start

from .device_state import State, correct, rebuild

_LOCK_TIMEOUT = 30.0
_LOOKS = 5  # at who serves: each needs another death within microseconds
_LAST_LINES = 8  # of the log of a daemon that failed: its reason, and the steps of its end


class Rundir(NamedTuple):
    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def disk(self) -> Path:
        return self.path / "disk"

    @property
    def tree(self) -> Path:
        return self.path / "tree"

    @property
    def log(self) -> Path:
        return self.path / "log"

    def read(self) -> State | None:
        """None when there is no complete state and nobody serves: nobody finished to start here."""
        state, holders = self._look()
        # A daemon that dies while this looks is not the device's end: the next look finds who has it then.
        for _ in range(_LOOKS):
            if state is None or state.phase != "ready" or not holders or state.alive():
                break
            state, holders = self._look()
        return state

    def _look(self) -> tuple[State | None, list[int]]:
        """And who has the run directory locked."""
        state = self.read_file()
        if not self.path.is_dir():
            return state, []
        # The first thread of a killed daemon is dead before the others let go of the lock.
        holders = [pid for pid in locks.holders(self.path) if process_start(pid) is not None]
        return rebuild(self.path, holders) if state is None else correct(state, holders), holders

    def read_file(self) -> State | None:
        """What the daemon has written, whoever serves by now."""
        try:
            text = (self.path / "state.json").read_text(**AS_PATH)
            found = json.loads(text)
            # A daemon of another version may say more, or less. It is alive all the same, and what took it
            # for an unfinished start would drop its data.
            return State(**{name: found[name] for name in State._fields if name in found})
        except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
            return None

    def is_served(self, patience: float = 0.0) -> bool:
        """True while any process holds it, also one of another pid namespace; see keep(). patience: seconds
        for a keeper to end, which outlives its daemon."""
        return locks.is_locked(self.path, patience)

    def write(self, state: State) -> None:
        """Replaces state.json in one step: a reader sees the old or the new one, complete. Raises
        ZramfsError."""
        temporary = self.path / "state.json.new"
        text = json.dumps(state._asdict(), indent=1, ensure_ascii=False) + "\n"
        try:
            with open(temporary, "w", **AS_PATH, opener=_private) as out:
                out.write(text)
            os.replace(temporary, self.path / "state.json")
        except OSError as error:
            raise ZramfsError(
                error.errno or errno.EIO, f"cannot write {temporary}: {error.strerror}") from None

    def update(self, ask: Callable[[], dict[str, Any]] = dict, **changes: Any) -> State:
        """One at a time: the daemon and the command that builds on it both have things to say. ask: says what
        else changes, when the turn has come. What was found out before it may be out of date by then."""
        with self._alone():
            state = self.read()
            if state is None:
                raise ZramfsError(
                    errno.ENOENT, f"{self.path}/state.json is gone: somebody removed the device")
            state = state._replace(**changes, **ask())
            self.write(state)
            return state

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(self.path / "state.lock", flags, 0o600)
        except OSError as error:
            raise ZramfsError(
                error.errno or errno.EIO, f"cannot write {self.path}/state.lock: {error.strerror}") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)  # of this open file: also against another thread
            yield
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def changing(self, patience: float = 0.0) -> Iterator[None]:
        """One command at a time that changes a device in several steps. patience: seconds to wait for another
        one. Raises ZramfsError(EBUSY)."""
        end = time.monotonic() + patience
        fd = os.open(self.path / "resize", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            while not _try_lock(fd):
                if time.monotonic() >= end:
                    raise ZramfsError(
                        errno.EBUSY, "another `zramfs resize` or `zramfs upgrade` is at work on this device")
                time.sleep(0.02)
            yield
        finally:
            os.close(fd)

    def remove(self, *, but: Collection[str] = ()) -> None:
        """Removes the directory and what stands in it, without the files in `but`; nothing may be mounted
        there any more.

        Never a recursive removal: that would reach into a file system still mounted below.
        """
        with contextlib.suppress(FileNotFoundError):
            for name in ("state.json.new", "state.lock", "disk", "log", "orders", "resize", "state.json"):
                if name not in but:
                    with contextlib.suppress(FileNotFoundError):
                        (self.path / name).unlink()
            with contextlib.suppress(FileNotFoundError):
                self.tree.rmdir()
            if not but:
                self.path.rmdir()


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def bases() -> list[Path]:
    """Where this user's run directories may be, the first choice first."""
    uid = os.getuid()
    if chosen := os.environ.get("ZRAMFS_RUN_DIR"):
        return [safe_paths.resolve(chosen)]
    if uid == 0:
        return [ROOT_BASE]
    found = []
    for parent in (os.environ.get("XDG_RUNTIME_DIR"), f"/run/user/{uid}"):
        # su keeps the old user's XDG_RUNTIME_DIR: take it only from its owner.
        if parent and os.path.isabs(parent) and trouble(Path(parent), private=True) is None:
            found.append(Path(parent) / "zramfs")
    found.append(Path(f"/tmp/zramfs-{uid}"))
    return list(dict.fromkeys(found))


def trouble(path: Path, *, private: bool) -> str | None:
    """Why `path` is no directory that only this user can change; None when it is one."""
    try:
        seen = os.lstat(path)
    except OSError as error:
        return error.strerror
    if not stat.S_ISDIR(seen.st_mode):
        return "it is not a directory"
    if seen.st_uid != os.getuid():
        return f"it belongs to uid {seen.st_uid}, not to uid {os.getuid()}"
    if seen.st_mode & (0o077 if private else 0o022):
        return f"its mode is {stat.S_IMODE(seen.st_mode):04o}, so others get in"
    return None


def make_base(base: Path) -> None:
    """Creates the directory for run directories, or checks the one that is there."""
    # 0711: a device with allow_other lets other users pass through to its `disk`.
    mode = 0o711 if os.getuid() == 0 else 0o700
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(base, mode)
            os.chmod(base, mode)  # the umask may have taken bits away
    except OSError as error:
        raise ZramfsError(
            error.errno or errno.EIO, f"cannot make the run directory {base}: {error.strerror}"
        ) from None
    if reason := trouble(base, private=os.getuid() != 0) or safe_paths.replaceable(base):
        raise ZramfsError(
            errno.EPERM,
            f"{base} must be a directory that only uid {os.getuid()} can change, but {reason}: "
            "remove it, or name another place in ZRAMFS_RUN_DIR",
        )


@contextlib.contextmanager
def locked(base: Path) -> Iterator[None]:
    """Holds the lock on `base`, which is created. Not inherited by programs this process starts."""
    make_base(base)
    fd = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        end = time.monotonic() + _LOCK_TIMEOUT
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise ZramfsError(
                        errno.EBUSY,
                        f"another zramfs command has held the lock on {base} for {_LOCK_TIMEOUT:g} s: "
                        f"`fuser {base}` shows which one",
                    ) from None
                time.sleep(0.02)
        yield
    finally:
        os.close(fd)


def keep(rundir: Rundir) -> None:
    """Locks the run directory for as long as this process lives: by that others know who serves it. It also
    keeps systemd-tmpfiles away, which ages the files below /tmp and leaves locked directories alone."""
    fd = os.open(rundir.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_SH)


def rundirs() -> list[Rundir]:
    """All of this user's, by name."""
    found = []
    for base in bases():
        if trouble(base, private=os.getuid() != 0) is None:
            found += [Rundir(base / name) for name in sorted(os.listdir(base))]
    return found


def find(wanted: str) -> Rundir | None:
    """By the tree's directory, the mount point of the RAM disk, or the name. Raises ZramfsError when
    that means two devices."""
    candidates = rundirs()
    place = resolve(wanted)
    here = []
    for rundir in candidates:
        state = rundir.read()
        # A start that ended before it wrote its state left only the name.
        if {str(place)} & {*state.places(), *state.former} if state else rundir.name == escape(place):
            here.append(rundir)
    named = [rundir for rundir in candidates if rundir.name == wanted]
    found = list(dict.fromkeys(here + named))
    if len(found) > 1:
        raise ZramfsError(
            errno.EINVAL,
            f"{wanted} means two devices, {found[0].name} (the directory {place}) and {found[1].name} "
            f"(the name): write {place} for the first, or the directory of the second",
        )
    return found[0] if found else None


def foreign_mount(directory: Path) -> str | None:
    """What to say of a tree that is mounted there and belongs to no run directory of this user."""
    mount = mounts.mount_at(directory)
    if mount is None or mount.fstype != mounts.FSTYPE:
        return None
    return (
        f"a zramfs device of another user or run directory is mounted on {directory}: let its owner stop it, "
        f"or, if its daemon has died, take the mount away with `fusermount3 -u {directory}`"
    )


def stale_message(old: Rundir, state: State | None) -> str:
    if state is None:
        return f"cleaned up {old.path}, left by a start that never finished"
    where = state.where
    daemon = f"its daemon (pid {state.pid}, since {state.created})"
    if state.phase == "failed":
        return f"cleaned up {where}: {daemon} had failed, and its data is lost{_end_of_log(old)}"
    return f"cleaned up {where}: {daemon} had died, and its data with it"


def _end_of_log(old: Rundir) -> str:
    """To be asked for before the log is removed with the rest."""
    with contextlib.suppress(OSError):
        lines = old.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
        return "; the end of its log:\n" + "\n".join(f"  {line}" for line in lines)
    return ""
