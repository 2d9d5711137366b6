# SPDX-License-Identifier: Apache-2.0
"""The settings of a device that its user has changed, for a daemon that takes over, and their way back.

What is stored, its algorithms and the memory limit are in the memory file; this is the rest.
"""
from __future__ import annotations

import logging
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zramfs.errors import ZramfsError
from zramfs.lane.lane import PAGE_VERSION
from zramfs.model.config import Algorithm
from zramfs.model.density import parse_density
from zramfs.model.policy import parse_policy
from zramfs.model.stats import LaneStats, Latency
from zramfs.store import record
from zramfs.store.record import is_kept
from zramfs.store.store import Store

from .algorithms import Entry, read_dictionary
from .mapped_memory import MappedMemory

if TYPE_CHECKING:
    from .device import Device

log = logging.getLogger(__package__)

# What another version may find and must be able to read, by name. settings: of settings_of(); raised when
# restore() asks for something that an older version did not write.
LAYOUTS = {**record.LAYOUTS, "page": PAGE_VERSION, "settings": 1}


def settings_of(device: Device) -> dict[str, Any]:
    """Plain values, for JSON."""
    return {
        "algorithms": [each and _packed(each) for each in device._algorithms],
        "mem_limit": device._mem_limit,
        "access_times": device._access_times,
        "proactiveness": device.compactor.proactiveness,
        "keep_free": device.host_memory.headroom.keep_free,
        "policies": [str(each.policy) for each in device.policies.stats() if each.policy],
        "ledgers": device.policies.ledgers(),
        "density": str(device.density.wanted),
        "density_steps": device.density.kept(),
        "backing": vars(device.backing_store.settings),
        "governed": device.governor.is_governing,
        "keep": None if device.kept_image.path is None else os.fspath(device.kept_image.path),
        "keep_due": device.kept_image.due,
        "last_error": device._last_error,
        "dictionaries": device.dictionaries.kept(),
        "lane_before": device._lane_before and asdict(device._lane_before),
    }


async def restore(
    device: Device, saved: dict[str, Any], backing: int | None, mapped: MappedMemory,
) -> None:
    """Gives a device that was just made what its predecessor had: settings, and the store in its memory file.
    backing: the descriptor of its backing store. Raises ZramfsError, OSError or ValueError when the memory
    file can't be adopted; it is unchanged then."""
    _take_settings(device, saved)
    if saved["backing"]["path"] is not None and backing is not None:
        await device.backing_store.adopt(saved["backing"], backing)
    assert device.memory_file is not None  # a successor has one
    if is_kept(device.memory_file):
        # On the loop itself, which has nothing else to do: to change threads takes 20 to 50 ms on busy CPUs.
        store = Store.adopt(mapped.take(device.memory_file), backing=device.backing_store.backing,
                            reserve=device._config.reserve, headroom=device.host_memory.headroom)
        try:
            device._lane.set_store(store)
        except BaseException:
            store.leave()
            raise
        device._store = store
        assert (found := store.recovered) is not None
        log.warning(
            "%s: %d pages are taken over after %.1f ms: %d were in use, %d are lost; %d objects, %d frames "
            "and %d pageblocks that nothing names are free again", device._config.name, found.pages,
            found.ns / 1e6,
            found.locks, found.lost, found.objects_freed, found.frames_freed, found.pageblocks_freed)
    device._algorithms = tuple([
        await _unpacked(device, number, found) if found else _taken_since(device, number)
        for number, found in enumerate(saved["algorithms"])])
    if saved["governed"]:
        device.governor.inherit()


def _take_settings(device: Device, saved: dict[str, Any]) -> None:
    """Those that need no store."""
    device._mem_limit = saved["mem_limit"]
    device._access_times = saved["access_times"]
    device.kept_image.path = None if saved["keep"] is None else Path(saved["keep"])
    device._last_error = saved["last_error"]
    device._lane_before = _lane_stats(saved.get("lane_before"))
    device.dictionaries.inherit(saved.get("dictionaries"))
    device.compactor.proactiveness = saved["proactiveness"]
    device.host_memory.headroom.keep_free = saved["keep_free"]
    for text in saved["policies"]:
        device.policies.set(*parse_policy(text))
    device.policies.take_ledgers(saved["ledgers"])
    # A daemon of an older version has had none.
    device.density.set(parse_density(saved.get("density", "off")))
    device.density.inherit(saved.get("density_steps"))
    device.kept_image.inherit(saved.get("keep_due"))


def _lane_stats(found: dict[str, Any] | None) -> LaneStats | None:
    if found is None:
        return None
    latency = tuple(Latency(tuple(each["counts"]), each["ns"]) for each in found["latency"])
    return LaneStats(**{**found, "latency": latency})


def _packed(entry: Entry) -> list[Any]:
    algorithm = entry.algorithm
    path = None if algorithm.dictionary is None else os.fspath(algorithm.dictionary)
    return [algorithm.name, algorithm.level, path, entry.written]


def _taken_since(device: Device, number: int) -> Entry | None:
    """The algorithm that a store has taken after its daemon had said which ones there are
    (Device.take_secondary())."""
    store = device._store
    codec = store.codecs[number] if store and not store.generations[number] else None
    return Entry(Algorithm(codec.algo, codec.level), codec.dictionary) if codec else None


async def _unpacked(device: Device, number: int, found: list[Any]) -> Entry:
    """Of a device that is set up with the dictionary that it has, of another with the file's."""
    name, level, path, written = found
    algorithm = Algorithm(name, level, None if path is None else Path(path))
    content = None
    if device._store is not None:
        codec = device._store.codecs[number]
        content = codec.dictionary if codec else None
    elif algorithm.dictionary is not None:
        try:
            content = await device._in_thread(partial(read_dictionary, algorithm.dictionary))
        except ZramfsError as error:
            log.error("%s: the algorithm %s has no dictionary any more: %s", device._config.name, name, error)
            algorithm = Algorithm(name, level)
    return Entry(algorithm, content, written)


