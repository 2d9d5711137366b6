# SPDX-License-Identifier: Apache-2.0
"""A swap area on kernel zram or on zramfs, and a memory cgroup that is too small for its program."""
from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from benchmarks import peers
from benchmarks.tools import BenchmarkError, LeftOutError, command, wait_until
from zramfs.host import memcg
from zramfs.lifecycle import rundir

# The highest: other areas of the machine stay as they are, below.
PRIORITY = 32767


@contextlib.contextmanager
def area(kind: str, size: int, algo: str, *options: object) -> Iterator[peers.Server]:
    """kind: "zram" or "zramfs"; options: of `zramfs swap`. Leaving brings every page back."""
    if kind == "zram":
        with peers.zram(size, algo) as server:
            command(["mkswap", server.path])
            command(["swapon", "--discard", "--priority", str(PRIORITY), server.path])
            try:
                yield server
            finally:
                command(["swapoff", server.path])
        return
    name = f"benchmark{os.getpid()}"
    # What is measured says itself when it packs.
    peers.cli(
        "swap", name, "--size", size, "--algo", algo, "--priority", PRIORITY, "--density", "off", *options)
    try:
        found = rundir.find(name)
        state = found.read() if found else None
        if found is None or state is None:
            raise BenchmarkError(f"`zramfs swap {name}` succeeded, but left no state of its device")
        yield peers.Server("zramfs", Path(state.disk), (state.pid,), tree=Path(state.directory))
    finally:
        peers.cli("stop", name)


@contextlib.contextmanager
def group(limit: int) -> Iterator[Path]:
    """A memory cgroup of `limit` bytes. Raises LeftOutError when there can be none."""
    found = memcg.hierarchy()
    if found is None:
        raise LeftOutError("no memory cgroups are mounted here")
    made = found.root / f"zramfs-benchmark-{os.getpid()}"
    try:
        made.mkdir()
        file = "memory.limit_in_bytes" if found.version == 1 else "memory.max"
        (made / file).write_text(str(limit))
    except OSError as error:
        raise LeftOutError(f"no memory cgroup can be made in {found.root}: {error.strerror}") from None
    try:
        yield made
    finally:
        wait_until(lambda: _removed(made), f"{made} is still in use and was not removed")


def within(place: Path, *words: object) -> list[str]:
    """A command that runs `words` in the group: a shell enters it before there is anything to swap."""
    return ["sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', str(place), *map(str, words)]


def _removed(place: Path) -> bool:
    with contextlib.suppress(OSError):
        place.rmdir()
    return not place.exists()
