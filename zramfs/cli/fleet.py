# SPDX-License-Identifier: Apache-2.0
"""Which devices a command is about that reads several of them: those named, or all of this user."""
from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from zramfs.errors import ZramfsError
from zramfs.host import loops, mounts
from zramfs.lifecycle import rundir
from zramfs.lifecycle.rundir import Rundir, State

from .devices import tree


class Member(NamedTuple):
    """One device. directory: of its tree. where: what its user calls it. state: None for another user's
    device, or one whose start was never finished. disk: where the lane is mounted, None where that is not
    known."""

    name: str
    directory: Path
    where: str
    state: State | None
    disk: Path | None = None

    @property
    def loops(self) -> list[str]:
        """Those that stand on it."""
        return loops.find(self.disk) if self.disk else []

    @property
    def kind(self) -> str:
        return self.state.kind if self.state else "device"


def find_members(dirs: Sequence[str]) -> list[Member]:
    """Those on the directories `dirs`, or all of this user, dead ones included. Raises ZramfsError for a
    directory that has none."""
    if not dirs:
        return [_member(each, state) for each in rundir.rundirs() if (state := each.read()) is not None]
    return list({member.directory: member for member in map(_named, dirs)}.values())


def still_there(dirs: Sequence[str]) -> list[Member]:
    """As find_members(), without the directories whose device has been stopped."""
    if not dirs:
        return find_members(dirs)
    found = []
    for each in dirs:
        with contextlib.suppress(ZramfsError):
            found += find_members([each])
    return list({member.directory: member for member in found}.values())


def _member(each: Rundir, state: State) -> Member:
    return Member(each.name, Path(state.directory), state.where, state, each.disk)


def _named(text: str) -> Member:
    directory = tree(text)
    found = rundir.find(text) or rundir.find(str(directory))
    state = found.read() if found else None
    if found and state:
        return _member(found, state)
    mount = mounts.mount_at(directory)  # another user's
    return Member(mount.source if mount else directory.name, directory, text, None)
