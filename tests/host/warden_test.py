# SPDX-License-Identifier: Apache-2.0
"""Two wardens of one device: the one of a daemon that was killed, and that of the next daemon."""
from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import python_environment
from tests.support.whole import MIB, loop, mounted, run, wait_until
from zramfs.host import bdi
from zramfs.host.process import WARDEN

pytestmark = [pytest.mark.requires("root", "loop", "ext4"), pytest.mark.timeout(240)]


class Started:
    """A warden; its daemon is this test."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", WARDEN], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=python_environment(), start_new_session=True)

    def order(self, what: str, **arguments: object) -> None:
        self.process.stdin.write(json.dumps({"do": what, **arguments}).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, object]:
        found = json.loads(self.process.stdout.readline())
        assert "error" not in found, found
        return found

    def has_answered(self, seconds: float) -> bool:
        return bool(select.select([self.process.stdout], [], [], seconds)[0])

    def end(self) -> None:
        """As when its daemon is killed."""
        self.process.stdin.close()
        assert self.process.wait(60) == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)
        self.process.stdout.close()
        with contextlib.suppress(OSError):
            self.process.stdin.close()


@contextlib.contextmanager
def wardens() -> Iterator[tuple[Started, Started]]:
    pair = Started(), Started()
    try:
        yield pair
    finally:
        for each in pair:
            each.kill()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A loop device with a file system on it, and where that is mounted."""
    with open(tmp_path / "blocks", "wb") as file:
        file.truncate(16 * MIB)
    with loop(tmp_path / "blocks") as block:
        run("mkfs.ext4", "-q", "-F", block)
        with mounted(block, tmp_path / "point") as point:
            try:
                yield block, point
            finally:
                run("fsfreeze", "--unfreeze", point, check=False)


def strict(block: str) -> Path:
    number = Path(f"/sys/block/{Path(block).name}/dev").read_text().strip()
    return Path(f"/sys/class/bdi/{number}/strict_limit")


def take(warden: Started, block: str, point: Path, *, frozen: bool = False) -> None:
    warden.order("take", mountpoint=str(point), device=block, fstype="ext4", frozen=frozen)


def look(warden: Started) -> object:
    warden.order("look")
    return warden.answer()["frozen"]


def test_the_end_of_the_first_undoes_nothing_of_the_second(place: tuple[str, Path]) -> None:
    block, point = place
    with wardens() as (first, second):
        take(first, block, point)
        first.answer()
        first.order("wait", bytes=4 * MIB)
        assert first.answer()["wait"] and strict(block).read_text() == "1\n"
        first.order("freeze")
        first.answer()
        take(second, block, point, frozen=True)
        second.order("wait", bytes=2 * MIB)
        second.order("freeze")
        # It waits. One that does not is done by now on an idle machine, and what it has set is undone below.
        second.has_answered(1.0)
        first.end()
        second.answer()
        second.answer()
        second.answer()
        wait_until(lambda: look(second) == "yes", "it is frozen", 60)
        # It moves with the free memory of the machine.
        assert strict(block).read_text() == "1\n" and bdi.waiting(block) < 16 * MIB
        assert run("fsfreeze", "--unfreeze", point).returncode == 0, "it was frozen still"
        second.end()
        assert strict(block).read_text() == "0\n" and bdi.waiting(block) > 16 * MIB


def test_a_warden_that_was_killed_keeps_nobody_waiting(place: tuple[str, Path]) -> None:
    block, point = place
    with wardens() as (first, second):
        take(first, block, point)
        first.answer()
        first.order("wait", bytes=2 * MIB)
        first.answer()
        first.process.kill()
        first.process.wait(60)
        take(second, block, point)
        second.answer()
        second.end()
        assert strict(block).read_text() == "0\n"
