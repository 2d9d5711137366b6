# SPDX-License-Identifier: Apache-2.0
"""scripts/fragmentation: free memory by order after files were deleted, without and with compaction.

The measurement of the kernel series that made zsmalloc's pages movable (2016), on zramfs: ext4, eight
files written at once, every second one deleted, fstrim. Each setting has a device of its own.
"""
from __future__ import annotations

import contextlib
import json
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
from rich.console import Console

from benchmarks import fragmentation_tables, memory, pages, peers
from benchmarks.tables import told
from benchmarks.tools import BenchmarkError, Interrupt, command, need, undisturbed
from zramfs.lifecycle import ramdisk
from zramfs.views import report, sample
from zramfs.views.sample import Sample

FILES = 8
MIB = 1 << 20
# ext4 without a journal needs 2 % for its tables; the rest lets eight writers end at the same time.
SPARE = 1.06
CHUNK = 128 << 10  # bytes a write, as dd or cp makes them
QUIET_SECONDS = 2.0  # without a change: the compactor has come to rest
LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Setting:
    """control: commands before anything is written; asked: the command when the files are gone."""

    name: str
    text: str
    control: str | None
    asked: str | None


SETTINGS = (
    Setting("none", "no compaction", "proactiveness=0", None),
    Setting("objects", "objects only", "proactiveness=0", "compact=objects"),
    Setting("migration", "migration, by itself", None, None),
    Setting("asked", "migration, asked", "proactiveness=0", "compact"),
)


@dataclass(frozen=True)
class Moment:
    """rss: bytes of RAM that the daemon holds, with the memory file of the pool."""

    sample: Sample
    rss: int


@dataclass(frozen=True)
class Outcome:
    """full: all files written; before: half of them deleted and trimmed; after: seconds later, when
    nothing changed any more."""

    setting: Setting
    full: Moment
    before: Moment
    after: Moment
    seconds: float

    @property
    def left(self) -> float:
        """What the OS has back, as a share of what the pool no longer needs, 0 to 1."""
        freed = self.full.sample.mm_stat["mem_used_total"] - self.after.sample.mm_stat["mem_used_total"]
        return (self.full.rss - self.after.rss) / freed

    def figures(self) -> dict[str, object]:
        """In plain types, sizes in bytes."""
        return asdict(self.setting) | {
            "seconds": self.seconds,
            "whole_share": self.after.sample.whole_share,
            "left_share": self.left,
            "moments": {
                name: {
                    "orders": moment.sample.orders, "free": moment.sample.free,
                    "mem_used_total": moment.sample.mm_stat["mem_used_total"],
                    "resident": moment.sample.resident, "daemon_resident": moment.rss,
                    "compaction": moment.sample.compaction,
                }
                for name, moment in (("full", self.full), ("before", self.before), ("after", self.after))
            },
        }


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--size-mib", type=click.IntRange(4), default=128, show_default=True,
              help="Size of each of the eight files; the series had 128.")
@click.option("--algo", default="lz4", show_default=True, help="As in zramfs create.")
@click.option("--wait", type=click.FloatRange(QUIET_SECONDS), default=30.0, show_default=True,
              help="Seconds that the compactor gets at most, once the files are gone.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path),
              default=Path("benchmark-results/fragmentation"), show_default=True,
              help="Directory for table.txt, results.json, report.png and report.html.")
def main(size_mib: int, algo: str, wait: float, output: Path) -> None:
    """Write eight files at once onto ext4 on a zramfs device, delete every second one, trim, and look at
    the free memory by order: without compaction, with object compaction only, and with page migration.
    Needs root. Takes everything down on its way out.
    """
    progress = Console(stderr=True)
    outcomes = []
    with told("scripts/fragmentation", progress):
        ramdisk.expect_able("ext4")
        output.mkdir(parents=True, exist_ok=True)
        image = pages.image("real", size_mib * MIB)
        with Interrupt() as interrupt:
            for setting in SETTINGS:
                interrupt.check()
                progress.print(f"{setting.text}: writing {FILES} files of {size_mib} MiB", markup=False)
                outcomes.append(run(setting, image, algo, wait, interrupt))
    write(outcomes, size_mib, algo, output)
    fragmentation_tables.show(outcomes, size_mib, algo, Console(width=fragmentation_tables.WIDTH))
    click.echo(f"written: {output}/table.txt, results.json, report.png, report.html")


