# SPDX-License-Identifier: Apache-2.0
"""Two real cases: a source tree that is built on a RAM disk, and a program that is larger than its memory
cgroup.

Both have two phases. A program fills the device; then everything comes to rest, and where the way says so all
of it is packed; then the program uses what it has stored. Memory is read at rest, and once more after the
use.
"""
from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import load, memory, peers, swapping
from benchmarks.corpora import corpus
from benchmarks.packing import AUTO, MAX, Packing, control, pack
from benchmarks.program import Program
from benchmarks.tools import HERE, BenchmarkError, Interrupt, built, cache_dir, command, need
from zramfs.lifecycle.ramdisk import MKFS

MIB = 1 << 20
ALGO = "lz4"
FILE_SYSTEM = "ext4"
# Times the archive: the tree in whole blocks, and what is compiled of it, took 2.3.
TREE_ROOM = 4
TREE_PLACES = (Path(sysconfig.get_path("stdlib")), Path("/usr/include"))
TREE_SUFFIXES = {".c", ".h", ".hpp", ".hh", ".inc", ".py"}


@dataclass(frozen=True)
class Way:
    """kind: of the server; options: of zramfs; commands: for its `control` before the program starts;
    packing: what is done at rest."""

    name: str
    kind: str
    options: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    packing: Packing | None = None


BACKGROUND_IDLE = 10  # seconds
WAYS = (
    Way("zram lz4", "zram"),
    Way("zramfs lz4", "zramfs"),
    Way("zramfs, units while in use", "zramfs", Packing(AUTO).options,
        (f"policy=recompress idle={BACKGROUND_IDLE}", f"policy=units idle={BACKGROUND_IDLE} level={AUTO}")),
    Way("zramfs, packed at rest", "zramfs", Packing(MAX).options,
        packing=Packing(MAX, dense=True)),
)


@dataclass(frozen=True)
class Look:
    """In bytes. stored: of the pages on the device; resident: of RAM that they cost, with everything."""

    stored: int
    resident: int


@dataclass(frozen=True)
class Outcome:
    """fill, use: seconds of the phases. client, server: CPU seconds of the program and of the daemon in both;
    kernel threads are in neither. machine: of all CPUs in both, busy with whatever it was. packing: of the
    daemon, at rest."""

    case: str
    way: str
    rest: Look
    after: Look
    fill: float
    use: float
    client: float
    server: float
    machine: float
    packing: float

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def busy_seconds() -> float:
    """CPU time of the machine since its start, of everything but idling, waiting and other guests."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _idle, _wait, irq, softirq = fields[:7]
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def observe(case: str, way: Way, server: peers.Server, empty: int, program: Program,
            settle: Callable[[], None], renew: Callable[[], None], interrupt: Interrupt) -> Outcome:
    """settle: before memory is read; renew: before the use, so that nothing is cached above the device."""
    def look() -> Look:
        settle()
        if server.kind == "zram":
            used, stored = memory.mm_stat(server)
            return Look(stored, used + stored // load.PAGE * memory.KERNEL_TABLE_BYTES)
        assert server.tree is not None
        stored = int((server.tree / "zram/mm_stat").read_text().split()[0])
        return Look(stored, memory.resident(server.pids) - empty)

    def spent() -> tuple[float, float, float]:
        return program.cpu, load.server_cpu(server.pids), busy_seconds()

    # The program has run since a moment: what it has used so far counts.
    start = (0.0, *spent()[1:])
    fill = program.wait_word("filled", interrupt)
    settle()
    filled = spent()
    if way.packing:
        pack(server, way.packing, interrupt)
    packing = load.server_cpu(server.pids) - filled[1]
    rest = look()
    renew()
    before = spent()
    program.go()
    use = program.wait_word("used", interrupt)
    used = spent()
    after = look()
    client, serving, machine = (a - b + c - d for a, b, c, d in zip(filled, start, used, before, strict=True))
    return Outcome(case, way.name, rest, after, fill, use, client, serving, machine, packing)


# ---- a source tree --------------------------------------------------------------------------------

def tree_archive(size: int) -> Path:
    """An archive with `size` bytes of sources of this machine: Python's library, then C headers; made if
    missing."""
    target = cache_dir() / f"tree-{size // MIB}M.tar"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="making-") as scratch:
        fresh = Path(scratch, "archive")
        with tarfile.open(fresh, "w") as archive:
            spent = 0
            for file, name in _sources():
                spent += file.stat().st_size
                archive.add(file, name)
                if spent >= size:
                    break
            else:
                raise BenchmarkError(f"expected {size // MIB} MiB of sources, found {spent // MIB}; "
                                     f"choose --tree {max(1, spent // MIB)}M or less")
        fresh.rename(target)
    return target


def _sources() -> Iterator[tuple[Path, str]]:
    for number, place in enumerate(TREE_PLACES):
        for folder, folders, names in os.walk(place):
            folders.sort()
            for name in sorted(names):
                file = Path(folder, name)
                if file.suffix in TREE_SUFFIXES and file.is_file() and not file.is_symlink():
                    yield file, f"{number}/{file.relative_to(place)}"


def tree(way: Way, size: int, interrupt: Interrupt) -> Outcome:
    """Unpack and compile the tree on a fresh file system, then mount it anew and use all of it."""
    need(f"mkfs.{FILE_SYSTEM}", "e2fsprogs")
    archive = tree_archive(size)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(
            prefix="zramfs-benchmark-", ignore_cleanup_errors=True))).resolve()
        disk = size * TREE_ROOM // MIB * MIB
        server = stack.enter_context(
            peers.zram(disk, ALGO) if way.kind == "zram" else peers.zramfs(scratch, disk, ALGO, *way.options))
        empty = memory.resident(server.pids)
        device = server.path if way.kind == "zram" else stack.enter_context(peers.loop(server.path))
        for line in way.commands:
            control(server, line)
        command([f"mkfs.{FILE_SYSTEM}", *MKFS[FILE_SYSTEM], device])
        point = scratch / "mounted"
        point.mkdir()
        def renew() -> None:
            if point.is_mount():
                peers.unmount_soon(point)
            command(["mount", "-o", "discard", device, point])

        renew()
        stack.callback(peers.unmount_soon, point)
        program = stack.enter_context(Program(sys.executable, HERE / "build_tree.py", archive, point))
        return observe("tree", way, server, empty, program, lambda: _flush(point), renew, interrupt)


def _flush(point: Path) -> None:
    """What the file system holds back goes to the device."""
    command(["sync", "-f", point])


# ---- a program larger than its memory --------------------------------------------------------------

def swap(way: Way, size: int, limit: int, uses: int, interrupt: Interrupt) -> Outcome:
    """A program with `size` bytes of memory in a cgroup of `limit` bytes; the rest is on swap."""
    image = corpus("process", size)
    with swapping.area(way.kind, 2 * size, ALGO, *way.options) as server, swapping.group(limit) as group:
        empty = memory.resident(server.pids)
        for line in way.commands:
            control(server, line)
        words = swapping.within(group, built("swap_image"), image, size // MIB, uses)
        with Program(*words) as program:
            found = observe("swap", way, server, empty, program, lambda: None, lambda: None, interrupt)
            program.go()
            program.wait_word("verified", interrupt)
            return found
