# SPDX-License-Identifier: Apache-2.0
"""The packages of the checkout, built for a test, and the first commands after an installation."""
from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import zramfs
from tests.support.paths import ROOT
from tests.support.scale import is_full
from tests.support.whole import run, tool_environment

# Of a system that has only what the package brings: no PYTHONPATH, no virtual environment.
BARE = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C.UTF-8"}
# A function of the shell: `use COMMAND DIRECTORY` makes, writes, reads and stops a device, and says USED.
USE = """
set -e
use() {
    "$1" --version
    "$1" create "$2" --size 4M --algo zstd
    printf hello | dd of="$2/disk" conv=notrunc bs=4096 seek=3 oflag=seek_bytes status=none
    dd if="$2/disk" bs=1 skip=3 count=5 status=none; echo
    "$1" status "$2" --noheadings --raw --output ALGORITHM,DISKSIZE,STATE
    "$1" stop "$2"
    [ ! -e "$2" ]
}
"""
USED = [f"zramfs {zramfs.__version__}", "hello", "zstd 4M ready"]


@dataclass(frozen=True)
class Packages:
    directory: Path

    def file(self, pattern: str) -> Path:
        [found] = self.directory.glob(pattern)
        return found


def _take_made(to: Path) -> None:
    """Copies what Cython has made of the checkout's sources, where no source is newer. The environment of the
    build has a Cython of its own, whose .pxd files are newer than anything that was made before. So the
    copies get a time after these: else all of it would be made again, in 30 s of processor time."""
    ahead = time.time() + 24 * 3600
    places = (ROOT / "allocator", ROOT / "zramfs")
    declared = [path.stat().st_mtime for place in places for path in place.rglob("*.pxd")]
    for made in (ROOT / "build/cython").rglob("*.c"):
        name = made.relative_to(ROOT / "build/cython")
        source = (ROOT / name).with_suffix(".pyx")
        if source.exists() and made.stat().st_mtime > max(source.stat().st_mtime, *declared):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            os.utime(shutil.copy(made, to / name), (ahead, ahead))


def build(directory: Path) -> Packages:
    """With scripts/package, which takes half a minute on two idle cores, and many times that on busy ones.

    What Cython has made of the checkout's sources is taken along. Where tests/support/scale.py wants a part,
    nothing is optimised, little compressed, and no package made of the symbols.
    """
    environment = tool_environment()
    if not is_full():
        environment |= {"ZRAMFS_OPTIMIZE": "-O0 -g0", "DPKG_DEB_COMPRESSOR_LEVEL": "1",
                        "DEB_BUILD_OPTIONS": "noautodbgsym"}
    with tempfile.TemporaryDirectory() as place:
        _take_made(Path(place))
        environment["ZRAMFS_BUILD_DIR"] = place
        run(ROOT / "scripts/package", "--output", directory, timeout=1500, env=environment)
    return Packages(directory)
