# SPDX-License-Identifier: Apache-2.0
"""What a daemon leaves in writing to the next one: a device's description and settings, as JSON in a memfd.

The keeper holds the descriptor. A text is written beside the last one, and becomes the one that counts with
the eight bytes that say where it is, so a kill at any moment leaves the old text or the new one.
"""
from __future__ import annotations

import json
import os
import struct
from dataclasses import fields
from pathlib import Path
from typing import Any

from zramfs.model.config import Algorithm, DeviceConfig
from zramfs.model.density import parse_density
from zramfs.model.policy import parse_policy

PAPERS_VERSION = 1  # of the names in them, and of what packed_config() makes
_WHERE = struct.Struct("=II")  # offset and length; at the beginning
_PLACES = (4096, 1 << 20)
_MOST = _PLACES[1] - _PLACES[0]
_PATHS = ("directory", "rundir", "writeback", "restore", "keep")


class Papers:
    def __init__(self, fd: int) -> None:
        """fd: a memory file, empty or with papers."""
        self.fd = fd

    def write(self, found: dict[str, Any]) -> None:
        """Raises OSError, and leaves what was there."""
        text = json.dumps(found).encode()
        assert len(text) <= _MOST, f"expected at most {_MOST} bytes of settings, got {len(text)}"
        offset = _PLACES[self._where()[0] == _PLACES[0]]
        os.pwrite(self.fd, text, offset)
        os.pwrite(self.fd, _WHERE.pack(offset, len(text)), 0)

    def read(self) -> dict[str, Any]:
        """Empty before the first write()."""
        offset, length = self._where()
        return json.loads(os.pread(self.fd, length, offset)) if length else {}

    def _where(self) -> tuple[int, int]:
        head = os.pread(self.fd, _WHERE.size, 0)
        return _WHERE.unpack(head) if len(head) == _WHERE.size else (0, 0)


def packed_config(config: DeviceConfig) -> dict[str, Any]:
    """For papers."""
    found = {each.name: getattr(config, each.name) for each in fields(config)}
    for name in _PATHS:
        found[name] = None if found[name] is None else os.fspath(found[name])
    found["algorithms"] = [packed_algorithm(each) for each in config.algorithms]
    found["policies"] = [str(each) for each in config.policies]
    found["density"] = str(config.density)
    return found


def unpacked_config(found: dict[str, Any]) -> DeviceConfig:
    """A field that another version does not know has its default there."""
    known = {each.name for each in fields(DeviceConfig)}
    values = {name: value for name, value in found.items() if name in known}
    for name in _PATHS:
        if values.get(name) is not None:
            values[name] = Path(values[name])
    values["algorithms"] = tuple(map(unpacked_algorithm, found["algorithms"]))
    policies = (parse_policy(each)[1] for each in found["policies"])
    values["policies"] = tuple(each for each in policies if each)
    if "density" in found:
        values["density"] = parse_density(found["density"])
    return DeviceConfig(**values)


def packed_algorithm(algorithm: Algorithm) -> list[Any]:
    dictionary = algorithm.dictionary
    return [algorithm.name, algorithm.level, None if dictionary is None else os.fspath(dictionary)]


def unpacked_algorithm(found: list[Any]) -> Algorithm:
    name, level, dictionary = found
    return Algorithm(name, level, None if dictionary is None else Path(dictionary))
