# SPDX-License-Identifier: Apache-2.0
"""Devices as they are configured: up, down, and what that means in words."""
from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from zramfs.errors import ZramfsError
from zramfs.host import safe_paths
from zramfs.lifecycle import claim, images, ramdisk, rundir, start, stop, swap
from zramfs.lifecycle.ramdisk import FileSystem
from zramfs.lifecycle.rundir import Rundir, State
from zramfs.lifecycle.stop import Say
from zramfs.lifecycle.swap import Swap
from zramfs.model.config import Algorithm, DeviceConfig
from zramfs.model.policy import format_age
from zramfs.text.sizes import format_size

from .keys import SWAP_OPTIONS
from .settings import Settings

# $SERVICE_RESULT after which the units start the service again (Restart=on-abnormal), but for a time-out.
KILLED = ("signal", "core-dump", "watchdog", "oom-kill")


def bring_up(wanted: Settings, say: Say, *, foreground: bool = False) -> None:
    """Brings a device up, unless it is up already or this machine is to go without it: says so then.

    foreground: returns when the device has ended, and nothing to serve is a failure. To be called
    while the process has one thread. Raises ZramfsError.
    """
    if wanted.skip is not None:
        if foreground:
            raise ZramfsError(errno.ENODEV, f"it is left out: {wanted.skip}")
        say(f"note: {wanted.name} is left out: {wanted.skip}")
        return
    place = safe_paths.resolve(wanted.place) if wanted.place else None
    standing = _standing(wanted.name)
    if foreground and standing is None and _goes_on(wanted.name):
        return
    if standing is not None:
        _expect_same(wanted, place, standing)
        if foreground:
            raise ZramfsError(errno.EBUSY, f"it is up already, served by pid {standing.pid}")
        say(f"note: {wanted.name} is up already")
        return
    on_top = wanted.on_top
    match on_top:
        case Swap():
            swap.expect_able()
        case FileSystem():
            ramdisk.expect_able(on_top.type)
            assert place is not None
            on_top = replace(on_top, mountpoint=place)
    if place is not None:
        _make_parents(place)
    config, on_top = images.with_kept(wanted.config, on_top, say)
    new, config = claim.claim_place(
        place, wanted.kind, config, say=say, name=wanted.name,
        mode=on_top.mode if isinstance(on_top, FileSystem) else None)
    if foreground:
        start.serve_in_foreground(new, config, say, on_top)
    else:
        start.start_device(new, config, on_top, say)
        say(f"{wanted.name} is up" + (f" on {place}" if place else ""))


def _make_parents(place: Path) -> None:
    """As systemd does it for its mount units; they stay."""
    try:
        safe_paths.make_parents(place)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise
        number = error.errno or errno.EIO
        raise ZramfsError(
            number, f"{place.parent} is not there and cannot be made: {os.strerror(number)}") from None


def _goes_on(name: str) -> bool:
    """Whether the service manager had something to go on with, and that has ended in order by now. Raises
    ZramfsError: a manager starts what was killed again by itself, and must not get an empty device."""
    left = _find(name)
    if left is None or start.resume_in_foreground(left):
        return left is not None
    if "NOTIFY_SOCKET" in os.environ and left.read():
        raise ZramfsError(
            errno.EOWNERDEAD, "its processes were killed, and nothing was kept of it: its data is gone. The "
            "next start makes a new, empty one")
    return False


def bring_down(name: str, say: Say) -> bool:
    """Ends the device that was brought up under this name. False if there is none.

    Raises ZramfsError: EBUSY with what uses it.
    """
    found = _find(name)
    if found is not None and _was_killed(found):
        say(f"note: {name} was killed, and is left as it is for the next start, which goes on with it")
    elif found is not None:
        stop.stop_device(found, say)
    return found is not None


def _was_killed(found: Rundir) -> bool:
    """In ExecStopPost= of a service all of whose processes were killed."""
    state = found.read()
    return os.environ.get("SERVICE_RESULT") in KILLED and not (state and state.alive())


