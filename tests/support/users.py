# SPDX-License-Identifier: Apache-2.0
"""Commands of an ordinary user, for tests that root runs."""
from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.apart import apart
from tests.support.whole import run

NOBODY = 65534
SOMEBODY = 65533  # another one


@contextlib.contextmanager
def fuse_for_everybody(directory: Path) -> Iterator[list[str]]:
    """The words before a command that let it see a /dev/fuse that everybody may open, which udev
    makes it, and a machine without udev does not: in a mount namespace with a node of our own."""
    if os.stat("/dev/fuse").st_mode & 0o006 == 0o006:
        yield []
        return
    node = directory / "fuse"
    os.mknod(node, 0o666 | 0o020000, os.stat("/dev/fuse").st_rdev)
    node.chmod(0o666)
    code = 'mount --bind "$1" /dev/fuse && echo there && exec cat'
    with subprocess.Popen(
        apart("sh", "-c", code, "sh", node),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        try:
            assert holder.stdout.readline() == "there\n"
            yield ["nsenter", f"--mount=/proc/{holder.pid}/ns/mnt"]
        finally:
            holder.kill()


def as_nobody(*words: object, uid: int = NOBODY) -> list[str]:
    """The words that run a command as an ordinary user."""
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *map(str, words)]


def zramfs_as_nobody(prefix: list[str]) -> list[str]:
    """The command zramfs for a user who cannot enter root's home, where this interpreter may lie."""
    system = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    for interpreter in (sys.executable, system):
        command = [*prefix, *as_nobody("env", f"PYTHONPATH={_library()}", interpreter, "-m", "zramfs.cli")]
        if run(*command, "--version", check=False, cwd="/").returncode == 0:
            return command
    pytest.skip(f"uid {NOBODY} may run Python neither as {sys.executable} nor as {system}")


@functools.cache
def _library() -> Path:
    """A copy of zramfs and of all that it imports, for everybody to read."""
    code = (
        "import sys, zramfs.cli, zramfs.daemon.daemon, rich.table\n"
        "for name, module in sorted(sys.modules.items()):\n"
        "    if '.' not in name and getattr(module.__spec__, 'has_location', False):\n"
        "        print(module.__spec__.origin)"
    )
    library = Path(tempfile.mkdtemp(prefix="library-"))
    library.chmod(0o755)
    for line in run(sys.executable, "-c", code, env=dict(os.environ)).stdout.splitlines():
        origin = Path(line)
        if origin.is_relative_to(Path(os.__file__).parent) and "site-packages" not in origin.parts:
            continue  # of Python itself
        if origin.stem.partition(".")[0] == "__init__":
            # With what is compiled: this user could not write it there.
            ignore = shutil.ignore_patterns("*.pyx", "*.c")
            shutil.copytree(origin.parent, library / origin.parent.name, ignore=ignore)
        else:
            shutil.copy(origin, library)
    return library
