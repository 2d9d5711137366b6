# SPDX-License-Identifier: Apache-2.0
"""What tells one process from another that had the same number."""
from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

WARDEN = "zramfs.host.warden"  # the module that a warden runs


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()


def pids() -> Iterator[int]:
    """Of all processes that can be seen; they may have ended meanwhile."""
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _stat_fields(pid: int) -> list[str]:
    """Those of /proc/PID/stat from the third one on. Raises OSError when there is no such process."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    # The name stands in parentheses and may itself contain spaces and parentheses.
    return text[text.rindex(")") + 2 :].split()


def children_of(pid: int) -> list[int]:
    """The processes that `pid` has started and that live."""
    found = []
    for number in pids():
        with contextlib.suppress(OSError, ValueError):
            if int(_stat_fields(number)[1]) == pid:
                found.append(number)
    return found


def is_group_alive(group: int) -> bool:
    """Whether any process of the group lives; a zombie does not."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    for number in pids():
        with contextlib.suppress(OSError, ValueError):
            fields = _stat_fields(number)
            if int(fields[2]) == group and fields[0] not in "ZX":
                return True
    return False


def runs_of(module: str) -> list[int]:
    """The processes that run a module of Python (`python -m module`)."""
    found = []
    for number in pids():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
            if [b"-m", module.encode()] in (words[1:3], words[2:4]):
                found.append(number)
    return found


def process_start(pid: int) -> int | None:
    """Clock ticks from boot to the start of the process; None when there is none, or a zombie."""
    try:
        fields = _stat_fields(pid)
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def process_name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
            return comm.read().rstrip("\n")
    except OSError:
        return "a process that just ended"
