# SPDX-License-Identifier: Apache-2.0
"""What a configuration means, as values for JSON: docs/zramfs.schema.json has the shape."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from zramfs.lifecycle.ramdisk import FileSystem
from zramfs.lifecycle.swap import Swap

from .files import Complaint
from .settings import ConfiguredDevice, Settings


def configuration_values(
    devices: Iterable[ConfiguredDevice], others: Iterable[Complaint]
) -> dict[str, Any]:
    """others: complaints about what belongs to no device."""
    listed = list(devices)
    unplaced = list(others)
    everything = [*unplaced, *(each for device in listed for each in device.complaints)]
    return {
        "sound": not any(each.is_error for each in everything),
        "devices": [_device(each) for each in listed],
        "complaints": [_complaint(each) for each in unplaced],
    }


def _complaint(each: Complaint) -> dict[str, Any]:
    return {"file": str(each.file), "line": each.line, "key": each.key, "sentence": each.sentence,
            "level": "error" if each.is_error else "warning"}


def _device(device: ConfiguredDevice) -> dict[str, Any]:
    """settings: null if there is an error."""
    return {
        "name": device.name,
        "files": [str(file) for file in device.files],
        "settings": _settings(device.settings) if device.settings else None,
        "complaints": [_complaint(each) for each in device.complaints],
    }


def _settings(wanted: Settings) -> dict[str, Any]:
    config = wanted.config
    values: dict[str, Any] = {
        "kind": wanted.kind,
        "place": _text(wanted.place),
        "skip": wanted.skip,
        "size": config.size,
        "mem_limit": config.mem_limit,
        "keep_free": config.keep_free,
        "lock": config.lock,
        "algorithms": [
            {"name": each.name, "level": each.level, "dictionary": _text(each.dictionary)}
            for each in config.algorithms],
        "policies": [str(policy) for policy in config.policies],
        "density": str(config.density),
        "writeback": _text(config.writeback),
        "threads": config.threads,
        "proactiveness": config.proactiveness,
        "wipe": config.wipe,
        "keep": _text(config.keep), "keep_every": config.keep_every,
        "allow_other": config.allow_other,
        "mode": _mode(config.mode), "owner": config.owner, "group": config.group,
        "swap": None, "file_system": None,
    }
    match wanted.on_top:
        case Swap() as top:
            values["swap"] = {"priority": top.priority, "discard": top.discard, "reserve": config.reserve,
                              "min_free": top.min_free}
        case FileSystem() as top:
            values |= {"mode": _mode(top.mode), "owner": top.owner, "group": top.group}
            values["file_system"] = {"type": top.type, "options": top.options}
    return values


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _mode(mode: int | None) -> str | None:
    return None if mode is None else f"{mode:04o}"