def run(setting: Setting, image: Path, algo: str, wait: float, interrupt: Interrupt) -> Outcome:
    """The scenario on a fresh device."""
    file_size = image.stat().st_size
    with peers.serve("zramfs", int(FILES * file_size * SPARE) // MIB * MIB + 16 * MIB, algo) as server:
        tree = server.tree
        assert tree is not None
        if setting.control:
            tell(tree, setting.control)
        with peers.loop(server.path) as device:
            ramdisk.make_file_system("ext4", str(device))
            with mounted(device) as folder:
                files = [folder / f"file{i}" for i in range(FILES)]
                write_at_once(files, image, interrupt)
                full = moment(server)
                for file in files[1::2]:
                    file.unlink()
                command(["sync", "--file-system", folder])
                command([need("fstrim", "util-linux"), folder])
                interrupt.check()
                before = moment(server)
                began = time.monotonic()
                if setting.asked:
                    tell(tree, setting.asked)
                took = settle(tree, began, wait, interrupt)
                return Outcome(setting, full, before, moment(server), took)


def moment(server: peers.Server) -> Moment:
    tree = server.tree
    assert tree is not None
    return Moment(sample.parse_sample(sample.texts(tree), tree.name, str(tree)), memory.resident(server.pids))


def tell(tree: Path, line: str) -> None:
    """Raises BenchmarkError with what `control` says about it."""
    try:
        (tree / "control").write_text(f"{line}\n")
    except OSError as error:
        said = [text for text in (tree / "control").read_text().splitlines() if text.startswith("last error")]
        raise BenchmarkError(f"the device refused {line}: {error.strerror}: {' '.join(said)}") from None


def settle(tree: Path, began: float, wait: float, interrupt: Interrupt) -> float:
    """Waits until the compactor rests, at most `wait` seconds: the seconds until its last change.

    It rests after looks of LOOK_SECONDS for QUIET_SECONDS: on a machine that stood still it did as well."""
    last, since, quiet = "", began, 0.0
    while (now := time.monotonic()) < began + wait:
        interrupt.check()
        seen = "".join(
            line for line in (tree / "memory/compaction").read_text().splitlines(keepends=True)
            if line.startswith(("pages_migrated", "pages_compacted", "bytes_returned"))
        )
        if seen != last:
            last, since, quiet = seen, now, 0.0
        elif quiet >= QUIET_SECONDS:
            break
        time.sleep(LOOK_SECONDS)
        quiet += LOOK_SECONDS
    return since - began


@contextlib.contextmanager
def mounted(device: Path) -> Iterator[Path]:
    """Without -o discard: it is fstrim that tells the device."""
    with tempfile.TemporaryDirectory(prefix="zramfs-fragmentation-", ignore_cleanup_errors=True) as folder:
        with undisturbed():
            command(["mount", "-t", "ext4", device, folder])
        try:
            yield Path(folder)
        finally:
            with undisturbed():
                ramdisk.unmount(Path(folder))


def write_at_once(files: list[Path], image: Path, interrupt: Interrupt) -> None:
    """A thread a file, each with the image's data from another place on.

    With direct I/O: what the kernel writes back from its cache comes in long runs of one file, which
    are more or less mixed from one run to the next."""
    with open(image, "rb") as source:
        data = memoryview(mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ))
    failures: list[Exception] = []

    def write_one(number: int, file: Path) -> None:
        start = number * len(data) // len(files) // CHUNK * CHUNK
        try:
            fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_DIRECT | os.O_CLOEXEC)
            try:
                for offset in range(0, len(data), CHUNK):
                    if interrupt.requested or failures:
                        return
                    at = (start + offset) % len(data)
                    if os.write(fd, data[at:at + CHUNK]) != CHUNK:
                        raise BenchmarkError(f"{file} took less than was written to it")
                os.fsync(fd)
            finally:
                os.close(fd)
        except (OSError, BenchmarkError) as error:
            failures.append(error)

    threads = [threading.Thread(target=write_one, args=pair) for pair in enumerate(files)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    interrupt.check()
    if failures:
        raise BenchmarkError(f"writing the files failed: {failures[0]}")


def write(outcomes: list[Outcome], size_mib: int, algo: str, output: Path) -> None:
    """table.txt, results.json, and the picture of the pool without and with migration."""
    (output / "table.txt").write_text(fragmentation_tables.text(outcomes, size_mib, algo), encoding="utf-8")
    results = {
        "file_mib": size_mib, "files": FILES, "algo": algo,
        "series": {name: list(orders) for name, orders in fragmentation_tables.SERIES.items()},
        "settings": [outcome.figures() for outcome in outcomes],
    }
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    by_name: dict[str, Outcome] = {outcome.setting.name: outcome for outcome in outcomes}
    # The device is gone: what was done to it says more than where it was.
    before, after = (
        replace(by_name[name].after.sample, name="scripts/fragmentation",
                directory=f"ext4: every second of {FILES} files of {size_mib} MiB deleted and trimmed")
        for name in ("none", "migration")
    )
    for name in ("report.png", "report.html"):
        report.write_report(after, before, output / name, titles=("no compaction", "with migration"))
