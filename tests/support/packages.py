# SPDX-License-Identifier: Apache-2.0
"""The packages of the checkout, built for a test, and the first commands after an installation."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import zramfs
from tests.support.paths import ROOT
from tests.support.whole import run

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
    """With scripts/package: 30 s on two idle cores, and four times that where others are at work."""
    run(ROOT / "scripts/package", "--output", directory, timeout=380)
    return Packages(directory)
