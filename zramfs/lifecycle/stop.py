# SPDX-License-Identifier: Apache-2.0
"""Taking devices down: the order of the steps, from the file system on top to the run directory."""
from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import select
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path

from zramfs.errors import ZramfsError
from zramfs.host import (
    bounded,
    fusermount,
    in_use,
    locks,
    loops,
    mounts,
    process,
    programs,
    safe_paths,
    system_calls,
    watermark,
)
from zramfs.host.bounded import ANSWER_TIMEOUT

from . import images, ramdisk, rundir, swap
from .rundir import Rundir, State

log = logging.getLogger(__name__)

# Freeing some 10 GiB of pool takes about a second; the rest is for a loaded machine.
END_TIMEOUT = 30.0
SILENCE = 3.0  # seconds that a wait may take before it is announced; on a loaded machine an end takes 1 to 2
# A file system that nobody holds is gone when umount2 returns, but for somebody who had just a look at it.
GONE_TIMEOUT = 2.0
LOOKS, LOOKS_TIMEOUT = 5, 1.0  # so many looks and seconds, whatever a busy machine makes of either
# Seconds after which a governor that has not let go is taken to wait for a thaw; it takes 0.1 s, on btrfs 1.
FROZEN_AFTER = 3.0


Say = Callable[[str], None]


def stop_device(old: Rundir, say: Say, *, force: bool = False) -> None:
    """Takes a device down: file system or swap area, loop device, daemon, mounts, run directory.

    Changes nothing when something is in use. force: ends a swap area even if memory may not take what is in
    it, and a RAM disk even if it cannot be saved. A device in another mount namespace is taken down from
    within it. Raises ZramfsError: EBUSY with what uses it, ENOMEM.
    """
    # Whoever stands in the device when he calls this would be its own obstacle.
    os.chdir("/")
    state = old.read()
    if state is None or not state.alive():
        message = rundir.stale_message(old, state)
        with rundir.locked(old.path.parent):
            expect_unserved(old, state)
            expect_unused(old, state)
            clean_up(old, state)
        say(message)
        return
    if is_elsewhere(state.pid):
        bounded.call(functools.partial(_stop_elsewhere, old, state.pid, say, force), None)
    else:
        _stop_living(old, state, say, force)


def is_elsewhere(pid: int) -> bool:
    """Whether the process has another mount namespace than this one, which root can enter."""
    with contextlib.suppress(OSError):
        theirs = os.readlink(f"/proc/{pid}/ns/mnt")
        return os.geteuid() == 0 and theirs != os.readlink("/proc/self/ns/mnt")
    return False


def _stop_elsewhere(old: Rundir, pid: int, say: Say, force: bool) -> None:
    """In a child process, whose own child is in the namespaces of the daemon: of its mounts, and of its pids,
    because /proc there may show no others."""
    mount_space = _open_namespace(pid, "mnt")
    system_calls.enter_namespace(_open_namespace(pid, "pid"), system_calls.CLONE_NEWPID)
    bounded.call(functools.partial(_stop_inside, old, mount_space, say, force), None)


def _open_namespace(pid: int, kind: str) -> int:
    return os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)


def _stop_inside(old: Rundir, mount_space: int, say: Say, force: bool) -> None:
    system_calls.enter_namespace(mount_space, system_calls.CLONE_NEWNS)
    state = old.read()
    if state is None or not state.alive():
        raise ZramfsError(
            errno.ENOENT,
            f"{old.path} is not to be seen in the mount namespace of its daemon: expected the same run "
            "directory there; stop the device from within")
    _stop_living(old, state, say, force)


def _stop_living(old: Rundir, state: State, say: Say, force: bool) -> None:
    expect_answer(state)
    _expect_programs(state)
    expect_unused(old, state)
    if state.kind == "swap" and not force:
        for device in _standing(old, state):
            swap.expect_room(device)
    old.update()  # or where things are now would be lost with their mounts
    _take_copies_away(old, state)
    take_down_top(old, state, say, force=force)
    end_daemon(state, say)
    with rundir.locked(old.path.parent):
        # The daemon has done this, unless it was killed on the way.
        if (late := old.read()) is None or late.pid == state.pid:
            clean_up(old, state)


