# SPDX-License-Identifier: Apache-2.0
"""Names for directories: paths without symbolic links, and the names of run directories."""
from __future__ import annotations

import errno
import os
import re
import sys
from pathlib import Path
from typing import Any

from zramfs.errors import ZramfsError

# For what the kernel says and for our own files: a path is bytes, and must come out of a text as it went in,
# in whatever locale either was done.
AS_PATH: dict[str, Any] = {"encoding": sys.getfilesystemencoding(), "errors": "surrogateescape"}
ROOT_BASE = Path("/run/zramfs")  # of the run directories of root
# NAME_MAX is 255 bytes; the rest is room for the temporary file's suffix and for reading comfort.
_NAME_MAX = 200


def escape(path: Path) -> str:
    """The file name for a directory: /mnt/my disk is mnt-my\\x20disk, / is -."""
    text = os.fsencode(path).strip(b"/")
    if not text:
        return "-"
    parts = []
    for i, byte in enumerate(text):
        char = chr(byte)
        if char == "/":
            parts.append("-")
        elif re.match(r"[A-Za-z0-9:_.]", char) and not (i == 0 and char == "."):
            parts.append(char)
        else:
            parts.append(f"\\x{byte:02x}")
    name = "".join(parts)
    if len(name) > _NAME_MAX:
        import hashlib  # 3 ms, for a path that few have

        digest = hashlib.sha256(text).hexdigest()[:16]
        name = f"{name[:_NAME_MAX - 17]}_{digest}"
    return name


def resolve(path: str | Path) -> Path:
    """Absolute, without symbolic links, by readlink alone: no stat, so a mount whose server does not
    answer holds nobody up. What does not exist stays as it is written."""
    left = os.path.abspath(path).split("/")[1:]
    done = Path("/")
    for _ in range(40 * (len(left) + 1)):
        if not left:
            return done
        part = left.pop(0)
        if part in ("", "."):
            continue
        if part == "..":
            done = done.parent
            continue
        try:
            target = os.readlink(done / part)
        except OSError:
            done /= part
            continue
        if target.startswith("/"):
            done = Path("/")
        left = target.split("/") + left
    raise ZramfsError(errno.ELOOP, f"{path} runs in a circle of symbolic links")