def is_there(name: str) -> bool:
    """Whether a device of this name is there, alive or dead."""
    return _find(name) is not None


def _find(name: str) -> Rundir | None:
    return next((each for each in rundir.rundirs() if each.name == name), None)


def _standing(name: str) -> State | None:
    """The state of the device that is up under this name. One that died is none: claim() cleans it up."""
    found = _find(name)
    state = found.read() if found else None
    return state if state is not None and state.alive() else None


def _expect_same(wanted: Settings, place: Path | None, standing: State) -> None:
    if standing.phase != "ready":
        raise ZramfsError(
            errno.EBUSY,
            f"it is just being started (daemon pid {standing.pid}, since {standing.created})",
        )
    if wanted.kind != standing.kind or (place is not None and str(place) != standing.where):
        raise ZramfsError(
            errno.EBUSY,
            f"it is up as {_kind(standing.kind, standing.where)}, and configured as "
            f"{_kind(wanted.kind, place)}: `zramfs down {wanted.name}` first",
        )


def _kind(kind: str, place: object) -> str:
    return kind if kind == "swap" else f"a {kind} on {place}"


def _algorithm(algorithm: Algorithm) -> str:
    """As the configuration has it."""
    parameters = [] if algorithm.level is None else [f"level={algorithm.level}"]
    if algorithm.dictionary is not None:
        parameters.append(f"dict={algorithm.dictionary}")
    return algorithm.name + (f"({','.join(parameters)})" if parameters else "")


def _memory(config: DeviceConfig) -> Iterator[str]:
    if config.keep_free is not None:
        yield f"{format_size(config.keep_free)} of the host's memory kept free"
    if config.lock:
        yield "its memory is locked, and never swapped out"
    if config.standby:
        yield "a standby takes over when the daemon dies"


def _rights(of: DeviceConfig | FileSystem) -> list[str]:
    given = (
        (of.mode, f"mode {of.mode or 0:04o}"), (of.owner, f"owner {of.owner}"),
        (of.group, f"group {of.group}"))
    return [text for value, text in given if value is not None]


def describe_settings(wanted: Settings) -> Iterator[str]:
    """Lines for people: what a device is, with everything that is not left to its default."""
    config = wanted.config
    rights: DeviceConfig | FileSystem = config
    match wanted.on_top:
        case FileSystem() as top:
            rights = top
            options = f" with {top.options}" if top.options else ""
            yield f"a RAM disk: {top.type} on {wanted.place}, mounted{options}"
        case Swap() as top:
            word = next(word for word, discard in SWAP_OPTIONS.items() if discard == top.discard)
            options = f" with {word}" if word else ""
            chosen = " (the kernel chooses)" if top.priority < 0 else ""
            yield f"swap of priority {top.priority}{chosen}{options}"
            kernel = "" if top.min_free is None else f", {format_size(top.min_free)} kept free by the kernel"
            yield f"{format_size(config.reserve)} of memory kept ready{kernel}"
        case _:
            users = ", for all users" if config.allow_other else ""
            yield f"a plain device: {wanted.place}/disk{users}"
    if wanted.skip is not None:
        yield f"left out here: {wanted.skip}"
    limit = f", at most {format_size(config.mem_limit)} of memory" if config.mem_limit else ""
    yield f"size {format_size(config.size)}{limit}"
    yield from _memory(config)
    first, *others = map(_algorithm, config.algorithms)
    then = f", recompressed with {' or '.join(others)}" if others else ""
    yield f"compressed with {first}{then}"
    for policy in config.policies:
        yield f"policy: {policy}"
    if config.writeback is not None:
        yield f"written back to {config.writeback}"
    if config.keep is not None:
        every = f", and every {format_age(config.keep_every)}" if config.keep_every else ""
        yield f"kept in {config.keep}: restored from it, saved there at the end{every}"
    if config.wipe:
        yield "what is discarded or overwritten is zeroed"
    if words := _rights(rights):
        yield ", ".join(words)
    yield f"{config.threads} threads, proactiveness {config.proactiveness}, density {config.density}"