def _take_copies_away(old: Rundir, state: State) -> None:
    """Unmounts in other mount namespaces what is there only because they began as copies of this one, and
    which nobody uses (expect_unused). Raises ZramfsError(EBUSY) where a file system would live on in one."""
    if os.geteuid() != 0:
        return
    standing = _standing(old, state) if state.kind == "ramdisk" else []
    places = [*(place for device in standing if (place := own_place(state, device))), Path(state.directory),
              old.disk]
    for pid, place in in_use.copies(places, standing):
        try:
            bounded.call(functools.partial(_unmount_inside, pid, place), ANSWER_TIMEOUT)
        except OSError as error:
            # The daemon cuts the users of its own mounts off.
            if place not in places[:-2]:
                log.debug("%s in the mount namespace of %d: %s", place, pid, error)
            elif error.errno not in (errno.ENOENT, errno.EINVAL) or _is_there(pid, place):
                raise ZramfsError(
                    errno.EBUSY,
                    f"{place} cannot be unmounted in the mount namespace of {process.process_name(pid)} "
                    f"(pid {pid}): {error.strerror}; nothing else was changed") from None


def _unmount_inside(pid: int, place: Path) -> None:
    """In a child process, which stays in the other namespace."""
    system_calls.enter_namespace(_open_namespace(pid, "mnt"), system_calls.CLONE_NEWNS)
    fusermount.unmount_without_proc(place)


def _is_there(pid: int, place: Path) -> bool:
    try:
        return any(each.mountpoint == place for each in mounts.mounts(pid))
    except OSError:
        return False


def _expect_programs(state: State) -> None:
    needed = {"swapoff": "mount"} if state.kind == "swap" else {}
    if os.geteuid() != 0:
        needed["fusermount3"] = "fuse3"
    programs.expect(needed, f"stopping {state.where}")


def expect_unserved(old: Rundir, state: State | None) -> None:
    """Raises ZramfsError(EBUSY) if a process serves the device that cannot be seen from here."""
    if old.is_served(LOOKS_TIMEOUT):
        raise ZramfsError(
            errno.EBUSY,
            f"{state.where if state else old.path} is served by a process that is not to be seen from here, "
            "probably of another pid namespace (a container): stop it there; nothing was changed")


def _standing(old: Rundir, state: State) -> list[str]:
    """Loop devices on `disk`; ours also when that was unmounted under it (umount --lazy, an abort)."""
    found = loops.find(old.disk)
    if state.loop and state.loop not in found and loops.stands_on(state.loop, old.disk, state.attached):
        found.append(state.loop)
    return found


def _detach(
    old: Rundir, state: State, device: str, timeout: float = 10.0, say: Say | None = None
) -> None:
    loops.detach(device, old.disk, timeout, state.attached if device == state.loop else None, say)


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
        elif (not is_order or state.keep) and (place := own_place(state, device)):
            try:
                ramdisk.unmount(place)
            except ZramfsError as error:
                if not is_order:
                    raise
                log.warning("%s; it is saved as it is now, and what is written from here on is lost", error)
            else:
                loops.wait_unclaimed(device, GONE_TIMEOUT)


def teardown(old: Rundir) -> None:
    """For the daemon that ends without `stop`: takes down what was built on `disk` as far as that goes
    without waiting for its users, who get I/O errors soon. A swap area is there still where the lane has
    ended: then its pages are lost, whoever needs one gets SIGBUS, and swapoff needs no memory for them."""
    # Written, because where things are now would be lost with their mounts.
    if old.read() is None or (state := old.update()).kind == "device":
        return
    for device in _standing(old, state):
        try:
            if mountpoint := own_place(state, device):
                try:
                    if ramdisk.thaw(mountpoint):
                        log.warning("%s was frozen, and is thawed to be unmounted", mountpoint)
                    ramdisk.unmount(mountpoint)
                except ZramfsError as error:
                    log.warning("%s; it is detached from the tree now, and goes when its users go", error)
                    ramdisk.unmount(mountpoint, lazy=True)
            if state.kind == "swap":
                swap.off(device)
            _detach(old, state, device, timeout=1.0)
        except ZramfsError as error:
            log.warning("%s", error)


