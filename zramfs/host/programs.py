# SPDX-License-Identifier: Apache-2.0
"""Programs of the system: losetup, mkfs, mount, swapon and the like.

They are found whatever PATH says: cron and `su` leave the sbin directories out of it. They run with LC_ALL=C,
because what some of them say is read. What is imported in a function here costs each command milliseconds,
and most commands run no program.
"""
from __future__ import annotations

import errno
import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from zramfs.errors import ZramfsError

from .paths import AS_PATH

if TYPE_CHECKING:
    import subprocess

# After those of PATH.
PLACES = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")


def search_path() -> str:
    """PATH, and the usual places behind it."""
    named = [place for place in os.environ.get("PATH", "").split(os.pathsep) if place]
    return os.pathsep.join(dict.fromkeys([*named, *PLACES]))


def find(name: str) -> str | None:
    """Where a program is."""
    import shutil

    return shutil.which(name, path=search_path())


def environment() -> dict[str, str]:
    """For programs that are run, and for those that they run."""
    return {**os.environ, "PATH": search_path(), "LC_ALL": "C"}


def expect(needed: Mapping[str, str], purpose: str) -> None:
    """Raises ZramfsError(ENOENT) about the first missing program. needed: program to Debian package."""
    for name, package in needed.items():
        if find(name) is None:
            from .package_managers import advise_install

            raise ZramfsError(
                errno.ENOENT,
                f"{purpose} needs {name}, which is in none of {search_path()}; to get it: "
                f"{advise_install(find, package)}")


def run(command: list[str], pass_fds: Collection[int] = ()) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, without input. What it said and how it ended is for the caller to judge;
    args is the command as it was given. pass_fds: descriptors that it inherits."""
    import subprocess

    done = subprocess.run(
        [find(command[0]) or command[0], *command[1:]], capture_output=True, **AS_PATH,
        stdin=subprocess.DEVNULL, check=False, env=environment(),
        pass_fds=tuple(pass_fds))
    done.args = command
    return done
