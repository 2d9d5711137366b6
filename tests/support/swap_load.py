# SPDX-License-Identifier: Apache-2.0
"""Programs that need more memory than their memory cgroup has, for the tests of swap."""
from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support import capabilities, leftovers
from tests.support.native import compiled
from tests.support.paths import ROOT
from tests.support.whole import MIB, tool_environment, wait_until


@dataclass(frozen=True)
class Group:
    """A memory cgroup of version 1 or 2."""

    path: Path
    limit_file: str

    def limit(self, nbytes: int) -> None:
        (self.path / self.limit_file).write_text(str(nbytes))

    @property
    def swap(self) -> int:
        """Bytes of its processes that are in swap."""
        if self.limit_file == "memory.max":
            return int((self.path / "memory.swap.current").read_text())
        return self._table("memory.stat")["swap"]

    @property
    def kills(self) -> int:
        """Processes that the kernel has killed there for want of memory."""
        events = "memory.events" if self.limit_file == "memory.max" else "memory.oom_control"
        return self._table(events)["oom_kill"]

    def _table(self, name: str) -> dict[str, int]:
        lines = (self.path / name).read_text().splitlines()
        return {key: int(value) for key, value in map(str.split, lines)}


@contextlib.contextmanager
def group(nbytes: int) -> Iterator[Group]:
    parent, limit = capabilities.memcg_parent()
    made = Group(parent / leftovers.owner_name(), limit)
    made.path.mkdir()
    try:
        made.limit(nbytes)
        yield made
    finally:
        def gone() -> bool:
            with contextlib.suppress(OSError):
                made.path.rmdir()
            return not made.path.exists()
        wait_until(gone, f"{made.path} is empty", 30)


class Filler:
    """swap_fill at work in a group. It verifies one content `passes` times or, with 0, new contents until
    finish(). lines: what it has said after each pass.

    It begins anew, once, when the kernel kills it for lack of memory. Reclaim ends like that now and then:
    with the kernel's own zram in 2 of 18 runs of 110 MiB in a group of 60 (Linux 6.18).
    """

    def __init__(self, program: Path, where: Group, mib: int, passes: int = 0) -> None:
        # A shell, so that the group is entered before there is anything to swap.
        self._words = ["sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', where.path,
                       program, str(mib), str(passes), *([] if passes else ["random"])]
        self._lives = 2
        self._begin()

    def _begin(self) -> None:
        self._lives -= 1
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            self._words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=tool_environment())

    def _begins_anew(self) -> bool:
        if self._lives == 0 or self.process.wait(60) != -signal.SIGKILL:
            return False
        self._begin()
        return True

    def read_pass(self) -> None:
        line = self.process.stdout.readline()
        if not line and self._begins_anew():
            line = self.process.stdout.readline()
        self.lines.append(line.rstrip("\n"))
        assert line and line[0].isdigit(), f"ended with {self.process.poll()}, having said {self.lines}"

    def finish(self, timeout: float = 200) -> None:
        """Lets it end after the pass that is under way, and holds it to what it found."""
        output, _ = self.process.communicate(timeout=timeout)
        if self._begins_anew():
            output, _ = self.process.communicate(timeout=timeout)
        self.lines += output.splitlines()
        assert self.process.returncode == 0, f"ended with {self.process.returncode}: {self.lines}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@contextlib.contextmanager
def fillers(program: Path, where: Group, *sizes: int, passes: int = 0) -> Iterator[list[Filler]]:
    """One for each size in MiB."""
    at_work: list[Filler] = []
    try:
        for mib in sizes:
            at_work.append(Filler(program, where, mib, passes))
        yield at_work
    finally:
        for each in at_work:
            each.kill()


def build(place: Path) -> Path:
    """The program swap_fill."""
    return compiled(ROOT / "benchmarks" / "swap_fill.c", place / "swap_fill")


def faults(pid: int) -> dict[str, int]:
    """Page faults so far of each thread of a daemon that serves its disk."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            name = (task / "comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):  # one of Python's, which has ended
            continue
        if name.startswith(("zramfs-lane", "zramfs-slow")):
            found[name] = int(fields[7]) + int(fields[9])
    return found


def until_swapped(where: Group, nbytes: int) -> None:
    wait_until(lambda: where.swap >= nbytes, f"{nbytes // MIB} MiB in swap", 30)