def expect_answer(state: State) -> None:
    """The lane is asked, through which the file system is unmounted and swap comes back. The tree is not
    needed for an end, so a daemon whose tree does not answer can be stopped."""
    try:
        bounded.call(lambda: os.statvfs(state.disk) and None, ANSWER_TIMEOUT)
    except TimeoutError:
        raise ZramfsError(
            errno.ETIMEDOUT,
            f"the daemon (pid {state.pid}) of {state.directory} has not answered for {ANSWER_TIMEOUT:g} s, "
            "so nothing was changed. If it is stopped, `kill -CONT` lets it go on; if it is stuck, "
            f"{_way_out(state)}",
        ) from None
    except OSError as error:
        # The lane has ended, and the daemon is on its way out.
        log.debug("%s: %s", state.disk, error)


def _is_kept(state: State) -> bool:
    """Whether the keeper that the state names is one, and of this device: it has the run directory locked."""
    return state.keeper_pid in locks.holders(Path(state.disk).parent)


def _way_out(state: State) -> str:
    if _is_kept(state):
        return (f"`kill -KILL {state.pid}` has another process take over with the data, and "
                f"`kill -KILL {state.keeper_pid} {state.pid}` ends the device; the same command then cleans "
                "up")
    return f"`kill -KILL {state.pid}` ends it, and the same command then cleans up"


def expect_unused(old: Rundir, state: State | None) -> None:
    """Raises EBUSY with everything that keeps the device in use, apart from its own parts. Who only looks at
    it (udev, `losetup --find`, blkid) is gone within LOOKS_TIMEOUT."""
    looks, end = 0, time.monotonic() + LOOKS_TIMEOUT
    while phrases := _users(old, state):
        looks += 1
        if looks >= LOOKS and time.monotonic() > end:
            where = state.where if state else str(old.path)
            listed = "".join(f"\n  {phrase}" for phrase in phrases)
            raise ZramfsError(errno.EBUSY, f"{where} is in use, so nothing was changed:{listed}")
        time.sleep(0.1)


def _users(old: Rundir, state: State | None) -> list[str]:
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
        places |= {place for device in own if (place := own_place(state, device))}
    phrases = [f"the loop device {device} stands on {old.disk}" for device in standing if device not in own]
    phrases += in_use.users_of(
        [place for place in places if mounts.mount_at(place)],
        devices=standing,
        # A warden holds the file system for the daemon, also for a moment after the daemon has died, and lets
        # it go before the unmount. Who only looks like one still keeps that from succeeding.
        but=[*(pid for each in {state.pid, state.keeper_pid, state.standby_pid} - {0}
               for pid in (each, *process.children_of(each))),
             *process.runs_of(process.WARDEN)] if state else [],
        own_swaps=own if state and state.kind == "swap" else [],
    )
    if state is not None and state.mountpoint and not phrases:
        phrases = [
            f"a file system still holds {device}, and is mounted nowhere to be seen: it was detached (umount "
            "--lazy) while frozen or in use, or the kernel itself uses it"
            for device in own
            if not ramdisk.places(device) and not loops.wait_unclaimed(device, GONE_TIMEOUT)]
    return phrases


def own_place(state: State, device: str) -> Path | None:
    """Where the file system of the RAM disk is mounted; None if it is not. Others may have mounted it
    elsewhere too: the first mount is ours, unless one has our mount point's name."""
    if not state.mountpoint:
        return None
    found = ramdisk.places(device)
    return Path(state.mountpoint) if Path(state.mountpoint) in found else found[0] if found else None


