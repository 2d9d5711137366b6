# SPDX-License-Identifier: Apache-2.0
"""Bringing devices up and taking them down: the order of the steps, and the way back from each."""
from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import signal
import stat
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from . import bounded, busy, detach, loops, ramdisk, rundir, safety, swap, watermark
from .config import DeviceConfig
from .errors import ZramfsError
from .ramdisk import FileSystem
from .rundir import Rundir, State
from .swap import Swap

if TYPE_CHECKING:
    from .service import Notifier

log = logging.getLogger(__name__)

FSTYPE = "fuse.zramfs"
# A server that lives answers in well under a millisecond; a stopped or stuck one never does.
ANSWER_TIMEOUT = 2.0
# Freeing some 10 GiB of pool takes about a second; the rest is for a loaded machine.
END_TIMEOUT = 30.0
_PAUSE = 0.02
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Say = Callable[[str], None]
OnTop = FileSystem | Swap | None


def claim(
    directory: Path | None, kind: str, *, threads: int, shared: bool, say: Say, name: str | None = None
) -> Rundir:
    """A run directory for a new device whose tree (or, for a RAM disk, file system) goes to `directory`;
    None, for swap: which has none but its name.

    name: of the device; None = its directory's, escaped. Creates `directory` if only its last part is
    missing. Cleans up what a dead daemon left there, and says so. shared: others may pass through to
    `disk`. Raises ZramfsError: EBUSY when a device is there, ENOTDIR, ENOENT, EPERM.
    """
    if directory is not None and (reason := rundir.hides(directory)):
        raise ZramfsError(errno.EINVAL, reason)
    base = rundir.bases()[0]
    new = Rundir(base / (name or rundir.escape(directory or Path("swap"))))
    inside = directory is None
    directory = directory or new.tree
    end = time.monotonic() + END_TIMEOUT
    while True:
        with rundir.locked(base):
            if not _ending(new, directory, end, say):
                made = [] if inside else _make_directory(directory)
                try:
                    os.mkdir(new.path, 0o711 if shared else 0o700)
                    os.chmod(new.path, 0o711 if shared else 0o700)
                    if kind in ("ramdisk", "swap"):
                        new.tree.mkdir(0o700)
                    new.write(_first_state(new, directory, kind, threads, made))
                except BaseException:
                    _remove(new, made)
                    raise
                return new
        time.sleep(_PAUSE)


def start(new: Rundir, config: DeviceConfig, on_top: OnTop = None, say: Say | None = None) -> None:
    """Brings the claimed device up, and the file system or the swap area on top of it.

    Returns when all of it is ready. On any failure, and on SIGINT, SIGTERM and SIGHUP, nothing is
    left. To be called while the process has one thread. Raises ZramfsError; SystemExit on a signal.
    """
    for number in _SIGNALS:
        signal.signal(number, _leave)
    try:
        detach.run(lambda on_ready: _serve(new, config, on_ready), new.log)
        _build(new, on_top, say)
        # A signal that comes now is too late: the device is there, and the exit status must say so.
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    except BaseException:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        _abandon(new)
        raise


def run(new: Rundir, config: DeviceConfig, say: Say, on_top: OnTop = None) -> None:
    """Serves the claimed device in this very process until it ends, and tells a service manager about
    it that wants to know. Raises ZramfsError."""
    from .service import Notifier  # brings trio

    def on_ready() -> None:
        _build(new, on_top, say)
        if state := new.read():
            say(f"{state.where} is ready")

    if _serve(new, config, on_ready, Notifier.from_environment()):
        raise ZramfsError(errno.EIO, "the device did not end in order; what happened is in the lines above")


