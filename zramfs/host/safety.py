# SPDX-License-Identifier: Apache-2.0
"""What keeps a process that serves swap from waiting for memory that only it can free.

SETTINGS is the whole list, for `zramfs swap`, which makes them, and for whoever wants to know before
(`probe` changes nothing). The reserve of ready memory is made by the store (allocator/reserve.pyx).
"""
from __future__ import annotations

import ctypes
import errno
import os
import resource
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from zramfs.errors import ZramfsError

from . import memcg, watermark
from .machine import Machine

_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_MADV_POPULATE_WRITE = 23
_PR_SET_IO_FLUSHER = 57
# trio's threads: 8 MiB by default, all of which populate() would make resident. A guess: 64 KiB are more
# than the core uses, the rest is for Python.
_THREAD_STACK = 512 << 10
_OOM_SCORE_ADJ = -1000  # never

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Setting:
    """needed: without it a machine short of memory can hang. lost: what is lost without it. probe: why it
    can't be had, None if it can; changes nothing. apply: the same, and makes it, for this process;
    what it has to say is (refusal or None, note or None)."""

    name: str
    needed: bool
    lost: str
    probe: Callable[[], str | None]
    apply: Callable[[], tuple[str | None, str | None]]


def enter(force: bool) -> list[str]:
    """Makes all settings of the process, which is to serve swap and has one thread and no store yet.

    Returns what is to be said about it. Raises ZramfsError(EPERM) if a needed one is refused, unless
    forced.
    """
    notes, needed, useful = [], [], []
    for setting in SETTINGS:
        refusal, note = setting.apply()
        if note:
            notes.append(note)
        if refusal:
            (needed if setting.needed else useful).append((setting, refusal))
    if needed:
        listed = "".join(f"\n  {each.name}: {refusal}; without it {each.lost}" for each, refusal in needed)
        if not force:
            raise ZramfsError(
                errno.EPERM,
                "swap would not be safe here, so nothing was set up; --force goes on without:" + listed,
            )
        notes.append("forced to go on without what swap needs:" + listed)
    if useful:
        names = " and ".join(each.name for each, _ in useful)
        refusals = ", ".join(dict.fromkeys(refusal for _, refusal in useful))
        notes.append(f"without {names} ({refusals}): " + "; ".join(each.lost for each, _ in useful))
    threading.stack_size(_THREAD_STACK)
    return notes


def populate() -> None:
    """Makes every private writable page of the process resident: heap, stacks, buffers, workspaces. What
    is locked stays so. To be called when the device is set up, by a thread whose stack is prepared."""
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as lines:
        rows = [line.split(maxsplit=2)[:2] for line in lines]
    for place, permissions in rows:
        if permissions == "rw-p":
            start, end = (int(number, 16) for number in place.split("-"))
            # What was unmapped since (ENOMEM) needs nothing.
            _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_POPULATE_WRITE)


def _call(name: str, *arguments: int) -> str | None:
    """Why a call of the C library failed, None if it did not."""
    words = [ctypes.c_ulong(argument) for argument in arguments]
    return os.strerror(ctypes.get_errno()) if getattr(_libc, name)(*words) else None


def _probe_lock() -> str | None:
    if Machine().kernel < (5, 14):
        return "memory is made resident by MADV_POPULATE_WRITE, which needs Linux 5.14"
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if Machine().capable("CAP_IPC_LOCK") or limit == resource.RLIM_INFINITY:
        return None
    return f"CAP_IPC_LOCK is lacking and RLIMIT_MEMLOCK is {limit} bytes (LimitMEMLOCK=infinity in a unit)"


def _lock() -> tuple[str | None, str | None]:
    """First what is there, with all its pages; then whatever comes, when it is touched: the memory file is
    many times larger than what it will ever hold."""
    if refusal := _probe_lock():
        return refusal, None
    return _call("mlockall", _MCL_CURRENT) or _call("mlockall", _MCL_FUTURE | _MCL_ONFAULT), None


def _should_move(found: memcg.Hierarchy) -> bool:
    """Out of a group with a limit, and of any that somebody may still give one; a service stays where
    systemd keeps count of it."""
    if found.here == found.root:
        return False
    return found.limited() is not None or ".service" not in found.place


def _probe_group() -> str | None:
    found = memcg.hierarchy()
    if found is None or (group := found.limited()) is None:
        return None
    if os.access(found.root / "cgroup.procs", os.W_OK):
        return None
    return f"the memory cgroup {group} has a limit, and {found.root}/cgroup.procs can't be written"


def _leave_group() -> tuple[str | None, str | None]:
    found = memcg.hierarchy()
    if found is None or not _should_move(found):
        return None, None
    limited = found.limited()
    try:
        found.leave()
    except OSError as error:
        if limited is None:
            return None, None
        return f"the memory cgroup {limited} has a limit, and it can't be left: {error.strerror}", None
    return None, f"the server has left the memory cgroup {found.place} for the root, out of reach of limits"


def _probe_flusher() -> str | None:
    return None if Machine().capable("CAP_SYS_RESOURCE") else "CAP_SYS_RESOURCE is lacking"


def _become_flusher() -> tuple[str | None, str | None]:
    return _probe_flusher() or _call("prctl", _PR_SET_IO_FLUSHER, 1, 0, 0, 0), None


def _spare_from_oom() -> tuple[str | None, str | None]:
    try:
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE_ADJ), encoding="ascii")
    except OSError as error:
        return _probe_flusher() or error.strerror, None
    return None, None


def _nothing() -> tuple[str | None, str | None]:
    return None, None


SETTINGS = (
    # The group first: what is locked afterwards is counted where the process is then.
    Setting(
        "no limit on the server's memory", True,
        "the server can wait for a page of its own to be swapped out",
        _probe_group, _leave_group,
    ),
    Setting(
        "memory lock", True,
        "the server's own memory is swapped out to itself, and both wait for ever", _probe_lock, _lock,
    ),
    # Made, and restored, with the swap area: lifecycle/start.py.
    Setting(
        "vm.min_free_kbytes", True,
        "the kernel has no memory left for the requests that would free some", watermark.probe, _nothing,
    ),
    Setting(
        "PR_SET_IO_FLUSHER", False,
        "the kernel may slow the server down as it does any writer", _probe_flusher, _become_flusher,
    ),
    Setting(
        "oom_score_adj -1000", False,
        "the kernel may end the server when memory runs out, and all in its swap is lost then",
        _probe_flusher, _spare_from_oom,
    ),
)
