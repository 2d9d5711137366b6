# SPDX-License-Identifier: Apache-2.0
"""A thread whose I/O gets the disk when nobody else wants it, where the I/O scheduler knows priorities
(bfq)."""
from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator

# The numbers of ioprio_set(2) and ioprio_get(2), which libc does not wrap.
_CALLS = {"x86_64": (251, 252), "aarch64": (30, 31), "riscv64": (30, 31)}
_WHO_PROCESS, _CLASS_IDLE = 1, 3 << 13


@contextlib.contextmanager
def idle_io() -> Iterator[None]:
    """Of this thread. Without effect where the system does not have it."""
    calls = _CALLS.get(platform.machine())
    if calls is None:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    before = libc.syscall(calls[1], _WHO_PROCESS, 0)
    libc.syscall(calls[0], _WHO_PROCESS, 0, _CLASS_IDLE)
    try:
        yield
    finally:
        libc.syscall(calls[0], _WHO_PROCESS, 0, max(before, 0))