def take_down_top(old: Rundir, state: State, say: Say | None = None, *, force: bool = False) -> None:
    """Takes down what was built on `disk`; what was undone is put back where the rest fails. force: as
    stop_device(). Raises ZramfsError."""
    if state.kind not in ("ramdisk", "swap"):
        return
    for device in _standing(old, state):
        if place := own_place(state, device):
            _take_down_file_system(state, device, place, say)
        if state.kind == "swap":
            swap.off(device)
        try:
            images.save_before_end(state, force=force, say=say)
        except ZramfsError:
            if place:
                ramdisk.mount(ramdisk.as_it_was(state, place), device)
                _put_back(state, place, frozen=False)
            raise
        _detach(old, state, device, say=say)


def _take_down_file_system(state: State, device: str, place: Path, say: Say | None) -> None:
    """Unmounts, and mounts again if the file system lives on all the same: then somebody uses it."""
    # The governor thaws what it has frozen itself.
    done = state.pid == os.getpid() or ramdisk.let_go(Path(state.directory), FROZEN_AFTER)
    frozen = ramdisk.thaw(place)
    if frozen and say:
        say(f"{place} was frozen (fsfreeze), and is thawed to be unmounted")
    if not done:
        ramdisk.let_go(Path(state.directory))
    try:
        ramdisk.unmount(place)
    except ZramfsError:
        _put_back(state, place, frozen=frozen)
        raise
    if not state.alive() or loops.wait_unclaimed(device, GONE_TIMEOUT):
        return
    ramdisk.mount(ramdisk.as_it_was(state, place), device)
    _put_back(state, place, frozen=frozen)
    raise ZramfsError(
        errno.EBUSY,
        f"the file system on {device} was unmounted from {place} and still lived after {GONE_TIMEOUT:g} s, "
        "so somebody uses it who is not to be seen from here; it is mounted again, and nothing else was "
        "changed")


def _put_back(state: State, place: Path, *, frozen: bool) -> None:
    if state.pid != os.getpid() and state.alive():
        try:
            ramdisk.govern(Path(state.directory))
        except ZramfsError as error:
            log.warning("%s", error)
    if frozen:
        ramdisk.freeze(place)


def end_daemon(state: State, say: Say | None = None) -> None:
    """SIGTERM to the daemon, if it is still the process that state names, and waits for its end. By its
    keeper, which ends with it, and tells the next daemon if this one dies on the way."""
    is_kept = _is_kept(state)
    try:
        pidfd = os.pidfd_open(state.keeper_pid if is_kept else state.pid)
    except ProcessLookupError:
        return
    try:
        # The pidfd is open, so the process cannot change between this look and the signal.
        if not state.alive():
            return
        _expect_server(state)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        except ProcessLookupError:
            return
        if not _wait_end(pidfd, state, say):
            raise ZramfsError(
                errno.ETIMEDOUT,
                f"the daemon (pid {state.pid}) was told to end and has not within {END_TIMEOUT:g} s; "
                f"its log is {Path(state.disk).parent / 'log'}",
            )
    finally:
        os.close(pidfd)


def _expect_server(state: State) -> None:
    """A pid in a file may mean another process here than where it was written."""
    place = Path(state.disk).parent
    if state.pid not in locks.holders(place) and locks.is_locked(place):
        raise ZramfsError(
            errno.EBUSY,
            f"{state.where} is not served by pid {state.pid}, but by a process of another pid namespace: "
            "stop it there; no signal was sent")


def _wait_end(pidfd: int, state: State, say: Say | None) -> bool:
    if select.select([pidfd], [], [], SILENCE)[0]:
        return True
    if say:
        say(f"waiting up to {END_TIMEOUT:g} s until the daemon (pid {state.pid}) has let go of its users "
            "and of its memory")
    return bool(select.select([pidfd], [], [], END_TIMEOUT - SILENCE)[0])


def clean_up(old: Rundir, state: State | None, *, keep_log: bool = False) -> None:
    """Removes what a device that serves no more left: file system, loops, mounts, directories.

    Without effect if nothing is there. keep_log: the daemon has failed, and its log says why; it stays with
    the state until `stop` or the next start on the same directory. Raises ZramfsError: EBUSY.
    """
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
            safe_paths.remove_directory(directory)
    old.remove(but=but)
