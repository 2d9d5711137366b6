# SPDX-License-Identifier: Apache-2.0
"""The shares of a run of every test: processes side by side, each of which takes the next file that none has.

A file is taken by making a directory with its name, which only one process can. So the shares end together
whatever the machine is fast or slow at, and a share that dies in a test leaves the other files to the others.
"""
from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest


def is_mine(claims: Path, file: str) -> bool:
    """Takes a file, named below tests/; False where another share has it."""
    place = claims / file.replace("/", "+")
    with contextlib.suppress(FileExistsError):
        place.mkdir()
        return True
    return False


def claimed(items: Iterable[pytest.Item], claims: Path) -> Iterator[list[pytest.Item]]:
    """The items of one file after the other that this share gets, in the order of `items`."""
    files: dict[str, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.nodeid.partition("::")[0].partition("/")[2], []).append(item)
    return (group for file, group in files.items() if is_mine(claims, file))


def run(session: pytest.Session, claims: Path) -> None:
    """As pytest's own loop over the tests, file by file."""
    for group in claimed(session.items, claims):
        for item, following in zip(group, [*group[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
