# SPDX-License-Identifier: Apache-2.0
"""zramfs top"""
from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from zramfs.host import mounts, swaps
from zramfs.text.plain import plain

from . import completion
from .fleet import find_members
from .output import leave

if TYPE_CHECKING:
    from rich.live import Live

    from zramfs.views.watched import Watched

# A device that takes longer is shown as it was; the keys answer meanwhile.
PATIENCE = 0.5
_KEY = re.compile(rb"\x1b[\[O][A-Z]|.", re.DOTALL)
HEADINGS_EVERY = 20  # lines, as vmstat


@click.command()
@click.argument("dirs", nargs=-1, metavar="[DIR]...", shell_complete=completion.devices)
@click.option("-i", "--interval", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True,
              metavar="SECONDS", help="Time between two readings.")
@click.option("-c", "--count", type=click.IntRange(1), metavar="NUMBER",
              help="End after this number of readings.")
def top(dirs: tuple[str, ...], interval: float, count: int | None) -> None:
    """Watch the devices on the directories DIR, or all of them, on a screen that changes.

    q or Ctrl-C ends it, ? shows all keys. If the output is no terminal, it prints one line for each
    reading. A device that ends, hangs or is reset stays on the screen, and is watched again when it comes
    back.
    """
    fleet = _Fleet(dirs)
    signal.signal(signal.SIGTERM, leave)
    try:
        if sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown"):
            _live(fleet, interval, count)
        else:
            _lines(fleet, interval, count)
    except KeyboardInterrupt:
        # How everybody ends it.
        pass
    finally:
        for device in fleet.devices:
            device.close()


class _Fleet:
    """The devices that are watched: those named, or all there are and will be."""

    def __init__(self, dirs: Sequence[str]) -> None:
        self._dirs = dirs
        self.devices: list[Watched] = []
        self.look()

    def look(self) -> None:
        """Takes in devices that are new, and where those that are known are mounted."""
        from zramfs.views.watched import Place, Watched

        # Dead ones are shown too: this is where people look for what is wrong. A DIR was there at the start.
        if self._dirs and self.devices:
            members = [member for member in find_members(()) if member.directory in self._known()]
        else:
            members = find_members(self._dirs)
        table, areas = mounts.mounts(), swaps.swap_areas()
        known = self._known()
        for member in members:
            place = Place(member.directory, member.name, member.where,
                          swaps.mounted_on(member.loops, table, areas))
            if member.directory in known:
                known[member.directory].place = place
            else:
                self.devices.append(Watched(place))

    def _known(self) -> dict[Path, Watched]:
        return {device.place.directory: device for device in self.devices}

    def poll(self, patience: float) -> None:
        from zramfs.views import watched

        self.look()
        watched.poll_devices(self.devices, patience)


# ---- a screen ------------------------------------------------------------------------------------
def _live(fleet: _Fleet, interval: float, count: int | None) -> None:
    from rich.console import Console
    from rich.live import Live

    from zramfs.views.screen import View, screen

    # rich believes them more than the terminal, whose size may change meanwhile. readline exports them.
    for name in ("COLUMNS", "LINES"):
        os.environ.pop(name, None)
    console = Console(highlight=False, markup=False, emoji=False)
    view = View()
    # No thread of rich's: bounded.Call forks.
    with Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False,
              redirect_stderr=False) as live, _Keys(live) as keys:
        looks = 0
        while count is None or looks < count:
            began = time.monotonic()
            fleet.poll(min(PATIENCE, interval))
            looks += 1
            while True:
                picture = screen(fleet.devices, view, interval, console.width, console.height)
                live.update(picture, refresh=True)
                key = keys.wait(began + interval - time.monotonic())
                if key is None:
                    break
                # Of somebody who types fast, or holds a key down, several come at once.
                if not all(view.press(each, fleet.devices) for each in _KEY.findall(key)):
                    return


