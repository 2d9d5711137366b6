# SPDX-License-Identifier: Apache-2.0
"""The shares of a run of every test: processes side by side, each of which takes the next file that none has.

A file is taken by making a directory with its name, which only one process can. So the shares end together
whatever the machine is fast or slow at, and a share that dies in a test leaves the other files to the others.
The tests of a file that only one share may run are a group of their own, beside the rest of the file.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest


def is_mine(claims: Path, name: str) -> bool:
    """Takes a file, named below tests/, or its group; False where another share has it."""
    place = claims / name.replace("/", "+")
    with contextlib.suppress(FileExistsError):
        place.mkdir()
        return True
    return False


def claimed(
    items: Iterable[pytest.Item], claims: Path, only_share: Callable[[pytest.Item], int]
) -> Iterator[list[pytest.Item]]:
    """The items of one file after the other that this share gets, in the order of `items`. only_share: the
    number of the one share that may run an item, 0 for any."""
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        name = item.nodeid.partition("::")[0].partition("/")[2]
        if number := only_share(item):
            name += f" of share {number}"
        groups.setdefault(name, []).append(item)
    return (group for name, group in groups.items() if is_mine(claims, name))


def run(session: pytest.Session, claims: Path, only_share: Callable[[pytest.Item], int]) -> None:
    """As pytest's own loop over the tests, file by file."""
    for group in claimed(session.items, claims, only_share):
        for item, following in zip(group, [*group[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
