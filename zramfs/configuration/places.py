# SPDX-License-Identifier: Apache-2.0
"""What only the other keys of a device, or the machine, tell of the places that it names."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zramfs.host import signatures
from zramfs.lifecycle import mount_points


def trouble_with_places(values: dict[str, Any], kind: str) -> Iterator[tuple[str, str]]:
    """Keys, and what is wrong with each."""
    place, mode = values.get("mount-point") or values.get("directory"), values.get("mode")
    if place and (trouble := mount_points.needs_mode(place, mode if kind == "ramdisk" else None)):
        yield "mount-point" if kind == "ramdisk" else "directory", trouble
    if "writeback-device" in values and (held := _held_by(values["writeback-device"])):
        yield "writeback-device", (
            f"expected a block device, or a file that is there for this alone; {values['writeback-device']} "
            f"holds {held}")


def _held_by(path: Path) -> str | None:
    """Of files only: a device is looked at when it is taken. What cannot be read now may be there then."""
    try:
        return signatures.held_by(path) if path.is_file() else None
    except OSError:
        return None
