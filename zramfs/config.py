# SPDX-License-Identifier: Apache-2.0
"""What a device is started with. Plain values, decided by the command line; imports nothing of zramfs."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DEFAULT_ALGO = "lz4"
DEFAULT_THREADS = 2


@dataclass(frozen=True)
class DeviceConfig:
    """One device. Paths are absolute and resolved; sizes are bytes.

    directory    where the tree (control, zram/, ...) is mounted
    rundir       private directory with `disk` (regular file the lane is mounted on), state.json, log
    size         of the device, rounded up to 4096 by the store; 0 = not set up yet
    algo, level  codec; level None = the codec's own default
    mem_limit    of the pool, 0 = none
    threads      of the lane, at least 1
    name         shown as the file system's source in /proc/mounts
    allow_other  other users may use the mounts (FUSE's option of that name)
    """

    directory: Path
    rundir: Path
    size: int = 0
    algo: str = DEFAULT_ALGO
    level: int | None = None
    mem_limit: int = 0
    threads: int = DEFAULT_THREADS
    name: str = "zramfs"
    allow_other: bool = False
