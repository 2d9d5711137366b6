# SPDX-License-Identifier: Apache-2.0
"""Files that others read while they are written anew: a reader finds the old text or the new one, whole."""
from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

from zramfs.errors import ZramfsError

from . import safe_paths


def replace_file(path: Path, data: bytes, mode: int) -> None:
    """Writes `data` beside `path`, with this mode whatever the umask says, and renames it to `path`. The name
    beside it begins with a dot and has another ending, so that nobody takes it for the file.

    Raises ZramfsError: EEXIST where something other than a regular file is there; OSError. What was there
    before stays then.
    """
    with safe_paths.parent_of(path) as (directory, name):
        with contextlib.suppress(FileNotFoundError):
            seen = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if not stat.S_ISREG(seen.st_mode):
                raise ZramfsError(
                    errno.EEXIST, f"expected {path} to be a regular file, or a name that is not taken yet")
        beside = f".{name}.{os.getpid()}"
        try:
            # A leftover of a process that was killed, or somebody's link, goes; it is never written to.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(beside, dir_fd=directory)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(beside, flags, 0o600, dir_fd=directory)
            try:
                with open(fd, "wb") as out:
                    os.fchmod(fd, mode)
                    out.write(data)
                os.rename(beside, name, src_dir_fd=directory, dst_dir_fd=directory)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(beside, dir_fd=directory)
                raise
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
