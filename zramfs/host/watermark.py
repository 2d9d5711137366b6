# SPDX-License-Identifier: Apache-2.0
"""vm.min_free_kbytes: raised while there is swap on zramfs, and restored after the last.

The setting belongs to the machine, whatever run directories its users chose, so there is one record for all.
RECORD holds what the value was before the first device, and how much each device needs. It has a lock of its
own, which is taken inside that of a run directory.
"""
from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zramfs.errors import ZramfsError

from . import paths, process

SETTING = Path("/proc/sys/vm/min_free_kbytes")
RECORD = paths.ROOT_BASE.with_name("zramfs-min-free.json")
_MIB = 1 << 20


def needed(total: int | None = None) -> int:
    """Bytes that a machine with `total` bytes of RAM (None: this one) has to keep free.

    On a machine with 351 MB 8 to 32 MB sufficed, and the kernel's own 2.4 MB did not. For other machines the
    rule is a guess: a 64th of the RAM, from 16 to 64 MiB, and never more than a tenth of the RAM.
    """
    if total is None:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(max(16 * _MIB, min(64 * _MIB, total // 64)), total // 10)


def probe() -> str | None:
    """Why the setting can't be raised to what is needed. None if it can be, or need not be."""
    if _current() * 1024 >= needed() or os.access(SETTING, os.W_OK):
        return None
    return f"{SETTING} is {_current()} kB and can't be raised to {needed() // 1024}"


def raise_to(user: Path, nbytes: int) -> str | None:
    """Raises the setting for the device with this run directory. Returns a sentence on what was done or
    should have been done, None if nothing had to be. Raises ZramfsError."""
    kib = -(-nbytes // 1024)
    with _record() as (fd, record):
        _forget_the_gone(record)
        before = _current()
        record.setdefault("before", before)
        record["users"][str(user)] = kib
        if before < kib:
            # Recorded first: a value that is not recorded counts as somebody else's, and is never restored.
            record["ours"].append(kib)
            _write(fd, record)
            _set(kib)
    said = []
    if before < kib:
        said.append(f"raised vm.min_free_kbytes from {before} to {kib}; `zramfs stop` restores it")
    if (lacking := needed() // 1024) > max(before, kib):
        said.append(f"vm.min_free_kbytes is below the {lacking} that a machine of this size may need")
    return "; ".join(said) or None


def release(user: Path) -> None:
    """Forgets the device with this run directory, which ends. The setting goes back to what the others need,
    and after the last one to what it was, unless somebody else has changed it since. Raises ZramfsError."""
    if not RECORD.exists():
        return
    with _record() as (fd, record):
        record["users"].pop(str(user), None)
        _forget_the_gone(record)
        wanted = max([record.get("before", 0), *record["users"].values()])
        if _current() in record["ours"] and _current() != wanted:
            record["ours"].append(wanted)
            _write(fd, record)
            _set(wanted)


def users() -> list[str]:
    """Run directories of the devices that have asked for the setting to be raised."""
    try:
        return list(json.loads(RECORD.read_text(encoding="utf-8"))["users"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _forget_the_gone(record: dict[str, Any]) -> None:
    for user in list(record["users"]):
        if not os.path.exists(user):
            del record["users"][user]


@contextlib.contextmanager
def _record() -> Iterator[tuple[int, dict[str, Any]]]:
    """RECORD, open and locked, and what it holds, which is written back at the end. Without users the file is
    removed. A record from before the last boot counts as empty, because the setting is the kernel's own
    again."""
    fd = _open()
    try:
        text = os.read(fd, 1 << 20)
        fresh: dict[str, Any] = {"boot_id": process.boot_id(), "users": {}, "ours": []}
        try:
            record = json.loads(text or b"{}")
        except ValueError:
            record = {}
        if not isinstance(record, dict) or record.get("boot_id") != fresh["boot_id"] or not isinstance(
                record.get("users"), dict):
            record = fresh
        # Values that were set here since the boot. A record of an older version has the last one alone.
        record.setdefault("ours", [record["set"]] if "set" in record else [])
        yield fd, record
        if not record["users"]:
            RECORD.unlink()
            return
        _write(fd, record)
    finally:
        os.close(fd)


def _write(fd: int, record: dict[str, Any]) -> None:
    """By one call, which nothing can cut short: the new text is at least as long as the old one."""
    text = json.dumps(record, indent=1).encode()
    os.pwrite(fd, text.ljust(os.fstat(fd).st_size), 0)


def _open() -> int:
    """RECORD, locked. The process that had the lock before may have removed the file."""
    while True:
        fd = os.open(RECORD, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(RECORD)):
                return fd
        os.close(fd)


def _current() -> int:
    return int(SETTING.read_text(encoding="ascii"))


def _set(kib: int) -> None:
    try:
        SETTING.write_text(str(kib), encoding="ascii")
    except OSError as error:
        raise ZramfsError(
            error.errno or errno.EIO,
            f"swap needs vm.min_free_kbytes of {kib}, and {SETTING} can't be written: {error.strerror}; "
            "set it where you may, or take --force",
        ) from None