class _Keys:
    """Keys without Enter and without echo. The screen comes back after Ctrl-Z, and is drawn again when the
    size of the terminal changes. If stdin is no terminal there are no keys."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._fd = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
        self._before: list | None = None
        self._to_stop = False

    def __enter__(self) -> _Keys:
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(self._woken, False)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGWINCH, lambda *_: None)
        signal.signal(signal.SIGTSTP, self._note_stop)
        self._cbreak()
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.signal(signal.SIGWINCH, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        os.close(self._wake)
        os.close(self._woken)

    def _cbreak(self) -> None:
        if self._fd is not None:
            self._before = termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd)

    def _restore(self) -> None:
        if self._fd is not None and self._before is not None:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)

    def _note_stop(self, _number: int, _frame: FrameType | None) -> None:
        # Not here: rich may be in the middle of a screen.
        self._to_stop = True

    def _stop(self) -> None:
        self._to_stop = False
        self._live.stop()
        self._restore()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._cbreak()
        self._live.start()

    def wait(self, seconds: float) -> bytes | None:
        """The next keys; empty when the screen should be drawn again; None when the time is over."""
        watched = [self._woken] + ([self._fd] if self._fd is not None else [])
        readable, _, _ = select.select(watched, [], [], max(0.0, seconds))
        if self._woken in readable:
            with contextlib.suppress(BlockingIOError):
                os.read(self._woken, 4096)
            if self._to_stop:
                self._stop()
            return b""
        if not readable:
            return None
        key = os.read(readable[0], 16)
        if not key:  # the terminal is gone
            self._fd = None
        return key


# ---- lines ---------------------------------------------------------------------------------------
def _lines(fleet: _Fleet, interval: float, count: int | None) -> None:
    """A heading, then a line for each device and interval, the first after one interval, as vmstat prints
    them. As vmstat, it ends silently when its reader has gone (| head)."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    fleet.poll(PATIENCE)
    shown = looks = 0
    while count is None or looks < count:
        time.sleep(interval)
        fleet.poll(PATIENCE)
        looks += 1
        for line in _rows(fleet.devices):
            if shown % HEADINGS_EVERY == 0:
                print(_heading(fleet.devices))
            print(line)
            shown += 1
        sys.stdout.flush()


_COLUMNS = (
    ("time", 19), ("read/s", 6), ("write/s", 7), ("rMiB/s", 6), ("wMiB/s", 6), ("r99%", 6), ("w99%", 6),
    ("data", 6), ("memory", 6), ("ratio", 5), ("errors", 6),
)


def _name_width(devices: Sequence[Watched]) -> int:
    return max(len(device.name) for device in devices) if len(devices) > 1 else 0


def _heading(devices: Sequence[Watched]) -> str:
    return _row([word for word, _ in _COLUMNS], "device", _name_width(devices))


def _row(cells: Sequence[str], name: str, name_width: int) -> str:
    line = " ".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True))
    return f"{line} {name}" if name_width else line


def _rows(devices: Sequence[Watched]) -> Iterator[str]:
    from zramfs.views.charts import MIB, amount, size, span
    from zramfs.views.watched import errors, percentile

    now, width = time.strftime("%Y-%m-%dT%H:%M:%S"), _name_width(devices)
    for device in devices:
        rates, last = device.rates, device.last
        if not device.ready or rates is None or last is None:
            words = 'just begun' if device.ready else device.advice or device.state
            yield f"{now} {plain(device.name)}: {plain(words)}"
            continue
        found = errors(device)
        cells = [
            now, amount(rates.requests("read")), amount(rates.requests("write")),
            amount(rates.bytes("read") / MIB), amount(rates.bytes("write") / MIB),
            *(span(percentile(rates.histogram(operation), 0.99)).replace(" ", "")
              for operation in ("read", "write")),
            size(last.scrape.number("orig_data_bytes")), size(last.scrape.number("mem_used_bytes")),
            f"{last.ratio:.2f}" if last.ratio else "-", amount(sum(new for _, new in found.values())),
        ]
        yield _row(cells, plain(device.name), width)
