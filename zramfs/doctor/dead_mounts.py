# SPDX-License-Identifier: Apache-2.0
"""Mounts of ours whose daemon is gone."""
from __future__ import annotations

import errno
import os
import time
from functools import partial
from pathlib import Path

from zramfs.host import bounded, mounts


def _block_size(place: Path) -> int:
    return os.statvfs(place).f_bsize


def dead_mounts() -> list[Path]:
    """Mount points of ours whose connection is closed. One that hangs may live on, so it is none."""
    places = [mount.mountpoint for mount in mounts.mounts() if mount.fstype.startswith("fuse.zramfs")]
    # In children, which may hang. Attributes can come from a cache, a file system's numbers never do.
    calls = [(mount, bounded.Call(partial(_block_size, mount))) for mount in places]
    deadline = time.monotonic() + bounded.ANSWER_TIMEOUT
    dead = []
    for mount, call in calls:
        try:
            call.result(deadline)
        except OSError as error:
            if error.errno == errno.ENOTCONN:
                dead.append(mount)
    return dead
