# SPDX-License-Identifier: Apache-2.0
"""Taking devices down: the order of the steps, from the file system on top to the run directory."""
from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import signal
from collections.abc import Callable, Collection
from pathlib import Path

from zramfs.errors import ZramfsError
from zramfs.host import bounded, in_use, loops, mounts, watermark
from zramfs.host.bounded import ANSWER_TIMEOUT

from . import ramdisk, rundir, swap
from .rundir import Rundir, State

log = logging.getLogger(__name__)

# Freeing some 10 GiB of pool takes about a second; the rest is for a loaded machine.
END_TIMEOUT = 30.0

LAST_LINES = 8  # of the log of a daemon that failed: its reason, and the steps of its end

Say = Callable[[str], None]


def stop_device(old: Rundir, say: Say, *, force: bool = False) -> None:
    """Takes a device down: file system or swap area, loop device, daemon, mounts, run directory.

    Changes nothing when something is in use. force: ends a swap area even if memory may not take what
    is in it. Raises ZramfsError: EBUSY with what uses it, ENOMEM.
    """
    # Whoever stands in the device when he calls this would be its own obstacle.
    os.chdir("/")
    state = old.read()
    if state is None or not state.alive():
        message = stale_message(old, state)
        with rundir.locked(old.path.parent):
            expect_unused(old, state)
            clean_up(old, state)
        say(message)
        return
    _expect_answer(state)
    expect_unused(old, state)
    if state.kind == "swap" and not force:
        for device in _standing(old, state):
            swap.expect_room(device)
    take_down_top(old, state)
    end_daemon(state)
    with rundir.locked(old.path.parent):
        # The daemon has done this, unless it was killed on the way.
        if (late := old.read()) is None or late.pid == state.pid:
            clean_up(old, state)


def _standing(old: Rundir, state: State) -> list[str]:
    """Loop devices on `disk`; ours also when that was unmounted under it (umount --lazy, an abort)."""
    found = loops.find(old.disk)
    if state.loop and state.loop not in found and loops.stands_on(state.loop, old.disk, state.attached):
        found.append(state.loop)
    return found


def _detach(old: Rundir, state: State, device: str, timeout: float = 10.0) -> None:
    loops.detach(device, old.disk, timeout, state.attached if device == state.loop else None)


def may_end(old: Rundir, *, is_order: bool) -> None:
    """For the daemon that is to end without `stop`: brings every page in swap back, or raises ZramfsError
    where memory does not suffice: the pages belong to programs that would die without.

    is_order: a signal asks for it. Else only the tree was unmounted, which nobody needs who uses a RAM disk:
    it ends if nobody does, and raises EBUSY otherwise.
    """
    state = old.read()
    if state is None or state.kind not in ("swap", "ramdisk"):
        return
    for device in _standing(old, state):
        if state.kind == "swap":
            swap.expect_room(device)
            swap.off(device)
        elif not is_order and state.mountpoint and ramdisk.mounted(device, Path(state.mountpoint)):
            ramdisk.unmount(Path(state.mountpoint))


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


def _expect_answer(state: State) -> None:
    """The lane is asked, through which the file system is unmounted and swap comes back. The tree is not
    needed for an end, so a daemon whose tree does not answer can be stopped."""
    try:
        bounded.call(lambda: os.statvfs(state.disk) and None, ANSWER_TIMEOUT)
    except TimeoutError:
        raise ZramfsError(
            errno.ETIMEDOUT,
            f"the daemon (pid {state.pid}) of {state.directory} has not answered for {ANSWER_TIMEOUT:g} s, "
            "so nothing was changed. If it is stopped, `kill -CONT` lets it go on; if it is stuck, "
            f"`kill -KILL {state.pid}` ends it, and the same command then cleans up",
        ) from None
    except OSError as error:
        # The lane has ended, and the daemon is on its way out.
        log.debug("%s: %s", state.disk, error)


def expect_unused(old: Rundir, state: State | None) -> None:
    """Raises EBUSY with everything that keeps the device in use, apart from its own parts."""
    lane = mounts.mount_at(old.disk)
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
    phrases += in_use.users_of(
        [place for place in places if mounts.mount_at(place)],
        devices=standing,
        but=[state.pid] if state else [],
        own_swaps=own if state and state.kind == "swap" else [],
    )
    if phrases:
        where = state.where if state else str(old.path)
        listed = "".join(f"\n  {phrase}" for phrase in phrases)
        raise ZramfsError(errno.EBUSY, f"{where} is in use, so nothing was changed:{listed}")


def take_down_top(old: Rundir, state: State) -> None:
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


def end_daemon(state: State) -> None:
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


def clean_up(old: Rundir, state: State | None, *, keep_log: bool = False) -> None:
    """Removes what a device that serves no more left: file system, loops, mounts, directories.

    Without effect if nothing is there. keep_log: the daemon has failed, and its log says why; it stays with
    the state until `stop` or the next start on the same directory. Raises ZramfsError: EBUSY.
    """
    from zramfs.host import fusermount

    if not old.path.exists():
        return
    if state is not None:
        take_down_top(old, state)
    for place in [*([Path(state.directory)] if state else []), old.tree, old.disk]:
        mount = mounts.mount_at(place)
        if mount is not None and mount.fstype.startswith("fuse"):
            fusermount.unmount(place)
    # Not by the kind of device: the state may be lost, and the machine's setting must not.
    if str(old.path) in watermark.users():
        watermark.release(old.path)
    if keep_log and state is not None and old.log.exists():
        old.update(phase="failed")
        remove_rundir(old, state.made, but=("log", "state.json"))
    else:
        remove_rundir(old, state.made if state else [])


def remove_rundir(old: Rundir, made: list[str], but: Collection[str] = ()) -> None:
    for directory in made:
        # Somebody may have put something into it before the mount or since: then it stays.
        with contextlib.suppress(OSError):
            os.rmdir(directory)
    old.remove(but=but)


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
        lines = old.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        return "; the end of its log:\n" + "\n".join(f"  {line}" for line in lines)
    return ""
