# SPDX-License-Identifier: Apache-2.0
"""What keeps a process that serves a device from waiting for memory that only it can free, and from being
ended for want of memory.

SETTINGS is the whole list. enter() makes them for a device of any kind, and `probe` tells beforehand what
can't be had and changes nothing. Swap needs some of them and is refused without. A RAM disk or a plain
device goes on without, because the growth of its pool is bounded by what the host and its cgroups can give
(allocator/headroom.pyx). The reserve of ready memory, which swap has beside that, is made by the store
(allocator/reserve.pyx).
"""
from __future__ import annotations

import ctypes
import errno
import logging
import os
import resource
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from zramfs.errors import ZramfsError
from zramfs.text.sizes import format_size

from . import heap, memcg, memory_file, watermark
from .machine import Machine

log = logging.getLogger(__name__)

_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_MLOCK_ONFAULT = 1
_MADV_POPULATE_WRITE = 23
_PR_SET_IO_FLUSHER = 57
# Of Python's threads: 8 MiB by default, all of which populate() would make resident. The core uses less than
# 64 KiB of it, the rest is for Python.
_THREAD_STACK = 512 << 10
_OOM_SCORE_ADJ = -1000  # never

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Setting:
    """One thing that a process can have done to it.

    needed  swap without it can hang a machine that is short of memory
    lost    what swap loses without it
    probe   says why it can't be had, None if it can. Changes nothing.
    apply   makes it for this process. Returns (refusal or None, note or None).
    others  what a RAM disk or a plain device loses without it; None: only swap has this setting
    warns   whether that is worth a warning, and not only a line in the log
    """

    name: str
    needed: bool
    lost: str
    probe: Callable[[], str | None]
    apply: Callable[[], tuple[str | None, str | None]]
    others: str | None = None
    warns: bool = False


def enter(kind: str, *, force: bool = False, lock: bool = False) -> list[str]:
    """Makes the settings for a device of this kind ("swap", "ramdisk" or "device").

    To be called while the process has one thread and no store. force: swap goes on without a setting that it
    needs. lock: a device of another kind has all its memory locked, as swap has. Returns sentences for the
    user. Raises ZramfsError(EPERM) when swap, or lock, can't have what it needs.
    """
    heap.give_large_blocks_back()
    if kind == "swap":
        return _enter_swap(force)
    notes = []
    for setting in SETTINGS:
        if setting.others is None:
            continue
        refusal, note = setting.apply()
        if note:
            notes.append(note)
        if refusal:
            sentence = f"without {setting.name} ({refusal}): {setting.others}"
            if setting.warns:
                notes.append(sentence)
            log.info("%s", sentence)
    if lock and (refusal := _lock_all()):
        raise ZramfsError(errno.EPERM, f"the memory can't be locked, so nothing was set up: {refusal}")
    return notes


def _enter_swap(force: bool) -> list[str]:
    note = _leave_unlimited_group()
    notes = [note] if note else []
    needed: list[tuple[Setting, str]] = []
    useful: list[tuple[Setting, str]] = []
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


def enter_keeper() -> None:
    """What a keeper has of these settings, as far as they can be had. It locks itself, and inherits the rest
    from the process that becomes it, or starts it."""
    _become_flusher()
    _spare_from_oom()


def lock_private() -> str | None:
    """Locks the private memory of the process where it is resident, and where it is touched later: code,
    heap, stacks, buffers, but not the memory file with the data. Why that can't be, or None.

    A thread of the lane that waits for a page of its own is slow, and it needs a free page for that when
    memory is short. To be called when the device is set up.
    """
    if refusal := _probe_lock():
        return refusal
    for permissions, start, end in _mappings():
        # Not to be locked (ENOMEM, EINVAL): what was unmapped since, and mappings of the kernel's own.
        # Address space that is opened later (---p) stays locked when it is.
        if permissions[3] == "p" and (permissions[0] == "r" or permissions == "---p"):
            _libc.mlock2(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MLOCK_ONFAULT)
    return None


