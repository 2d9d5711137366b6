# SPDX-License-Identifier: Apache-2.0
"""Counts, from outside, which functions of the heap and of the memory mapping the serving threads of a
program call (zramfs-lane*, zramfs-slow*). A test can also have the GIL held, or delay a thread."""
from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from tests.support.native import compiled
from tests.support.paths import SUPPORT, python_path
from tests.support.whole import wait_until

KINDS = ("heap", "mapping", "holes", "threads")
_HEAD, _COUNT = struct.Struct("=III20s"), struct.Struct("=Q56s")  # struct watch of lane_watch.c
_HELD_AT, _LATE_AT = 4, 8

# Python imports it at its start. A daemon is a fork of the process that becomes its keeper, and a standby is
# one of the daemon. Only the process that serves is to hold its GIL.
_SITE = """
import ctypes, os, threading, time
def serves():
    for thread in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{thread}/comm") as comm:
                if comm.read().startswith("zramfs-lane"):
                    return True
        except OSError:
            pass
    return False
def hold(hook):
    while True:
        if serves():
            hook.hold_gil()
        time.sleep(0.005)
def begin():
    threading.Thread(target=hold, args=[ctypes.PyDLL(os.environ["LD_PRELOAD"])], daemon=True).start()
if "LANE_WATCH" in os.environ:
    begin()
    os.register_at_fork(after_in_child=begin)
"""


def environment(place: Path) -> dict[str, str]:
    """For a program in Python that is to be watched, with the forks of it that serve."""
    place.mkdir()
    hook = compiled(SUPPORT / "lane_watch.c", place / "watch.so", "-shared", "-fPIC", "-Wextra")
    (place / "sitecustomize.py").write_text(_SITE)
    (place / "watch").write_bytes(bytes(mmap.PAGESIZE))
    return {
        **os.environ, "LD_PRELOAD": str(hook), "LANE_WATCH": str(place / "watch"),
        "PYTHONPATH": f"{place}:{python_path()}",
    }


class LaneWatch:
    """What stands in the file that an environment() names in LANE_WATCH."""

    def __init__(self, file: str) -> None:
        with open(file, "r+b") as shared:
            self._shared = mmap.mmap(shared.fileno(), mmap.PAGESIZE)

    def counts(self) -> dict[str, tuple[int, str]]:
        """Kind of call -> (number, the thread that made the first), since forget()."""
        found = {}
        for kind, name in enumerate(KINDS):
            calls, what = _COUNT.unpack_from(self._shared, _HEAD.size + kind * _COUNT.size)
            if calls:
                found[name] = calls, what.rstrip(b"\0").decode()
        return found

    def forget(self) -> None:
        nbytes = len(KINDS) * _COUNT.size
        self._shared[_HEAD.size:_HEAD.size + nbytes] = bytes(nbytes)

    @contextlib.contextmanager
    def gil_held(self) -> Iterator[None]:
        """No Python runs in the program meanwhile."""
        struct.pack_into("=I", self._shared, 0, 1)
        try:
            wait_until(self.is_gil_held, "the GIL is held")
            yield
        finally:
            self.release_gil()

    def release_gil(self) -> None:
        struct.pack_into("=I", self._shared, 0, 0)

    def is_gil_held(self) -> bool:
        return struct.unpack_from("=I", self._shared, _HELD_AT) == (1,)

    def make_late(self, thread: str, us: int) -> None:
        """Each time that it is to lock a mutex from now on; a thread with this very name."""
        struct.pack_into("=I20s", self._shared, _LATE_AT, us, thread.encode())
