# SPDX-License-Identifier: Apache-2.0
"""What only the other keys of a device, or the machine, tell of the places that it names."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zramfs.lifecycle import mount_points


def trouble_with_places(values: dict[str, Any], kind: str) -> Iterator[tuple[str, str]]:
    """Keys, and what is wrong with each."""
    place, mode = values.get("mount-point") or values.get("directory"), values.get("mode")
    if place and (trouble := mount_points.needs_mode(place, mode if kind == "ramdisk" else None)):
        yield "mount-point" if kind == "ramdisk" else "directory", trouble
    if "keep-every" in values and "keep" not in values:
        yield "keep-every", "says how often keep is saved: expected keep too"
