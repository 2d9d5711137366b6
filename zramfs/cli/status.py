# SPDX-License-Identifier: Apache-2.0
"""zramfs status: zramctl's columns."""
from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from zramfs import __version__
from zramfs.host import bounded, loops, mounts, paths, swaps
from zramfs.lifecycle import rundir
from zramfs.lifecycle.rundir import Rundir, State
from zramfs.text.sizes import PAGE, format_size, format_time

from . import completion
from .devices import no_device
from .output import Value, print_object, print_raw, print_table, say
from .version import version

if TYPE_CHECKING:
    from zramfs.views.scrape import Scrape

C = TypeVar("C", bound=Callable[..., Any])


class Row:
    """One device. files: the texts of files of its tree, empty if it did not answer. No dataclass: its module
    and this class of it take 1.3 ms."""

    def __init__(
        self, name: str, directory: Path, disk: Path | None, state: State | None, health: str = "ready",
        files: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        self.directory = directory
        self.disk = disk
        self.state = state
        self.health = health
        self.silent = "daemon"  # what of it does not answer, if it hangs
        self.files = files or {}

    @cached_property
    def loops(self) -> list[str]:
        return loops.find(self.disk) if self.disk else []

    @cached_property
    def swap(self) -> swaps.SwapArea | None:
        return next((area for area in swaps.swap_areas() if area.path in self.loops), None)

    @cached_property
    def metrics(self) -> Scrape | None:
        """None if they were not asked for, or the device did not answer."""
        if (text := self.files.get("metrics")) is None:
            return None
        from zramfs.views import scrape  # for the columns that few ask for

        return scrape.parse_metrics(text, f"{self.directory}/metrics")

    def mm_stat(self, column: int) -> int | None:
        return int(self.files["zram/mm_stat"].split()[column]) if "zram/mm_stat" in self.files else None


class Column(NamedTuple):
    """human: how a number is shown without --bytes. Numbers are aligned to the right. file: one that value
    needs besides those of FILES. digits: after the decimal point."""

    help: str
    value: Callable[[Row], Value]
    human: Callable[[Any], str] | None = None
    is_number: bool = False
    file: str | None = None
    digits: int = 4

    @property
    def right(self) -> bool:
        return self.human is not None or self.is_number


def _ratio(row: Row) -> float | None:
    data, total = row.mm_stat(0), row.mm_stat(2)
    return round(data / total, 4) if data is not None and total else None


def _algorithm(row: Row) -> str | None:
    chosen = row.files.get("zram/comp_algorithm", "").partition("[")[2].partition("]")[0]
    return chosen or None


def _disksize(row: Row) -> int | None:
    return int(row.files["zram/disksize"]) if "zram/disksize" in row.files else None


def _threads(row: Row) -> int | None:
    return row.state.threads if row.state else None


def _pid(row: Row) -> int | None:
    return row.state.pid if row.state else None


def _keeper(row: Row) -> int | None:
    return row.state.keeper_pid or None if row.state else None


def _standby(row: Row) -> int | None:
    return row.state.standby_pid or None if row.state else None


def _release(row: Row) -> str | None:
    return row.state.release or None if row.state else None


def _longest(row: Row) -> float | None:
    return row.metrics.value("longest_request_seconds") if row.metrics else None


def _room(row: Row) -> int | None:
    rooms = row.metrics.by("room_bytes", "bound") if row.metrics else {}
    return int(min(rooms.values())) if rooms else None


def _metric(name: str, unit: int = 1, **labels: str) -> Callable[[Row], int | None]:
    """Reads a metric of whole numbers, times `unit`. One that the device does not have is 0: it has no
    backing store, or no size yet."""
    return lambda row: int(row.metrics.number(name, **labels)) * unit if row.metrics else None


def _density(row: Row) -> str | None:
    modes = row.metrics.by("density_mode", "mode") if row.metrics else {}
    return next((mode for mode, is_on in modes.items() if is_on), None)


def _saving(row: Row) -> str | None:
    if not row.metrics or not row.metrics.number("save_running"):
        return None
    pages = row.metrics.by("save_pages", "kind")
    return f"{100 * pages['taken'] / pages['all']:.0f}%" if pages["all"] else "0%"


def _mountpoint(row: Row) -> str | None:
    return swaps.mounted_on(row.loops, mounts.mounts(), swaps.swap_areas()) if row.loops else None


COLUMNS = {
    "NAME": Column("name of the device", lambda row: row.name),
    "DISKSIZE": Column("limit on the uncompressed amount of data", _disksize, human=format_size),
    "DATA": Column("uncompressed size of stored data", lambda row: row.mm_stat(0), human=format_size),
    "COMPR": Column("compressed size of stored data", lambda row: row.mm_stat(1), human=format_size),
    "ALGORITHM": Column("the selected compression algorithm", _algorithm),
    "STREAMS": Column("number of threads, which compress and serve", _threads, is_number=True),
    "ZERO-PAGES": Column("same-filled pages, taking no memory", lambda row: row.mm_stat(5), is_number=True),
    "TOTAL": Column("memory the pool takes for the data", lambda row: row.mm_stat(2), human=format_size),
    "MEM-LIMIT": Column("the most the pool may take, 0 = no limit", lambda row: row.mm_stat(3),
                        human=format_size),
    "MEM-ROOM": Column("what the pool may still take, by its limit, the host and memory cgroups", _room,
                       human=format_size, file="metrics"),
    "MEM-USED": Column("the most that the pool has taken", lambda row: row.mm_stat(4), human=format_size),
    # In pages. zramctl shows them as if they were bytes, and scripts that read its output get the same here.
    "MIGRATED": Column("pages freed by compaction", lambda row: row.mm_stat(6), human=format_size),
    "HUGE-PAGES": Column("pages that do not compress", lambda row: row.mm_stat(7), is_number=True),
    "HOT": Column("data of single pages that are as they were written",
                  _metric("contents_pages", PAGE, kind="hot"), human=format_size, file="metrics"),
    "RECOMPRESSED": Column("pages that recompression has made smaller",
                           _metric("recompress_pages_total", result="won"), is_number=True, file="metrics"),
    "IN-UNITS": Column("data compressed together with its neighbours",
                       _metric("unit_places", PAGE, state="live"), human=format_size, file="metrics"),
    "SHARED": Column("data of pages that share objects, because they are equal",
                     _metric("shared_pages", PAGE), human=format_size, file="metrics"),
    "DENSITY": Column("how readily it becomes denser by itself: off, auto or max", _density, file="metrics"),
    "WRITTEN-BACK": Column("data that lies on the backing store", _metric("written_back_pages", PAGE),
                           human=format_size, file="metrics"),
    "RESIDENT": Column("memory of the pool, with what it keeps ready", _metric("resident_bytes"),
                       human=format_size, file="metrics"),
    "COMP-RATIO": Column("DATA / TOTAL", _ratio, is_number=True),
    "MOUNTPOINT": Column("where a file system on the device is mounted, or [SWAP]", _mountpoint),
    # Less than DATA, which also counts pages that programs have freed and the kernel has not discarded yet.
    "SWAP-USED": Column("swap in use on the device", lambda row: row.swap.used if row.swap else None,
                        human=format_size),
    "SWAP-PRIO": Column("priority of the swap area", lambda row: row.swap.priority if row.swap else None,
                        is_number=True),
    "DIRECTORY": Column("where disk, control and zram/ are", lambda row: str(row.directory)),
    "LOOP": Column("loop devices on the device", lambda row: ",".join(row.loops) or None),
    "PID": Column("process that serves the device", _pid, is_number=True),
    "KEEPER": Column("process that starts another when that one dies", _keeper, is_number=True),
    "STANDBY": Column("process that waits to take over", _standby, is_number=True),
    "VERSION": Column("version of zramfs that serves the device", _release),
    "SAVING": Column("how much of the pages is saved, while a save runs", _saving, file="metrics"),
    "LONGEST": Column("the longest that a request took (seconds)", _longest, human=format_time,
                      file="metrics", digits=6),
    "STATE": Column("ready, starting, frozen, dead, failed, ending or hangs", lambda row: row.health),
}
DEFAULT = ["NAME", "ALGORITHM", "DISKSIZE", "DATA", "COMPR", "TOTAL", "STREAMS", "MOUNTPOINT"]
ZRAMCTL_SIZE = 5  # characters that a size has at least, in its table
GOVERNOR, CONTENTS = "memory/governor", "memory/contents"
FILES = ("zram/disksize", "zram/comp_algorithm", "zram/mm_stat")
# zramctl's options that set devices up, how many words they take, and the command that does the same here.
ELSEWHERE = {
    ("-a", "--algorithm"): (1, "the algorithm is chosen by `zramfs create DIR --algo NAME`"),
    ("-f", "--find"): (0, "no free device needs to be found: `zramfs create DIR` makes one"),
    ("-p", "--algorithm-params"): (1, "parameters are given by `zramfs create DIR --algo NAME:LEVEL`"),
    ("-r", "--reset"): (0, "data and settings are dropped by `zramfs control DIR reset`"),
    ("-s", "--size"): (1, "devices are made by `zramfs create DIR --size SIZE`"),
    ("-t", "--streams"): (1, "the number of threads is chosen by `zramfs create DIR --threads NUMBER`"),
}


def _columns(text: str | None) -> list[str]:
    """The chosen ones, in order; +LIST adds to the default ones."""
    if text is None:
        return DEFAULT
    adds = text.startswith("+")
    chosen = [name.upper() for name in text.removeprefix("+").split(",")]
    for name in chosen:
        if name not in COLUMNS:
            raise click.BadParameter(f"unknown column {name!r}: expected some of {', '.join(COLUMNS)}")
    return DEFAULT + chosen if adds else chosen


def _elsewhere(command: C) -> C:
    """Answers zramctl's other options with the way to do the same here."""
    for names, (words, sentence) in ELSEWHERE.items():
        def refuse(_ctx: click.Context, _param: click.Parameter, value: object, why: str = sentence) -> None:
            if value:
                raise click.UsageError(f"`zramfs status` only shows; {why}")

        command = click.option(
            *names, is_flag=not words, hidden=True, expose_value=False, callback=refuse
        )(command)
    return version(command, hidden=True)


@click.command(epilog="\b\nColumns:\n" + "\n".join(f"{name:>12}  {c.help}" for name, c in COLUMNS.items()))
@click.argument("dirs", nargs=-1, metavar="[DIR]...", shell_complete=completion.devices)
@_elsewhere
@click.option("-b", "--bytes", "in_bytes", is_flag=True, help="Sizes in bytes rather than as 1.3G.")
@click.option("-J", "--json", "as_json", is_flag=True, help="As JSON.")
@click.option("-n", "--noheadings", is_flag=True, help="Without the line of headings.")
@click.option("-o", "--output", metavar="LIST", callback=lambda _ctx, _param, text: _columns(text),
              shell_complete=completion.list_of(COLUMNS),
              help="Columns, separated by commas; +LIST adds to the default ones.")
@click.option("--output-all", is_flag=True, help="All columns.")
@click.option("--details", is_flag=True,
              help="Also what lies where on each device, and what each step has won and cost.")
@click.option("--raw", is_flag=True, help="Without alignment, blanks in values as \\x20.")
def status(
    dirs: tuple[str, ...], in_bytes: bool, as_json: bool, noheadings: bool, output: list[str],
    output_all: bool, details: bool, raw: bool,
) -> int:
    """Show the devices, or those on the directories DIR, as zramctl does.

    If one of them is swap, one more column shows how much of it is in use. A device that does not answer
    within two seconds has a row as well, a STATE column says why, and the exit status is 1.
    """
    rows = _rows(dirs)
    output = list(COLUMNS) if output_all else output
    _ask(rows, [*FILES, *{file for name in output if (file := COLUMNS[name].file)}, *[CONTENTS] * details])
    for row in rows:
        if row.health not in ("ready", "starting"):
            say(f"warning: {row.name}: {_advice(row)}")
        elif row.state and (release := row.state.other_release()):
            say(f"note: {row.name} is served by zramfs {release}, and {__version__} is installed; `zramfs "
                f"upgrade {row.state.where}` replaces it while it is in use")
    unwell = any(row.health != "ready" for row in rows)
    if output == DEFAULT:
        swap = ["SWAP-USED"] if any(row.swap for row in rows) else []
        output = [*DEFAULT, *swap, *(["STATE"] if unwell else [])]
    if as_json:
        _print_json(rows, output, in_bytes, details)
        return int(unwell)
    print_devices(rows, output, in_bytes=in_bytes, raw=raw, show_headings=not noheadings)
    if details:
        from . import contents  # for those who ask for it, as the metrics

        for row in rows:
            if found := contents.parse_contents(row.files.get(CONTENTS, ""), str(row.directory)):
                contents.print_contents(row.name, found, in_bytes)
    return int(unwell)


def _print_json(rows: Sequence[Row], output: Sequence[str], in_bytes: bool, details: bool) -> None:
    """As util-linux's --json: {"zramfs": [{heading in lower case: value}]}."""
    keys = [heading.lower() for heading in output]
    shown: dict[str, Any] = {"zramfs": [
        dict(zip(keys, (_json(COLUMNS[name], row, in_bytes) for name in output), strict=True))
        for row in rows]}
    if details:
        from . import contents

        shown["contents"] = contents.json_of({
            row.name: contents.parse_contents(row.files.get(CONTENTS, ""), str(row.directory))
            for row in rows})
    print_object(shown)


def print_devices(
    rows: Sequence[Row], columns: Sequence[str], *, in_bytes: bool, raw: bool, show_headings: bool
) -> None:
    """Prints the table as zramctl does."""
    cells = [[_text(COLUMNS[name], row, in_bytes) for name in columns] for row in rows]
    if raw:
        print_raw(columns, cells, show_headings=show_headings)
    elif rows:
        right = [COLUMNS[name].right for name in columns]
        least = [ZRAMCTL_SIZE if COLUMNS[name].human is format_size else 0 for name in columns]
        print_table(columns, cells, right, least, show_headings=show_headings)


def _rows(wanted: Sequence[str]) -> list[Row]:
    """Of all devices of this user, or of the named ones in their order, each once. Raises ZramfsError."""
    if not wanted:
        return [_row(each) for each in rundir.rundirs()]
    found = [_named_row(each) for each in wanted]
    return list({row.directory: row for row in found}.values())


def _named_row(wanted: str) -> Row:
    if found := rundir.find(wanted):
        return _row(found)
    # Another user's device, if it was made with --allow-other.
    place = paths.resolve(wanted)
    mount = mounts.mount_at(place)
    if mount is None or mount.fstype != mounts.FSTYPE:
        raise no_device(wanted)
    return Row(mount.source, place, None, None)


def _row(each: Rundir) -> Row:
    state = each.read()
    if state is not None and state.alive():
        health = state.phase
    else:
        health = "failed" if state is not None and state.phase == "failed" else "dead"
    return Row(each.name, Path(state.directory) if state else each.tree, each.disk, state, health)


def _ask(rows: list[Row], files: Sequence[str]) -> None:
    """Asks all of them at once, so that ten devices that hang take no more time than one: the tree and
    the lane, which have threads of their own: data is where the lane is."""
    asked = [row for row in rows if row.health not in ("dead", "failed")]
    calls = [(row, bounded.Call(
        partial(_read, row.directory, files), partial(_ask_lane, row.disk or row.directory / "disk"),
    )) for row in asked]
    deadline = time.monotonic() + bounded.ANSWER_TIMEOUT
    for row, call in calls:
        tree, lane = call.outcomes(deadline)
        if isinstance(tree, TimeoutError):
            row.health = "hangs"
        elif isinstance(tree, OSError):
            if row.state is None:  # another user's device, of which nothing else is known
                raise tree
            _note_end(row, tree)
        else:
            row.files = tree
            if row.files.get(GOVERNOR, "").startswith("state frozen\n"):
                row.health = "frozen"
        if isinstance(lane, TimeoutError):
            row.silent = "lane" if row.health != "hangs" else row.silent
            row.health = "hangs"
        elif isinstance(lane, OSError):
            _note_end(row, lane)


def _note_end(row: Row, error: OSError) -> None:
    if row.health == "ready":
        row.health = "ending" if row.state is None or row.state.alive() else "dead"
        say(f"warning: {error.filename or row.directory}: {error.strerror}")


def _ask_lane(disk: Path) -> None:
    # Others may not reach the disk of a device whose tree they see.
    with contextlib.suppress(PermissionError):
        os.statvfs(disk)


def _read(directory: Path, files: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in (*files, GOVERNOR):
        try:
            found[name] = (directory / name).read_text()
        except FileNotFoundError:
            if name not in (GOVERNOR, CONTENTS):  # which daemons of older versions do not have
                raise
    return found


def _advice(row: Row) -> str:
    where = row.state.where if row.state else row.directory
    if row.health == "hangs":
        pid = f" (pid {row.state.pid})" if row.state else ""
        what = f"its daemon{pid}" if row.silent == "daemon" else f"the lane of its daemon{pid}"
        return f"{what} has not answered for {bounded.ANSWER_TIMEOUT:g} s"
    if row.health == "frozen":
        return (f"its file system is frozen, because the pool is past its limit; writers wait until you "
                f"raise mem_limit (`zramfs control {where} mem_limit=SIZE`) and delete something")
    if row.health == "ending":
        return "its tree or its lane is gone; it mounts the tree again, or ends when nobody uses its disk"
    if row.health == "failed" and row.disk:
        return (f"its daemon has failed, and its data is lost; {row.disk.with_name('log')} says why; "
                f"`zramfs stop {where}` cleans up")
    return f"its daemon is dead, and its data lost; `zramfs stop {where}` cleans up"


def _json(column: Column, row: Row, in_bytes: bool) -> Value:
    value = column.value(row)
    return column.human(value) if column.human and not in_bytes and value is not None else value


def _text(column: Column, row: Row, in_bytes: bool) -> str:
    value = _json(column, row, in_bytes)
    if isinstance(value, float):
        return f"{value:.{column.digits}f}"
    return "" if value is None else str(value)
