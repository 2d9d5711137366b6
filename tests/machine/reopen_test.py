# SPDX-License-Identifier: Apache-2.0
"""A device whose file was closed a moment ago, or whose size changed a moment ago, is used as if time had
passed."""
from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.served import served_device, served_lane
from tests.support.wire import MIB

pytestmark = [pytest.mark.requires("fuse")]


def test_a_reset_right_after_close_is_never_busy(tmp_path: Path) -> None:
    with served_device(tmp_path / "z") as z:
        for turn in range(300):
            z.write("zram/disksize", "4M")
            fd = os.open(z.disk, os.O_RDWR)
            os.pwrite(fd, random.Random(turn).randbytes(65536), 0)
            os.close(fd)
            z.write("zram/reset", "1")
        assert z.stop() == 0, z.log


# Opens the file for a moment, again and again. A mapping is touched at its end, where an access is a SIGBUS
# if the kernel takes the file for shorter than it is.
CLIENT = """
import ctypes, os, random, sys, time
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
path, kind, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
while True:
    if kind == "stat":
        os.stat(path)
        time.sleep(0.0005)
        continue
    try:
        fd = os.open(path, os.O_RDWR)
    except OSError:
        continue
    if kind == "write":
        for _ in range(20):
            os.pwrite(fd, b"x" * 4096, 0)
    elif kind == "map" or os.fstat(fd).st_size == size:
        mapped = libc.mmap(None, size, 3, 1, fd, 0)
        ctypes.string_at(mapped + size - 1, 1)
        libc.munmap(mapped, size)
    else:
        sys.exit("fstat shows an old size")
    os.close(fd)
    time.sleep(random.random() * 0.02)
"""
KINDS = ("fstat and map", "fstat and map", "map", "map", "write", "stat")


def test_a_mapping_right_after_a_set_up_is_as_long_as_the_device(tmp_path: Path) -> None:
    """Every change of the size meets clients that map, write and stat (S44 in docs/concurrency.md)."""
    with served_lane(tmp_path, MIB) as disk:
        clients = {kind + str(n): subprocess.Popen([sys.executable, "-c", CLIENT, disk.path, kind, str(MIB)])
                   for n, kind in enumerate(KINDS)}
        try:
            changes, end = 0, time.monotonic() + 60
            while changes < 300 and (time.monotonic() < end or changes < 100):
                if disk.call("claim"):
                    changes += 1
                    disk.call("resize", 0)
                    time.sleep(0.003)  # for a stat that finds the size 0
                    disk.call("resize", MIB)
                    disk.call("release_claim")
                time.sleep(0.004)
                ended = {name: each.returncode for name, each in clients.items() if each.poll() is not None}
                assert not ended, f"after {changes} changes; {-signal.SIGBUS} is SIGBUS"
        finally:
            for each in clients.values():
                each.kill()
                each.wait()
