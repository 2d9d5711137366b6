# SPDX-License-Identifier: Apache-2.0
"""The packages of the checkout, built for a test, and the first commands after an installation."""
from __future__ import annotations

import shutil
import tempfile
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


def build(directory: Path) -> Packages:
    """With scripts/package, which takes half a minute on two idle cores, and many times that on busy ones.

    What Cython has made of the checkout's sources is taken along, with its times: as in the checkout, it is
    made again of what is newer. Where tests/support/scale.py wants a part, nothing is optimised
    and little compressed.
    """
    environment = tool_environment()
    if not is_full():
        environment |= {"ZRAMFS_OPTIMIZE": "-O0 -g0", "DPKG_DEB_COMPRESSOR_LEVEL": "1"}
    with tempfile.TemporaryDirectory() as place:
        if (made := ROOT / "build/cython").is_dir():
            environment["ZRAMFS_BUILD_DIR"] = shutil.copytree(made, Path(place) / "cython")
        run(ROOT / "scripts/package", "--output", directory, timeout=1500, env=environment)
    return Packages(directory)
