# SPDX-License-Identifier: Apache-2.0
"""Another size for a device that is in use, and for what stands on it.

    larger:  the device, then its loop device, then the file system    (each finds room below it)
    smaller: the file system, then the device, then its loop device    (each has left what is taken away)

A step that fails leaves a file system that is no larger than its loop device, and a loop device that is no
larger than the device. Where a step back is safe it is made, and the error says what has which size then.
"""
from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from zramfs.errors import ZramfsError
from zramfs.host import loops
from zramfs.model.config import RESIZE_STEP
from zramfs.text.sizes import format_size

from . import file_system_size, ramdisk
from .rundir import Rundir, State
from .stop import GONE_TIMEOUT, Say, expect_answer, expect_unused, is_elsewhere

PROGRAM_TIMEOUT = 600.0  # seconds for an e2fsck or resize2fs that is at work on a large device
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def resize_device(old: Rundir, size: int, say: Say, *, unmount: bool = False, discard: bool = False) -> int:
    """Gives the device `size` bytes, rounded up to 2 MiB, and what stands on it too. Returns the size that it
    has then.

    unmount: a file system that cannot be resized while it is mounted is unmounted for that time. discard: of
    a plain device, drop what is stored behind the new end. Raises ZramfsError: EOPNOTSUPP for swap, xfs and
    the like, EBUSY with what is in the way, EPERM, and whatever a step failed with. From the first step on
    SIGINT, SIGTERM and SIGHUP have no effect.
    """
    state = _expect_able(old)
    size = -(-size // RESIZE_STEP) * RESIZE_STEP
    os.chdir("/")
    with old.changing(), _undisturbed():
        before = device_size(state)
        if size < before:
            _shrink(old, state, before, size, unmount=unmount, discard=discard)
        else:
            _grow(old, state, before, size, say, unmount=unmount)
    return size


def resize_unmounted(old: Rundir, size: int, say: Say, *, discard: bool = False) -> int:
    """As resize_device(unmount=True), in two processes, so that a kill of either one leaves the file system
    mounted: a child does the work, and goes on without this one. When the child is killed, this one mounts
    the file system again, and raises ZramfsError(EINTR). To be called while the process has one thread."""
    state = _expect_able(old)
    place = _mounted_place(state) if state.kind == "ramdisk" else None
    read_end, write_end = os.pipe()
    with _undisturbed(), open(read_end, "rb") as answers:
        pid = os.fork()
        if pid == 0:
            _work_apart(lambda: resize_device(old, size, say, unmount=True, discard=discard), write_end)
        os.close(write_end)
        text = answers.read()
        os.waitpid(pid, 0)
        if text:
            answer = json.loads(text)
            if "sentence" in answer:
                raise ZramfsError(answer["errno"], answer["sentence"])
            return int(answer["size"])
        if place is not None:
            _mount_again(old, place)
    raise ZramfsError(
        errno.EINTR, f"the process that did it was killed, and {place or state.where} is in use again: the "
        "same command goes on from there")


def _work_apart(work: Callable[[], int], write_end: int) -> NoReturn:
    """In the child, which the end of a terminal does not reach."""
    try:
        os.setsid()
        try:
            answer: dict[str, object] = {"size": work()}
        except ZramfsError as error:
            answer = {"errno": error.errno, "sentence": str(error)}
        except BaseException:
            answer = {"errno": errno.EIO, "sentence": traceback.format_exc().rstrip()}
        with contextlib.suppress(BrokenPipeError):
            os.write(write_end, json.dumps(answer).encode())
    finally:
        os._exit(0)


def _mount_again(old: Rundir, place: Path) -> None:
    """A program that the killed process ran may still be at work on the file system."""
    state = old.read()
    if state is None or state.loop is None:
        return
    if not ramdisk.places(state.loop):
        loops.wait_unclaimed(state.loop, PROGRAM_TIMEOUT)
        ramdisk.mount(ramdisk.as_it_was(state, place), state.loop)
    ramdisk.govern(Path(state.directory))


def device_size(state: State) -> int:
    """Bytes, as the daemon says."""
    return int((Path(state.directory) / "zram/disksize").read_text(encoding="utf-8"))


def _expect_able(old: Rundir) -> State:
    state = old.read()
    if state is None or state.phase != "ready" or not state.alive():
        where = state.where if state else str(old.path)
        raise ZramfsError(
            errno.ENODEV, f"{where}: expected a device that is up, and its daemon is dead or just starting; "
            f"`zramfs stop {where}` cleans up after a dead one")
    if state.kind == "swap":
        raise ZramfsError(
            errno.EOPNOTSUPP,
            f"the swap area {state.where} keeps its size, which the kernel takes when it is enabled. For "
            "more swap add a second area beside it, which needs no pause: `zramfs swap NAME --size SIZE`; or "
            f"`zramfs stop {state.where}` and make it anew")
    if is_elsewhere(state.pid):
        raise ZramfsError(
            errno.EXDEV, f"{state.where} is in another mount namespace: run this there "
            f"(nsenter --target {state.pid} --mount)")
    expect_answer(state)
    return state


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """No step, and no program that it runs, is ended half way by a terminal."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _send(state: State, line: str) -> None:
    """Raises ZramfsError with the daemon's own sentence."""
    try:
        ramdisk.send_command(Path(state.directory), line)
    except OSError as error:
        text = (Path(state.directory) / "control").read_text(encoding="utf-8", errors="replace")
        said = next((row.split(f" {line}: ", 1)[1] for row in text.splitlines()
                     if row.startswith("last error") and f" {line}: " in row), error.strerror)
        raise ZramfsError(error.errno or errno.EIO, str(said)) from None


# ---- larger -----------------------------------------------------------------------------------------

def _grow(old: Rundir, state: State, before: int, size: int, say: Say, *, unmount: bool) -> None:
    if state.kind != "ramdisk":
        _grow_below(old, state, _followers(old, before, size, say), before, size)
        return
    place = _mounted_place(state)
    assert state.loop is not None and state.fs is not None
    file_system_size.expect_able(state.fs, size, smaller=False)
    live = file_system_size.grows_mounted(state.fs)
    if not live and not unmount:
        raise ZramfsError(
            errno.EPERM, f"the kernel makes a mounted {state.fs} larger for CAP_SYS_RESOURCE only, which is "
            "lacking here, so nothing was changed; with --unmount it is unmounted for that moment")
    with contextlib.nullcontext() if live else _unmounted(old, state, place):
        _grow_below(old, state, [state.loop], before, size)
        old.update(size=size)
        try:
            if live:
                file_system_size.grow_mounted(state.fs, state.loop, place)
            else:
                file_system_size.resize_unmounted(size, state.loop)
        except ZramfsError as error:
            raise ZramfsError(
                error.errno or errno.EIO,
                f"the device and {state.loop} have {format_size(size)}, and the file system on {place} is "
                f"whole and did not become so large: {error}. The same command tries that again") from None


def _grow_below(old: Rundir, state: State, standing: list[str], before: int, size: int) -> None:
    """The device and loop devices on it."""
    _send(state, f"resize={size}")
    try:
        for device in standing:
            loops.follow_size(device, old.disk, size)
    except ZramfsError as error:
        raise ZramfsError(
            error.errno or errno.EIO, f"{error}; {_taken_back(old, state, standing, before)}") from None


def _mounted_place(state: State) -> Path:
    found = ramdisk.places(state.loop) if state.loop else []
    options = ramdisk.as_it_was(state, Path(state.where)).options
    if not found:
        raise ZramfsError(
            errno.ENOENT, f"expected the file system of {state.where} to be mounted, and it is not; nothing "
            f"was changed. `mount -o {options or 'defaults'} {state.loop} {state.where}` mounts it again")
    usual = Path(state.where)
    return usual if usual in found else found[0]


def _followers(old: Rundir, before: int, size: int, say: Say) -> list[str]:
    """Loop devices of others that are to have the size of the plain device."""
    found = []
    for device in loops.find(old.disk):
        if loops.size(device) in (before, size):
            found.append(device)
            say(f"note: {device} grows with its device; what stands on it is yours to make larger")
        else:
            say(f"note: {device} shows a part of the device, and keeps its size")
    return found


def _taken_back(old: Rundir, state: State, standing: list[str], before: int) -> str:
    """Gives the device its old size again, and says what came of it."""
    try:
        _send(state, f"resize={before}")
        for device in standing:
            if loops.size(device) > before:
                loops.follow_size(device, old.disk, device_size(state))
    except (OSError, ValueError) as error:
        return f"the device keeps the new size, which does no harm: {error}"
    return "nothing was changed"


# ---- smaller ----------------------------------------------------------------------------------------

def _shrink(
    old: Rundir, state: State, before: int, size: int, *, unmount: bool, discard: bool,
) -> None:
    if state.kind == "device":
        if standing := loops.find(old.disk):
            raise ZramfsError(
                errno.EBUSY, f"{', '.join(standing)} stands on {old.disk}, and could lose what lies behind "
                "the new end, so nothing was changed: detach it first")
        _send(state, f"resize={size}{' discard' if discard else ''}")
        os.stat(old.disk)  # which has the kernel ask for the size
        return
    file_system_size.expect_able(state.fs or "", size, smaller=True)
    place = _mounted_place(state)
    if state.fs == "btrfs":
        _shrink_btrfs(old, state, before, size, place)
    elif unmount:
        assert state.loop is not None
        with _unmounted(old, state, place):
            file_system_size.resize_unmounted(size, state.loop)
            _shrink_below(old, state, before, size)
    else:
        raise ZramfsError(
            errno.EBUSY, f"{state.fs} becomes smaller only while it is not mounted, so nothing was changed; "
            "with --unmount it is unmounted for that moment")
    old.update(size=size)


def _shrink_btrfs(old: Rundir, state: State, before: int, size: int, place: Path) -> None:
    assert state.loop is not None
    # Most of it may be withheld from the users, in files that would have to move, and need not fit beside the
    # data. All of these go for a while. Programs that write much meanwhile are braked, and frozen in the end.
    _send(state, f"govern=spare {before}")
    try:
        try:
            file_system_size.shrink_mounted(size, state.loop, place)
        except ZramfsError as error:
            raise ZramfsError(error.errno or errno.EIO, f"{error}; nothing was changed") from None
        try:
            _shrink_below(old, state, before, size)
        except ZramfsError:
            file_system_size.grow_mounted("btrfs", state.loop, place)
            raise
    finally:
        _send(state, "govern=spare 0")


def _shrink_below(old: Rundir, state: State, before: int, size: int) -> None:
    """The device and its loop device, when the file system has left what is behind `size`."""
    assert state.loop is not None
    _send(state, f"resize={size} discard")
    try:
        loops.follow_size(state.loop, old.disk, size)
    except ZramfsError as error:
        raise ZramfsError(
            error.errno or errno.EIO, f"{error}; {_taken_back(old, state, [], before)}") from None


@contextlib.contextmanager
def _unmounted(old: Rundir, state: State, place: Path) -> Iterator[None]:
    """The file system is unmounted for that moment, and mounted again whatever happens. Raises
    ZramfsError(EBUSY) with who uses it."""
    assert state.loop is not None
    if len(found := ramdisk.places(state.loop)) > 1:
        raise ZramfsError(
            errno.EBUSY, f"{state.loop} is mounted on {' and '.join(map(str, found))}, so nothing was "
            "changed: leave one mount")
    expect_unused(old, state)
    tree = Path(state.directory)
    ramdisk.let_go(tree)
    try:
        ramdisk.unmount(place)
    except ZramfsError:
        ramdisk.govern(tree)
        raise
    try:
        if not loops.wait_unclaimed(state.loop, GONE_TIMEOUT):
            raise ZramfsError(
                errno.EBUSY, f"the file system on {state.loop} lives on without {place}, so somebody uses it "
                "who is not to be seen from here; it is mounted again, and nothing was changed")
        yield
    finally:
        ramdisk.mount(ramdisk.as_it_was(state, place), state.loop)
        ramdisk.govern(tree)