def _leave(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _build(new: Rundir, wanted: OnTop, say: Say | None) -> None:
    """Each step stands in the state or in the kernel's tables before the next, for _undo()."""
    if wanted is None:
        return
    device = loops.attach(new.disk)
    attached = loops.sequence(device)
    if isinstance(wanted, FileSystem):
        new.update(loop=device, attached=attached, fs=wanted.type)
        ramdisk.make_file_system(wanted.type, device)
        ramdisk.mount(wanted, device)
        ramdisk.govern(new.tree)
    else:
        state = new.update(loop=device, attached=attached)
        for note in [*state.notes, _raise_watermark(new, wanted)]:
            if note and say:
                say(note)
        swap.make(device)
        swap.on(device, wanted)
    new.update(phase="ready")


def _raise_watermark(new: Rundir, wanted: Swap) -> str | None:
    try:
        return watermark.raise_to(
            new.path, watermark.needed() if wanted.min_free is None else wanted.min_free)
    except ZramfsError as error:
        if not wanted.force:
            raise
        return str(error)


def _abandon(new: Rundir) -> None:
    """Takes down what is there of a device that did not come up. The failure that led here is the
    one to report, so whatever fails in here is left for `stop`."""
    with contextlib.suppress(OSError):
        state = new.read()
        if state is not None and state.alive() and state.pid != os.getpid():
            _undo(new, state)
            _end(state)
        with rundir.locked(new.path.parent):
            _clean(new, state)


def stop(old: Rundir, say: Say, *, force: bool = False) -> None:
    """Takes a device down: file system or swap area, loop device, daemon, mounts, run directory.

    Changes nothing when something is in use. force: ends a swap area even if memory may not take what
    is in it. Raises ZramfsError: EBUSY with what uses it, ENOMEM.
    """
    # Whoever stands in the device when he calls this would be its own obstacle.
    os.chdir("/")
    state = old.read()
    if state is None or not state.alive():
        with rundir.locked(old.path.parent):
            _expect_unused(old, state)
            _clean(old, state)
        say(_stale_message(old, state))
        return
    _expect_answer(state)
    _expect_unused(old, state)
    if state.kind == "swap" and not force:
        for device in _standing(old, state):
            swap.expect_room(device)
    _undo(old, state)
    _end(state)
    with rundir.locked(old.path.parent):
        # The daemon has done this, unless it was killed on the way.
        if (late := old.read()) is None or late.pid == state.pid:
            _clean(old, state)


def _standing(old: Rundir, state: State) -> list[str]:
    """Loop devices on `disk`; ours also when that was unmounted under it (umount --lazy, an abort)."""
    found = loops.find(old.disk)
    if state.loop and state.loop not in found and loops.stands_on(state.loop, old.disk, state.attached):
        found.append(state.loop)
    return found


def _detach(old: Rundir, state: State, device: str, timeout: float = 10.0) -> None:
    loops.detach(device, old.disk, timeout, state.attached if device == state.loop else None)


def may_end(old: Rundir) -> None:
    """For the daemon that was told to end without `stop`: brings every page in swap back, or raises
    ZramfsError where memory does not suffice: the pages belong to programs that would die without."""
    state = old.read()
    if state is None or state.kind != "swap":
        return
    for device in _standing(old, state):
        swap.expect_room(device)
        swap.off(device)


def teardown(old: Rundir) -> None:
    """For the daemon that ends without `stop`: takes down what was built on `disk` as far as that goes
    without waiting for its users, who get I/O errors soon."""
    state = old.read()
    if state is None or state.kind == "device":
        return
    for device in _standing(old, state):
        mountpoint = Path(state.mountpoint) if state.mountpoint else None
        try:
            if mountpoint and ramdisk.mounted(device, mountpoint):
                try:
                    ramdisk.unmount(mountpoint)
                except ZramfsError as error:
                    log.warning("%s; it is detached from the tree now, and goes when its users go", error)
                    ramdisk.unmount(mountpoint, lazy=True)
            _detach(old, state, device, timeout=1.0)
        except ZramfsError as error:
            log.warning("%s", error)


def _serve(
    new: Rundir, config: DeviceConfig, on_ready: Callable[[], None], notifier: Notifier | None = None
) -> int:
    from . import daemon  # brings trio and pyfuse3, which only the daemon needs

    def ready() -> None:
        if config.reserve:
            safety.populate()
        state = new.read()
        if state is not None and state.kind == "device":
            new.update(phase="ready")
        on_ready()

    new.update(pid=os.getpid(), pid_start=rundir.process_start(os.getpid()))
    rundir.keep(new)
    try:
        state = new.read()
        if state and state.kind == "swap" and not config.reserve and not config.forced:
            raise ZramfsError(
                errno.EINVAL, "swap needs a reserve of ready memory: expected at least 2M, got 0")
        if config.reserve:
            # Now that all code is loaded, and before there are threads and a store.
            new.update(notes=safety.enter(config.forced))
        return daemon.serve(config, ready, lambda: teardown(new), lambda: may_end(new), notifier)
    finally:
        with rundir.locked(new.path.parent):
            _clean(new, new.read())


def _first_state(new: Rundir, directory: Path, kind: str, threads: int, made: list[str]) -> State:
    start_time = rundir.process_start(os.getpid())
    assert start_time is not None
    is_ramdisk = kind == "ramdisk"
    return State(
        name=new.name,
        directory=str(new.tree if is_ramdisk else directory),
        disk=str(new.disk),
        kind=kind,
        phase="starting",
        pid=os.getpid(),
        pid_start=start_time,
        boot_id=rundir.boot_id(),
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        threads=threads,
        made=made,
        mountpoint=str(directory) if is_ramdisk else None,
    )


def _ending(new: Rundir, directory: Path, end: float, say: Say) -> bool:
    """True while the device on `directory` is on its way out; raises EBUSY when one is there to stay,
    cleans up one whose daemon died."""
    for other in rundir.rundirs():
        state = other.read()
        if other.path != new.path and (state is None or str(directory) not in state.places()):
            continue
        if state is None or not state.alive():
            _expect_unused(other, state)
            _clean(other, state)
            say(_stale_message(other, state))
        elif state.phase == "ready" and busy.mount_at(Path(state.directory)) is None:
            if time.monotonic() > end:
                raise ZramfsError(
                    errno.EBUSY,
                    f"the tree of the device on {directory} was unmounted, but its daemon (pid {state.pid}) "
                    f"has not ended within {END_TIMEOUT:g} s: something still uses {state.disk}; "
                    f"`zramfs stop {directory}` says what",
                )
            return True
        else:
            what = "is just being started" if state.phase == "starting" else "is there"
            raise ZramfsError(
                errno.EBUSY,
                f"a zramfs device {what} on {state.where} (daemon pid {state.pid}, since {state.created}); "
                f"use another {'name' if state.kind == 'swap' else 'directory'}, or "
                f"`zramfs stop {state.where}` first",
            )
    if foreign := foreign_mount(directory):
        raise ZramfsError(errno.EBUSY, f"{foreign}; or use another directory")
    return False


def foreign_mount(directory: Path) -> str | None:
    """What to say of a tree that is mounted there and belongs to no run directory of this user."""
    mount = busy.mount_at(directory)
    if mount is None or mount.fstype != FSTYPE:
        return None
    return (
        f"a zramfs device of another user or run directory is mounted on {directory}: let its owner stop it, "
        f"or, if its daemon has died, take the mount away with `fusermount3 -u {directory}`"
    )


def _make_directory(directory: Path) -> list[str]:
    try:
        os.mkdir(directory, 0o755)
    except FileExistsError:
        if not stat.S_ISDIR(os.stat(directory).st_mode):
            raise ZramfsError(errno.ENOTDIR, f"{directory} is not a directory; a device needs one") from None
        return []
    except OSError as error:
        raise ZramfsError(
            error.errno or errno.EIO, f"{directory} does not exist and could not be created: {error.strerror}"
        ) from None
    return [str(directory)]


def _expect_answer(state: State) -> None:
    try:
        bounded.call(lambda: (Path(state.directory) / "zram/initstate").read_text(), ANSWER_TIMEOUT)
    except TimeoutError:
        raise ZramfsError(
            errno.ETIMEDOUT,
            f"the daemon (pid {state.pid}) of {state.directory} has not answered for {ANSWER_TIMEOUT:g} s, "
            "so nothing was changed. If it is stopped, `kill -CONT` lets it go on; if it is stuck, "
            f"`kill -KILL {state.pid}` ends it, and the same command then cleans up",
        ) from None
    except OSError as error:
        # The tree was unmounted, or is a device of ours that is on its way out; the daemon decides.
        log.debug("%s: %s", state.directory, error)


def _expect_unused(old: Rundir, state: State | None) -> None:
    """Raises EBUSY with everything that keeps the device in use, apart from its own parts."""
    lane = busy.mount_at(old.disk)
    standing = loops.find(old.disk, lane.dev if lane and state and state.alive() else None)
    own: list[str] = []
    places = {old.disk, old.tree}
    if state is not None:
        places.add(Path(state.directory))
    if state is not None and state.kind == "swap":
        own = [device for device in standing if state.loop in (device, None)]
    if state is not None and state.mountpoint:
        own = [device for device in standing if state.loop in (device, None)]
        if any(ramdisk.mounted(device, Path(state.mountpoint)) for device in own):
            places.add(Path(state.mountpoint))
    phrases = [f"the loop device {device} stands on {old.disk}" for device in standing if device not in own]
    phrases += busy.users_of(
        [place for place in places if busy.mount_at(place)],
        devices=standing,
        but=[state.pid] if state else [],
        own_swaps=own if state and state.kind == "swap" else [],
    )
    if phrases:
        where = state.where if state else str(old.path)
        listed = "".join(f"\n  {phrase}" for phrase in phrases)
        raise ZramfsError(errno.EBUSY, f"{where} is in use, so nothing was changed:{listed}")


def _undo(old: Rundir, state: State) -> None:
    """Takes down what was built on `disk`."""
    if state.kind not in ("ramdisk", "swap"):
        return
    for device in _standing(old, state):
        if state.mountpoint and ramdisk.mounted(device, Path(state.mountpoint)):
            if state.pid != os.getpid():
                ramdisk.let_go(Path(state.directory))
            ramdisk.unmount(Path(state.mountpoint))
        if state.kind == "swap":
            swap.off(device)
        _detach(old, state, device)


def _end(state: State) -> None:
    """SIGTERM to the daemon, if it is still the process that state names, and waits for its end."""
    try:
        pidfd = os.pidfd_open(state.pid)
    except ProcessLookupError:
        return
    try:
        # The pidfd is open, so the process cannot change between this look and the signal.
        if not state.alive():
            return
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        except ProcessLookupError:
            return
        if not select.select([pidfd], [], [], END_TIMEOUT)[0]:
            raise ZramfsError(
                errno.ETIMEDOUT,
                f"the daemon (pid {state.pid}) was told to end and has not within {END_TIMEOUT:g} s; "
                f"its log is {Path(state.disk).parent / 'log'}",
            )
    finally:
        os.close(pidfd)


def _clean(old: Rundir, state: State | None) -> None:
    """Removes what a device that serves no more left: file system, loops, mounts, directories.

    Without effect if nothing is there. Raises ZramfsError: EBUSY.
    """
    from . import mounting

    if not old.path.exists():
        return
    if state is not None:
        _undo(old, state)
    for place in [*([Path(state.directory)] if state else []), old.tree, old.disk]:
        mount = busy.mount_at(place)
        if mount is not None and mount.fstype.startswith("fuse"):
            mounting.unmount(place)
    # Not by the kind of device: the state may be lost, and the machine's setting must not.
    if str(old.path) in watermark.users():
        watermark.release(old.path)
    _remove(old, state.made if state else [])


def _remove(old: Rundir, made: list[str]) -> None:
    for directory in made:
        # Somebody may have put something into it before the mount or since: then it stays.
        with contextlib.suppress(OSError):
            os.rmdir(directory)
    old.remove()


def _stale_message(old: Rundir, state: State | None) -> str:
    if state is None:
        return f"cleaned up {old.path}, left by a start that never finished"
    where = state.where
    daemon = f"its daemon (pid {state.pid}, since {state.created})"
    return f"cleaned up {where}: {daemon} had died, and its data with it"
