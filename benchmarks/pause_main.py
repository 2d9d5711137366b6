# SPDX-License-Identifier: Apache-2.0
"""benchmarks/pause: what a reader notices when the daemon of a device is killed, and where the time goes."""
from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console

from benchmarks.main import machine, size_option
from benchmarks.tables import table, titled, told, write
from benchmarks.tools import BenchmarkError, Interrupt, command, wait_until
from zramfs.lifecycle import rundir
from zramfs.lifecycle.rundir import Rundir, State

PAGE, MIB = 4096, 1 << 20
WATCHED = 0.1  # seconds after a kill in which the longest read is looked for
SETTLED = 2.0  # seconds for a new standby to map the memory file and to fork its replacement
SERVES = re.compile(r"the lane serves again, ([\d.]+) ms after its turn came")
RECOVERED = re.compile(r"pages are taken over after ([\d.]+) ms")


@dataclass(frozen=True)
class Kill:
    """Milliseconds. pause: the longest read of a reader at depth 1. gone: until the killed process had given
    its memory back. serves: from the turn of the next one until it served; of that recovered, by the scan.
    load: of the machine, then."""

    pause: float
    gone: float
    serves: float
    recovered: float
    load: float

    @property
    def turn(self) -> float:
        """Until the turn of the next one came, and the reader's own way."""
        return max(0.0, self.pause - self.serves)


class Device:
    """One with `size` random bytes and a standby, made by a Python interpreter's zramfs."""

    def __init__(self, python: str, place: Path, size: int) -> None:
        self.words = [python, "-P", "-m", "zramfs.cli"]  # its own, and not what lies here
        self.place = place
        command([*self.words, "create", place, "--size", str(2 * size), "--standby"])
        found = rundir.find(str(place))
        assert found is not None  # it was just made
        self.rundir: Rundir = found
        with self.opened() as fd:
            for at in range(0, size, MIB):
                os.pwrite(fd, os.urandom(MIB), at)

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        fd = os.open(self.rundir.disk, os.O_RDWR | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    def state(self) -> State:
        state = self.rundir.read()
        if state is None:
            raise BenchmarkError(f"{self.place} has no state any more; its log is {self.rundir.log}")
        return state

    def kill(self) -> Kill:
        wait_until(lambda: self.state().standby_pid not in (0, self.state().pid), "a standby", 60)
        time.sleep(SETTLED)
        pid, gone = self.state().pid, [0.0]
        pidfd = os.pidfd_open(pid)

        def watch() -> None:
            select.select([pidfd], [], [])
            gone[0] = time.monotonic()

        watcher = threading.Thread(target=watch)
        watcher.start()
        with self.opened() as fd:
            os.pread(fd, PAGE, 0)
            longest, killed = 0.0, time.monotonic()
            os.kill(pid, signal.SIGKILL)
            while (began := time.monotonic()) < killed + WATCHED or not longest:
                os.pread(fd, PAGE, 0)
                longest = max(longest, time.monotonic() - began)
        watcher.join()
        os.close(pidfd)
        wait_until(lambda: self.state().pid != pid, "another daemon")
        return Kill(longest * 1e3, (gone[0] - killed) * 1e3, self.last(SERVES), self.last(RECOVERED),
                    os.getloadavg()[0])

    def last(self, line: re.Pattern[str]) -> float:
        """The number in the last such line of the log; 0 for a version that says no such thing."""
        return float((line.findall(self.rundir.log.read_text()) or [0])[-1])

    def stop(self) -> None:
        command([*self.words, "stop", self.place])


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--size", callback=size_option, default="1G", show_default=True, help="Stored, incompressible.")
@click.option("--kills", type=click.IntRange(1), default=20, show_default=True, help="Of each daemon.")
@click.option("--python", "pythons", multiple=True, metavar="FILE",
              help="Interpreter whose zramfs is measured; several take turns.  [the one that runs this]")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path),
              default=Path("benchmark-results/pause"), show_default=True,
              help="Directory for table.txt and results.json.")
def main(size: int, kills: int, pythons: tuple[str, ...], output: Path) -> None:
    """Kill the daemon of a device again and again while a program reads one page after another, and say what
    the longest read took. The load of the machine stands beside it: on busy CPUs all steps take longer.
    """
    progress = Console(stderr=True)
    found: dict[str, list[Kill]] = {each: [] for each in pythons or (sys.executable,)}
    place = Path(tempfile.mkdtemp(prefix="zramfs-pause-"))
    with told("benchmarks/pause", progress), contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, place, ignore_errors=True)
        output.mkdir(parents=True, exist_ok=True)
        interrupt = stack.enter_context(Interrupt())
        devices = {}
        for number, python in enumerate(found):
            devices[python] = Device(python, place / str(number), size)
            stack.callback(devices[python].stop)
        for number in range(kills):
            for python, device in devices.items():
                interrupt.check()
                found[python].append(device.kill())
                progress.print(f"{number + 1}/{kills} {python}: {found[python][-1].pause:.0f} ms",
                               highlight=False)
    show(Console(), found, size)
    write(output, lambda console: show(console, found, size), {
        "machine": machine(), "size": size,
        "kills": {python: [asdict(each) for each in row] for python, row in found.items()}})


def show(console: Console, found: dict[str, list[Kill]], size: int) -> None:
    rows = table("ms", "median", "worst")
    for python, row in found.items():
        for name, values in (
            ("pause of the reader", [each.pause for each in row]),
            ("  until the turn of the next daemon", [each.turn for each in row]),
            ("  from there until it served", [each.serves for each in row]),
            ("    of that, the scan of what is stored", [each.recovered for each in row]),
            ("beside it: the old process gives its memory back", [each.gone for each in row]),
            ("load of the machine", [each.load for each in row]),
        ):
            rows.add_row(name, f"{statistics.median(values):.1f}", f"{max(values):.1f}")
        rows.add_section()
        console.print(f"{len(row)} kills, {size // MIB} MiB stored: {python}", highlight=False)
    titled(console, "A daemon that is killed, in the order above", rows)
