# SPDX-License-Identifier: Apache-2.0
"""Saves of an image that are killed at one point after the other: `python -m tests.support.killed_saves DIR`.

Prints a JSON object: by point, the names in the directory and whether the image is the old one or the new
one, both after the kill and after the next start has removed what was left.
"""
from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from zramfs.image.layout import Head, SavedAlgorithm
from zramfs.image.writer import ImageWriter, remove_left

# The call of the system that the save dies at, which time it is called, and whether before or after it.
POINTS = {
    "after the head": ("write", 1, False), "before it is on the disk": ("fsync", 1, True),
    "before it has a name": ("link", 1, True), "when it has a name": ("link", 1, False),
    "before the rename": ("rename", 1, True), "after the rename": ("rename", 1, False),
    "before the directory is on the disk": ("fsync", 3, True),
}


def main() -> None:
    place = Path(sys.argv[1])
    path, found = place / "image", {}
    _save(path, b"old")
    old = path.read_bytes()
    for name, point in POINTS.items():
        pid = os.fork()
        if pid == 0:
            _die_at(*point)
            _save(path, b"new")
            os._exit(0)
        killed = os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        seen = [_names(place, path, old)]
        remove_left(path)
        found[name] = [killed, *seen, _names(place, path, old)]
        _save(path, b"old")
        assert path.read_bytes() == old
    print(json.dumps(found))


def _names(place: Path, path: Path, old: bytes) -> list[str]:
    return [*sorted(os.listdir(place)), "old" if path.read_bytes() == old else "new"]


def _save(path: Path, data: bytes) -> None:
    writer = ImageWriter(path)
    algorithms = SavedAlgorithm("lz4", 1), None, None, None
    writer.head(Head(bytes(16), 1 << 20, 1, 1, algorithms, bytes(72), "test"))
    writer.part(bytes(8), data)
    writer.commit()
    writer.close()


def _die_at(name: str, time: int, before: bool) -> None:
    real: Callable[..., object] = getattr(os, name)
    count = 0

    def call(*arguments: object, **options: object) -> object:
        nonlocal count
        count += 1
        if before and count == time:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **options)
        if count == time:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(os, name, call)


if __name__ == "__main__":
    main()
