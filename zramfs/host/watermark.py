# SPDX-License-Identifier: Apache-2.0
"""vm.min_free_kbytes: raised while there is swap on zramfs, and restored after the last.

The setting is the machine's, whatever run directories its users chose, so there is one record for all:
RECORD holds what the value was before the first, and who needs how much. It has a lock of its own,
inside that of a run directory.
"""
from __future__ import annotations

import contextlib
import copy
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

    With 351 MB 8 to 32 MB sufficed, and the kernel's own 2.4 MB did not. In between and above it is a
    guess: a 64th of the RAM, from 16 to 64 MiB, and never more than a tenth of the RAM.
    """
    if total is None:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(max(16 * _MIB, min(64 * _MIB, total // 64)), total // 10)


def probe() -> str | None:
    """Why the value can't be raised to what is needed; None if it can, or need not."""
    if _current() * 1024 >= needed() or os.access(SETTING, os.W_OK):
        return None
    return f"{SETTING} is {_current()} kB and can't be raised to {needed() // 1024}"


def raise_to(user: Path, nbytes: int) -> str | None:
    """For the device with this run directory. What was done, or should have been, in a sentence; None if
    nothing had to be. Raises ZramfsError."""
    kib = -(-nbytes // 1024)
    with _locked_record() as (lock, old):
        record = copy.deepcopy(old)
        _forget_the_gone(record)
        before = _current()
        record.setdefault("before", before)
        record["users"][str(user)] = kib
        if before < kib:
            _set_recorded(lock, record, kib, old)
        else:
            _write(lock, record)
    said = []
    if before < kib:
        said.append(f"raised vm.min_free_kbytes from {before} to {kib}; `zramfs stop` restores it")
    if (lacking := needed() // 1024) > max(before, kib):
        said.append(f"vm.min_free_kbytes is below the {lacking} that a machine of this size may need")
    return "; ".join(said) or None


def release(user: Path) -> None:
    """The device with this run directory ends: the value goes back to what the others need, or after the
    last one to what it was, unless somebody else has changed it since. Raises ZramfsError."""
    if not RECORD.exists():
        return
    with _locked_record() as (lock, old):
        record = copy.deepcopy(old)
        record["users"].pop(str(user), None)
        _forget_the_gone(record)
        wanted = max([record.get("before", 0), *record["users"].values()])
        if "set" in record and _current() in (record["set"], record.get("was")) and _current() != wanted:
            # The old record's users stay until the value is right: then a crash on the way loses nothing.
            _set_recorded(lock, {**record, "users": old["users"]}, wanted, old)
            record["set"] = wanted
        _write(lock, record)


def users() -> list[str]:
    """Run directories of the devices for which the value was raised, or looked at."""
    try:
        return list(json.loads(RECORD.read_text(encoding="utf-8"))["users"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _forget_the_gone(record: dict[str, Any]) -> None:
    for user in list(record["users"]):
        if not os.path.exists(user):
            del record["users"][user]


class _Lock:
    """On the file that is RECORD. A record is written beside it and renamed, so a crash leaves the old one or
    the new one; the new file is locked before it has the name."""

    def __init__(self) -> None:
        """What was locked may have been removed meanwhile, by the process that had it before."""
        while True:
            self.fd = os.open(RECORD, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            fcntl.flock(self.fd, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self.fd), os.stat(RECORD)):
                    return
            os.close(self.fd)

    def replace(self, text: bytes) -> None:
        beside = RECORD.with_name(RECORD.name + ".new")
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()  # of a process that was killed here
        fd = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.pwrite(fd, text, 0)
            os.rename(beside, RECORD)
        except OSError:
            os.close(fd)
            raise
        os.close(self.fd)
        self.fd = fd


@contextlib.contextmanager
def _locked_record() -> Iterator[tuple[_Lock, dict[str, Any]]]:
    """What RECORD holds. After a boot the settings are the kernel's own again, so an older record says
    nothing."""
    lock = _Lock()
    try:
        text = os.read(lock.fd, 1 << 20)
        fresh: dict[str, Any] = {"boot_id": process.boot_id(), "users": {}}
        try:
            record = json.loads(text or b"{}")
        except ValueError:
            record = {}
        if not isinstance(record, dict) or record.get("boot_id") != fresh["boot_id"] or not isinstance(
                record.get("users"), dict):
            record = fresh
        yield lock, record
    finally:
        os.close(lock.fd)


def _set_recorded(lock: _Lock, record: dict[str, Any], kib: int, old: dict[str, Any]) -> None:
    """Sets the value, and says so in the record first: killed in between, this process leaves a record from
    which the next one can tell both values. ZramfsError; then the old record stands."""
    _write(lock, {**record, "set": kib, "was": _current()})
    try:
        _set(kib)
    except ZramfsError:
        _write(lock, old)
        raise
    record["set"] = kib
    record.pop("was", None)
    _write(lock, record)


def _write(lock: _Lock, record: dict[str, Any]) -> None:
    """Without users there is none."""
    if record["users"]:
        lock.replace(json.dumps(record, indent=1).encode())
    else:
        RECORD.unlink(missing_ok=True)


def _current() -> int:
    return int(SETTING.read_text(encoding="utf-8"))


def _set(kib: int) -> None:
    try:
        SETTING.write_text(str(kib), encoding="utf-8")
    except OSError as error:
        raise ZramfsError(
            error.errno or errno.EIO,
            f"swap needs vm.min_free_kbytes of {kib}, and {SETTING} can't be written: {error.strerror}; "
            "set it where you may, or take --force",
        ) from None