def populate() -> None:
    """Makes every private writable page of the process resident: heap, stacks, buffers, workspaces. What
    is locked stays so. To be called when the device is set up, by a thread whose stack is prepared."""
    for permissions, start, end in _mappings():
        if permissions == "rw-p":
            # What was unmapped since (ENOMEM) needs nothing.
            _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_POPULATE_WRITE)


def _mappings() -> list[tuple[str, int, int]]:
    """Permissions such as "rw-p", start and end of each mapping of the process."""
    found = []
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            place, permissions = line.split(maxsplit=2)[:2]
            start, end = (int(number, 16) for number in place.split("-"))
            found.append((permissions, start, end))
    return found


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
    """Locks what is there, with all its pages, and what comes later when it is touched: the memory file is
    many times larger than what it will ever hold."""
    if refusal := _probe_lock():
        return refusal, None
    return _call("mlockall", _MCL_CURRENT) or _call("mlockall", _MCL_FUTURE | _MCL_ONFAULT), None


def _lock_all() -> str | None:
    """Locks what is there and what comes later, each page from its first touch. Returns why not, or None."""
    return _probe_lock() or _call("mlockall", _MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT)


def _probe_group() -> str | None:
    found = memcg.hierarchy()
    if found is None or (group := found.limited()) is None or found.may_leave():
        return None
    return f"{_limited(found, group)}, and {found.root}/cgroup.procs can't be written"


def _limited(found: memcg.Hierarchy, group: Path) -> str:
    return f"the memory cgroup {group} has a limit of {format_size(found.limit(group) or 0)}"


def leave_group() -> tuple[str | None, str | None]:
    """Moves this process out of memory cgroups with a limit. Returns (refusal or None, note or None)."""
    found = memcg.hierarchy()
    if found is None or (group := found.limited()) is None:
        return None, None
    if refusal := _probe_group():
        return refusal, None
    try:
        found.leave()
    except OSError as error:
        return f"{_limited(found, group)}, and it can't be left: {error.strerror}", None
    return None, f"{_limited(found, group)}, so the server has left it for {found.root}"


def _leave_unlimited_group() -> str | None:
    """For swap: leaves a group that somebody may still give a limit. A service stays, because systemd keeps
    count of it. Returns what to say, or None."""
    found = memcg.hierarchy()
    if found is None or found.here == found.root or ".service" in found.place or found.limited() is not None:
        return None
    try:
        found.leave()
    except OSError:
        return None
    return f"the server has left the memory cgroup {found.place} for {found.root}, out of reach of limits"


def _probe_flusher() -> str | None:
    return None if Machine().capable("CAP_SYS_RESOURCE") else "CAP_SYS_RESOURCE is lacking"


def _become_flusher() -> tuple[str | None, str | None]:
    return _probe_flusher() or _call("prctl", _PR_SET_IO_FLUSHER, 1, 0, 0, 0), None


def _spare_from_oom() -> tuple[str | None, str | None]:
    try:
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE_ADJ), encoding="utf-8")
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
        _probe_group, leave_group,
        "the device stops growing before the limit, and writes get ENOSPC then", warns=True,
    ),
    Setting(
        "memory lock", True,
        "the server's own memory is swapped out to itself, and both wait for each other", _probe_lock, _lock,
    ),
    # Made with the device: daemon/succession.py.
    Setting(
        "a memory file out of swap's reach", True,
        "when the daemon dies, its data can be swapped out to itself before the next one has it locked",
        memory_file.refusal, _nothing,
    ),
    # Made, and restored, with the swap area: lifecycle/start.py.
    Setting(
        "vm.min_free_kbytes", True,
        "the kernel has no memory left for the requests that would free some", watermark.probe, _nothing,
    ),
    # Without it the kernel's reclaim, in a group of version 1, can let a thread of the lane wait for the
    # write-back of the file system that this lane serves (its shrink_folio_list()).
    Setting(
        "PR_SET_IO_FLUSHER", False,
        "the kernel may slow the server down as it does any writer", _probe_flusher, _become_flusher,
        "the kernel may slow the server down as it does any writer",
    ),
    Setting(
        "oom_score_adj -1000", False,
        "the kernel may end the server when memory runs out, and all in its swap is lost then",
        _probe_flusher, _spare_from_oom,
        "the kernel may end the server when memory runs out, and its data is lost then",
    ),
)
