# SPDX-License-Identifier: Apache-2.0
"""Memory files, also such as the kernel never swaps out.

A lock (mlock) belongs to a process and to the pages that it has touched. A memory file outlives processes:
from the death of one to the first touch by the next nobody has its pages locked, and those of a swap device
would be swapped out to the device itself. A file of a tmpfs with the option `noswap` (Linux 6.4) has no such
moment, counts for no RLIMIT_MEMLOCK, and costs a successor no page tables. The tmpfs is mounted nowhere, and
goes with the file.
"""
from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

from .machine import Machine

# The same numbers on all architectures but alpha.
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_CLOEXEC = 1  # of fsopen and fsmount
_SET_FLAG, _SET_STRING, _CREATE = 0, 1, 6
_HUGE = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")

_libc = ctypes.CDLL(None, use_errno=True)


def new(name: str, *, unswapped: bool = False) -> int:
    """The descriptor of an empty memory file, which maps show as /memfd:NAME. unswapped: none of it is ever
    swapped out, where that can be had (see refusal())."""
    if unswapped and Machine().kernel >= (6, 4):
        with contextlib.suppress(OSError):
            return _new_unswapped(name)
    return os.memfd_create(name)


def refusal() -> str | None:
    """Why a memory file can't be kept from swap, None if it can. Before Linux 6.4 it can't, and need not be:
    no process takes over from another there."""
    if Machine().kernel < (6, 4):
        return None
    try:
        os.close(_new_unswapped("zramfs-probe"))
    except OSError as error:
        return f"a tmpfs with noswap is refused: {error.strerror}"
    return None


def _new_unswapped(name: str) -> int:
    """Raises OSError."""
    with contextlib.ExitStack() as stack:
        context = _call(_FSOPEN, b"tmpfs", _CLOEXEC)
        stack.callback(os.close, context)
        # No limit of its own, as memfds have none, and huge pages as memfds have them.
        for key, value in ((b"size", b"0"), (b"nr_inodes", b"0"), (b"mode", b"0700"), *_huge()):
            _call(_FSCONFIG, context, _SET_STRING, key, value, 0)
        _call(_FSCONFIG, context, _SET_FLAG, b"noswap", None, 0)
        _call(_FSCONFIG, context, _CREATE, None, None, 0)
        mount = _call(_FSMOUNT, context, _CLOEXEC, 0)
        stack.callback(os.close, mount)
        path = f"memfd:{name}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=mount)
        os.unlink(path, dir_fd=mount)
        return fd


def _huge() -> list[tuple[bytes, bytes]]:
    """"deny" and "force" hold for all memory files, whatever they ask for."""
    with contextlib.suppress(OSError):
        chosen = _HUGE.read_text(encoding="ascii").partition("[")[2].partition("]")[0]
        if chosen in ("always", "within_size", "advise"):
            return [(b"huge", chosen.encode())]
    return []


def _call(number: int, *arguments: int | bytes | None) -> int:
    """Raises OSError."""
    words = [ctypes.c_long(each) if isinstance(each, int) else ctypes.c_char_p(each) for each in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *words))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
