# SPDX-License-Identifier: Apache-2.0
"""What `zramfs metrics` gathers, without daemons."""
from __future__ import annotations

import os
from pathlib import Path

from tests.support.fakes import FakeLane
from zramfs.device.device import Device
from zramfs.model.config import DeviceConfig
from zramfs.tree import metrics
from zramfs.views.gathered import Source

PAGE = 4096


async def source_in(place: Path, name: str, pages: int = 0, **config: object) -> Source:
    """A directory in place of the tree of a device, with what its `metrics` says. config: of the device, in
    place of 1 MiB without anything else."""
    settings = {"size": 1 << 20, **config}
    device = Device(DeviceConfig(place / name, place / "run", name=name, **settings), FakeLane())
    await device.start()
    for page in range(pages):
        device._lane.store.write(page * PAGE, os.urandom(2000).ljust(PAGE, b"z"))
    (place / name).mkdir()
    (place / name / "metrics").write_bytes(metrics.openmetrics_text(device))
    await device.close()
    return Source(name, place / name, "device", f"/mnt/{name}")
