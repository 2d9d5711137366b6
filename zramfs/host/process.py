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


def children_of(pid: int) -> list[int]:
    """The processes that `pid` has started and that live."""
    found = []
    for number in pids():
        with contextlib.suppress(OSError, ValueError):
            text = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
            if int(text[text.rindex(")") + 2:].split()[1]) == pid:
                found.append(number)
    return found


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
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name stands in parentheses and may itself contain spaces and parentheses.
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else int(fields[19])
