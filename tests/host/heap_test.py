# SPDX-License-Identifier: Apache-2.0
"""zramfs/host/heap: memory that was freed is not kept."""
from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.paths import python_environment

# A large block that is freed raises the threshold of glibc. The next one then comes from the heap, and a
# small block behind it is enough to keep it there.
PROGRAM = """
import ctypes, sys
from pathlib import Path
from zramfs.host import heap

def resident():
    return next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith("RssAnon:"))

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = libc.malloc.argtypes = [ctypes.c_void_p]
if "give" in sys.argv:
    heap.give_large_blocks_back()
libc.free(libc.malloc(16 << 20))
before = resident()
block = libc.malloc(8 << 20)
ctypes.memset(block, 1, 8 << 20)
behind = libc.malloc(100)
libc.free(block)
print(resident() - before)
"""


def _kept(*words: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, timeout=60,
                          env=python_environment(), check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.requires("unsanitized")
def test_a_large_block_that_is_freed_is_not_resident_any_more_whatever_lies_behind_it() -> None:
    assert _kept("give") < 4 << 20
