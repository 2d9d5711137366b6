# SPDX-License-Identifier: Apache-2.0
"""What scripts/wheels and scripts/cross try of what they have built: try_wheel.py API.MD PLACE [ZRAMFS]

PLACE: the directory that the packages must come from. ZRAMFS: the installed command, with which a device is
made where /dev/fuse can be opened. Ends with a traceback if anything is wrong.
"""
from __future__ import annotations

import doctest
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import allocator
import zramfs
from zramfs.codecs.codec import Codec
from zramfs.store.resize import resize
from zramfs.store.store import Store

PAGE, MIB = 4096, 1 << 20


def expect_below(place: Path) -> None:
    """Not what lies in a checkout."""
    for package in (allocator, zramfs):
        assert Path(str(package.__file__)).is_relative_to(place), package.__file__


def try_allocator(page: str) -> None:
    result = doctest.testfile(page, module_relative=False)
    assert result.attempted >= 15 and result.failed == 0


def try_store() -> None:
    """Pages of all kinds through every codec, recompression's decoder included, and another size."""
    pages = [os.urandom(PAGE), b"text of a page " * 273 + b"!", bytes(PAGE), os.urandom(64) * 64]
    for algo in ("lz4", "lz4hc", "zstd", "none"):
        store = Store(8 * MIB, algo=algo, secondary=(Codec("zstd", 9),), grows_to=16 * MIB)
        for number in range(2048):
            store.write(number * PAGE, pages[number % 4])
        resize(store, 16 * MIB)
        store.write(15 * MIB, pages[1])
        assert all(store.read(number * PAGE, PAGE) == pages[number % 4] for number in range(2048))
        store.zero(0, 4 * MIB)
        store.compact()
        store.migration.run()
        store.check(3)
        store.close()


def try_device(command: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory) / "z"
        subprocess.run([command, "create", place, "--size", "16M", "--algo", "zstd"], check=True, timeout=60)
        try:
            data = os.urandom(MIB) * 8
            (place / "disk").write_bytes(data)
            subprocess.run([command, "resize", place, "32M"], check=True, timeout=60)
            assert (place / "disk").stat().st_size == 32 * MIB
            with open(place / "disk", "rb") as disk:
                assert disk.read(len(data)) == data
        finally:
            subprocess.run([command, "stop", place], check=True, timeout=60)


def main() -> None:
    expect_below(Path(sys.argv[2]))
    try_allocator(sys.argv[1])
    try_store()
    tried = "allocator, codecs, store"
    if len(sys.argv) > 3 and os.access("/dev/fuse", os.R_OK | os.W_OK):
        try_device(sys.argv[3])
        tried += ", a device"
    print(f"Python {sys.version.split()[0]} on {os.uname().machine}: {tried}")


main()
