# SPDX-License-Identifier: Apache-2.0
"""Finds and takes down what a test run left on the machine: swaps, mounts, loops, zrams, processes.

A run owns what bears its name, zramfs_test_PID_STARTTIME, in a path, a mount's source or (for
processes) in the environment variable ZRAMFS_TEST_OWNER. Runs go on side by side on one machine, so
only the caller's own things and those of runs that no longer live are ever touched. No hyphen is in
the name, because rundir.escape() would change it in the names of run directories.

    python -m tests.support.leftovers     takes down what dead runs left, and says so
"""
from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT = "ZRAMFS_TEST_OWNER"
_OWNER = re.compile(r"zramfs_test_(\d+)_(\d+)")
RUN_DIRECTORIES = Path("/run/zramfs")
# A zram device bears no name. An empty file OWNER.zramN stands for each that a run has added.
ZRAM_MARKS = Path("/run")
_STEP_SECONDS = 20
_NOBODY = 65534  # whose run directories the tests of ordinary users make
_GOING = ("process", "loop", "run directory")  # kinds that may go by themselves
SPARED: set[int] = set()  # processes of this run that are there to its end


def _start_time(pid: int) -> str:
    """Clock ticks since boot at which the process began: tells a reused pid from the old one.
    Raises OSError when there is none; one that has ended, but for a thread that hangs, is none."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    fields = stat[stat.rindex(")") + 2:].split()
    if fields[0] in "ZX":
        raise ProcessLookupError(errno.ESRCH, f"process {pid} has ended")
    return fields[19]


def owner_name(pid: int | None = None) -> str:
    pid = pid or os.getpid()
    return f"zramfs_test_{pid}_{_start_time(pid)}"


def owner_of(text: str) -> str | None:
    match = _OWNER.search(text)
    return match.group(0) if match else None


def lives(owner: str) -> bool:
    match = _OWNER.fullmatch(owner)
    try:
        return match is not None and _start_time(int(match.group(1))) == match.group(2)
    except OSError:
        return False


@dataclass(frozen=True)
class Leftover:
    """kind: swap | mount | loop | zram | fuse mount | process | run directory; what: device, path or pid."""

    kind: str
    what: str
    owner: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.what}" + (f" ({self.detail})" if self.detail else "")


def _unescape(word: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m.group(1), 8)), word)


def _mounts() -> list[tuple[str, str, str]]:
    """(mount point, type, source), the latest mount last."""
    rows = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        head, _, tail = line.partition(" - ")
        kind, source = tail.split()[:2]
        rows.append((_unescape(head.split()[4]), kind, _unescape(source)))
    return rows


def _loops() -> dict[str, str]:
    """/dev/loopN -> the file behind it."""
    found = {}
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            found[f"/dev/{backing.parent.parent.name}"] = backing.read_text().rstrip("\n")
        except OSError:
            continue
    return found


def zram_mark(device: str, owner: str) -> Path:
    """device: zramN."""
    return ZRAM_MARKS / f"{owner}.{device}"


def _zrams() -> list[Leftover]:
    marks = ((path, owner_of(path.name)) for path in ZRAM_MARKS.glob("zramfs_test_*.zram*"))
    return [Leftover("zram", path.suffix[1:], owner) for path, owner in marks if owner]


def _remove_zram(leftover: Leftover) -> None:
    device = leftover.what
    with contextlib.suppress(OSError):
        Path(f"/sys/block/{device}/reset").write_text("1")
        Path("/sys/class/zram-control/hot_remove").write_text(device.removeprefix("zram"))
    if not Path(f"/sys/block/{device}").exists():
        zram_mark(device, leftover.owner).unlink(missing_ok=True)


def _run_directories() -> list[tuple[Path, str]]:
    return [(path, owner) for path in RUN_DIRECTORIES.glob("*") if (owner := owner_of(path.name))]


def _processes() -> list[Leftover]:
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in (os.getpid(), *SPARED):
            continue
        try:
            environment = (entry / "environ").read_bytes()
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        for word in environment.split(b"\0"):
            if word.startswith(ENVIRONMENT.encode() + b"="):
                owner = owner_of(word.decode(errors="replace"))
                if owner and command:  # a zombie has no command line and nothing to take down
                    found.append(Leftover("process", entry.name, owner, command.strip()[:200]))
    return found


def find(wanted: Callable[[str], bool]) -> list[Leftover]:
    """Everything whose owner is wanted, in the order in which it can be taken down."""
    loops = {name: owner for name, backing in _loops().items() if (owner := owner_of(backing))}
    found = []
    for line in Path("/proc/swaps").read_text().splitlines()[1:]:
        device = _unescape(line.split()[0])
        if owner := loops.get(device) or owner_of(device):
            found.append(Leftover("swap", device, owner))
    mounts = []
    for point, kind, source in reversed(_mounts()):
        if owner := owner_of(point) or owner_of(source) or loops.get(source):
            is_fuse = kind.startswith("fuse")
            mounts.append(Leftover("fuse mount" if is_fuse else "mount", point, owner, f"{kind}, {source}"))
    found += [m for m in mounts if m.kind == "mount"]
    found += [Leftover("loop", name, owner, _loops().get(name, "")) for name, owner in loops.items()]
    found += _zrams()
    found += [m for m in mounts if m.kind == "fuse mount"]
    found += _processes()
    found += [Leftover("run directory", str(path), owner) for path, owner in _run_directories()]
    return [leftover for leftover in found if wanted(leftover.owner)]


def _run(*words: str) -> bool:
    """False when the command fails, or hangs because a dead server stands behind it."""
    try:
        done = subprocess.run(words, capture_output=True, timeout=_STEP_SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def _end_process(leftover: Leftover, how: int) -> None:
    try:
        if owner_of(Path(f"/proc/{leftover.what}/environ").read_text(errors="replace")) == leftover.owner:
            os.kill(int(leftover.what), how)
    except OSError:
        return


def _end_processes(processes: list[Leftover]) -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        for leftover in processes:
            _end_process(leftover, how)
        until = time.monotonic() + 3
        while time.monotonic() < until and {p.what for p in processes} & {p.what for p in _processes()}:
            time.sleep(0.05)


def _take_down_once(found: list[Leftover]) -> None:
    for leftover in found:
        if leftover.kind == "swap":
            _run("swapoff", leftover.what)
        elif leftover.kind == "loop":
            _run("losetup", "--detach", leftover.what)
        elif leftover.kind == "zram":
            _remove_zram(leftover)
        elif leftover.kind in ("mount", "fuse mount"):
            if leftover.kind == "mount":
                # A frozen file system outlives its unmount, and holds its loop device, until it is thawed.
                _run("fsfreeze", "--unfreeze", leftover.what)
            if not _run("umount", leftover.what):
                _run("umount", "--lazy", leftover.what)


def _end_groups(wanted: Callable[[str], bool]) -> None:
    """Ends the programs in the memory groups of wanted owners: what they have in swap need not be brought
    back into a group that has no room for it."""
    for process in _processes():
        with contextlib.suppress(OSError):
            owner = owner_of(Path(f"/proc/{process.what}/cgroup").read_text(errors="replace"))
            if owner and wanted(owner):
                _end_process(process, signal.SIGKILL)


def _restore_watermark(wanted: Callable[[str], bool]) -> None:
    """What a swap device that was not stopped has raised."""
    with contextlib.suppress(ImportError):
        from zramfs.host import watermark

        for user in watermark.users():
            if (owner := owner_of(user)) and wanted(owner):
                watermark.release(Path(user))


def sweep(wanted: Callable[[str], bool], patience: float = 2.0) -> list[Leftover]:
    """Takes down everything whose owner is wanted; answers what there was. patience: seconds for what goes by
    itself."""
    _restore_watermark(wanted)
    first = find(wanted)
    end = time.monotonic() + patience
    # A keeper ends just after its daemon, and a loop device when whoever looked at it has closed it.
    while first and all(leftover.kind in _GOING for leftover in first) and time.monotonic() < end:
        time.sleep(0.1)
        first = find(wanted)
    if not first:
        return []
    _end_groups(wanted)
    _take_down_once(first)
    # With its servers gone whatever still hung on them fails at once instead of waiting.
    _end_processes([leftover for leftover in find(wanted) if leftover.kind == "process"])
    _take_down_once(find(wanted))
    second = find(wanted)
    if all(leftover.kind == "run directory" for leftover in second):
        for leftover in second:
            shutil.rmtree(leftover.what, ignore_errors=True)
    return first


def of_dead_runs(owner: str) -> bool:
    return not lives(owner)


def sweep_directories() -> None:
    """Removes the memory groups and the directories of dead runs, and the place of an ordinary user's
    devices, unless one is still in use."""
    for parent in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
        for group in parent.glob("zramfs_test_*"):
            if of_dead_runs(group.name):
                with contextlib.suppress(OSError):
                    group.rmdir()
    # Not by the tests themselves, since those of another share may be about to make a device in it.
    with contextlib.suppress(OSError):
        Path(f"/tmp/zramfs-{_NOBODY}").rmdir()
    points = [point for point, _, _ in _mounts()]
    for directory in Path(tempfile.gettempdir()).glob("zramfs_test_*"):
        owner = owner_of(directory.name)
        if owner and of_dead_runs(owner) and not any(p.startswith(f"{directory}/") for p in points):
            shutil.rmtree(directory, ignore_errors=True)


def main() -> int:
    for leftover in sweep(of_dead_runs):
        print(f"took down what an earlier run left: {leftover}")
    stubborn = find(of_dead_runs)
    for leftover in stubborn:
        print(f"could not take down: {leftover}", file=sys.stderr)
    sweep_directories()
    return 1 if stubborn else 0


if __name__ == "__main__":
    sys.exit(main())
