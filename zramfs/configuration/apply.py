# SPDX-License-Identifier: Apache-2.0
"""Devices as they are configured: up, down, and what that means in words."""
from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from zramfs.errors import ZramfsError
from zramfs.host import paths
from zramfs.lifecycle import claim, ramdisk, rundir, start, stop, swap
from zramfs.lifecycle.rundir import Rundir, State
from zramfs.lifecycle.start import OnTop
from zramfs.lifecycle.stop import Say
from zramfs.model.config import Algorithm, DeviceConfig
from zramfs.text.sizes import format_size

from .keys import SWAP_OPTIONS
from .settings import Settings


def up(wanted: Settings, say: Say, *, foreground: bool = False) -> None:
    """Brings a device up, unless it is up already or this machine is to go without it: says so then.

    foreground: returns when the device has ended, and nothing to serve is a failure. To be called
    while the process has one thread. Raises ZramfsError.
    """
    if wanted.skip is not None:
        if foreground:
            raise ZramfsError(errno.ENODEV, f"it is left out: {wanted.skip}")
        say(f"{wanted.name} is left out: {wanted.skip}")
        return
    place = paths.resolve(wanted.place) if wanted.place else None
    standing = _standing(wanted.name)
    if standing is not None:
        _expect_same(wanted, place, standing)
        if foreground:
            raise ZramfsError(errno.EBUSY, f"it is up already, served by pid {standing.pid}")
        say(f"{wanted.name} is up already")
        return
    on_top = _on_top(wanted, place)
    if place is not None:
        _make_parents(place)
    new = claim.claim_place(
        place, wanted.kind, threads=wanted.threads, shared=wanted.allow_other, say=say, name=wanted.name
    )
    config = _device_config(wanted, new, place if on_top is None and place is not None else new.tree)
    if foreground:
        start.serve_in_foreground(new, config, say, on_top)
    else:
        start.start_device(new, config, on_top, say)
        say(f"{wanted.name} is up" + (f" on {place}" if place else ""))


def _make_parents(place: Path) -> None:
    """As systemd does it for its mount units; they stay."""
    try:
        os.makedirs(place.parent, mode=0o755, exist_ok=True)
    except OSError as error:
        raise ZramfsError(
            error.errno or errno.EIO, f"{place.parent} is not there and cannot be made: {error.strerror}"
        ) from None


def down(name: str, say: Say) -> bool:
    """Ends the device that was brought up under this name. False if there is none.

    Raises ZramfsError: EBUSY with what uses it.
    """
    found = _find(name)
    if found is not None:
        stop.stop_device(found, say)
    return found is not None


def known(name: str) -> bool:
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


def _on_top(wanted: Settings, place: Path | None) -> OnTop:
    """What is to be built on `disk`. Raises ZramfsError if this process cannot do that."""
    if wanted.kind == "swap":
        swap.expect_able()
        return swap.Swap(wanted.swap_priority, SWAP_OPTIONS[wanted.options], wanted.min_free)
    if wanted.kind == "device":
        return None
    assert place is not None
    ramdisk.expect_able(wanted.fs)
    return ramdisk.FileSystem(
        wanted.fs, place, options=wanted.options, mode=wanted.mode, owner=wanted.owner, group=wanted.group
    )


def _device_config(wanted: Settings, new: Rundir, directory: Path) -> DeviceConfig:
    """mode, owner and group are those of `disk`, or of the file system on it."""
    primary, *secondary = wanted.algorithms
    plain = wanted.kind == "device"
    return DeviceConfig(
        directory=directory, rundir=new.path, size=wanted.size, algo=primary.name,
        level=primary.level, dictionary=primary.dictionary, secondary=tuple(secondary),
        policies=wanted.policies, mem_limit=wanted.mem_limit, threads=wanted.threads,
        name=wanted.name, allow_other=wanted.allow_other, proactiveness=wanted.proactiveness,
        mode=wanted.mode if plain else None, owner=wanted.owner if plain else None,
        group=wanted.group if plain else None, reserve=wanted.reserve if wanted.kind == "swap" else 0,
        writeback=wanted.writeback_device,
    )


def _algorithm(algorithm: Algorithm) -> str:
    """As the configuration has it."""
    parameters = [] if algorithm.level is None else [f"level={algorithm.level}"]
    if algorithm.dictionary is not None:
        parameters.append(f"dict={algorithm.dictionary}")
    return algorithm.name + (f"({','.join(parameters)})" if parameters else "")


def describe(wanted: Settings) -> Iterator[str]:
    """Lines for people: what a device is, with everything that is not left to its default."""
    match wanted.kind:
        case "ramdisk":
            options = f" with {wanted.options}" if wanted.options else ""
            yield f"a RAM disk: {wanted.fs} on {wanted.mount_point}, mounted{options}"
        case "device":
            users = ", for all users" if wanted.allow_other else ""
            yield f"a plain device: {wanted.directory}/disk{users}"
        case _:
            options = f" with {wanted.options}" if wanted.options else ""
            chosen = " (the kernel chooses)" if wanted.swap_priority < 0 else ""
            yield f"swap of priority {wanted.swap_priority}{chosen}{options}"
            free = wanted.min_free
            kernel = "" if free is None else f", {format_size(free)} kept free by the kernel"
            yield f"{format_size(wanted.reserve)} of memory kept ready{kernel}"
    if wanted.skip is not None:
        yield f"left out here: {wanted.skip}"
    limit = f", at most {format_size(wanted.mem_limit)} of memory" if wanted.mem_limit else ""
    yield f"size {format_size(wanted.size)}{limit}"
    first, *others = map(_algorithm, wanted.algorithms)
    then = f", recompressed with {' or '.join(others)}" if others else ""
    yield f"compressed with {first}{then}"
    for policy in wanted.policies:
        yield f"policy: {policy}"
    if wanted.writeback_device is not None:
        yield f"written back to {wanted.writeback_device}"
    rights = [
        text for value, text in (
            (wanted.mode, f"mode {wanted.mode or 0:04o}"), (wanted.owner, f"owner {wanted.owner}"),
            (wanted.group, f"group {wanted.group}"),
        ) if value is not None
    ]
    if rights:
        yield ", ".join(rights)
    yield f"{wanted.threads} threads, proactiveness {wanted.proactiveness}"
