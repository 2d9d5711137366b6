# SPDX-License-Identifier: Apache-2.0
"""The screen of `zramfs top`: what watched devices look like on 80 x 24 characters or more, and what the
keys do to that."""
from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import RenderableType
from rich.layout import Layout
from rich.table import Table
from rich.text import Text

from zramfs.text.plain import plain

from . import panels
from .charts import BAD, DIM, GOOD, HEAD, WARN
from .listing import (
    BY_NAME,
    LEAST_NAME,
    SORT_KEYS,
    WIDE,
    columns,
    list_devices,
    ordered,
    shortened,
    state_text,
)
from .watched import Watched

REQUEST_LINES = 4  # a heading and three kinds of requests
FULLNESS_LINES = 3  # a heading and two rows
CONTENTS_LINES = 3  # the kinds of pages, and two bars
LIST_LINES = 5  # devices in the list, where the screen has room for no more
# Lines of the part in the middle. Fewer cut the compaction panel off, which begins below three curves and has
# its first four rows there. With more than the second, graphs and further devices are worth more.
MIDDLE_LEAST, MIDDLE_ENOUGH = 8, 16
MIDDLE_AT_ALL = 3  # fewer show nothing of it
GRAPH_LEAST, GRAPH_MOST = 6, 18  # lines of the graphs, with their heading
LEFT = 39  # columns of the histogram, on a screen that is not wide
RIGHT = 32  # columns of the size classes, which a wide screen has room for
UP, DOWN = (b"\x1b[A", b"\x1bOA", b"k"), (b"\x1b[B", b"\x1bOB", b"j", b"\t")
QUIT = (b"q", b"Q", b"\x04")


class View:
    """What its user has chosen: a device to be shown in full, the order of the list, graphs in the middle,
    the page of help."""

    def __init__(self) -> None:
        self.chosen: Watched | None = None
        self.order = BY_NAME
        self.reverse = False
        self.has_graphs = False
        self.has_help = False

    def arranged(self, devices: Sequence[Watched]) -> tuple[list[Watched], int]:
        """The devices in order, and the number of the chosen one among them."""
        found = ordered(devices, self.order, self.reverse)
        number = next((i for i, device in enumerate(found) if device is self.chosen), 0)
        return found, number

    def press(self, key: bytes, devices: Sequence[Watched]) -> bool:
        """Does what `key` is for; an empty one is none. False: the screen is over."""
        if key in QUIT:
            return False
        if not key:
            return True
        if self.has_help or key == b"?":
            # Any key leads back from there.
            self.has_help = not self.has_help and key == b"?"
        elif key == b"g":
            self.has_graphs = not self.has_graphs
        elif (order := key.decode("latin-1")) in SORT_KEYS or order == BY_NAME:
            self.reverse = order == self.order and not self.reverse
            self.order = order
        elif devices and key in (*UP, *DOWN):
            found, number = self.arranged(devices)
            self.chosen = found[(number + (1 if key in DOWN else -1)) % len(found)]
        return True


@dataclass(frozen=True)
class Plan:
    """How the lines of a screen are shared out. listed: devices in the list, 0 without a list. gap: blank
    lines below each part, 0 or 1. has_fullness: whether the table of zspages is there. graphs: lines of the
    graphs, 0 where three curves of a line each stand for them. has_contents: whether it is shown what lies
    where."""

    listed: int
    gap: int
    has_fullness: bool
    graphs: int
    has_contents: bool = False


def plan(devices: int, height: int, has_contents: bool = False) -> Plan:
    """For this number of devices on a screen of `height` lines. The middle, with latencies and compaction,
    keeps MIDDLE_LEAST lines as long as possible: the blank lines are given up first, then the table of
    zspages, then what lies where. What is left over goes to graphs, further devices, the middle and higher
    graphs."""
    listed = min(devices, LIST_LINES) if devices > 1 else 0

    def middle(gap: int, has_fullness: bool, has_contents: bool) -> int:
        heading = 1 + gap if listed else 0
        fixed = 1 + (1 + gap) + (REQUEST_LINES + gap) + 2  # title, summary, requests; errors and keys
        return (height - listed - heading - fixed - has_fullness * (FULLNESS_LINES + gap)
                - has_contents * (CONTENTS_LINES + gap))

    if listed:
        # On a low screen the chosen device goes before the others.
        listed = max(1, listed - max(0, MIDDLE_AT_ALL - middle(0, False, False)))
    choices = [(gap, has_fullness, shown) for shown in ((True, False) if has_contents else (False,))
               for gap, has_fullness in ((1, True), (0, True), (1, False), (0, False))]
    gap, has_fullness, has_contents = next(
        (each for each in choices if middle(*each) >= MIDDLE_LEAST), (0, False, False))
    spare = max(0, middle(gap, has_fullness, has_contents) - MIDDLE_LEAST)
    graphs = GRAPH_LEAST if spare >= GRAPH_LEAST + gap else 0
    spare -= graphs + gap if graphs else 0
    if listed:
        more = min(devices - listed, spare, max(1, height // 3 - listed))
        listed, spare = listed + more, spare - more
    spare -= min(spare, MIDDLE_ENOUGH - MIDDLE_LEAST)
    graphs = min(GRAPH_MOST, graphs + spare) if graphs else 0
    return Plan(listed, gap, has_fullness, graphs, has_contents)


def screen(devices: Sequence[Watched], view: View, interval: float, width: int, height: int) -> Layout:
    """What to show of all devices on a screen of width x height characters."""
    root = Layout()
    found, number = view.arranged(devices)
    shares = plan(len(devices), height, bool(found) and panels.is_mixed(found[number]))
    parts = []
    if view.has_help:
        parts.append(Layout(_help()))
    elif not devices:
        parts.append(Layout(Text("No zramfs device of yours is there; this goes on looking for one.")))
    else:
        if shares.listed:
            listed = list_devices(found, number, shares.listed, width, view.order, view.reverse)
            parts.append(Layout(listed, size=shares.listed + 1 + shares.gap))
        parts += _device(found[number], shares, width, view.has_graphs)
    keys = "q quits   ? help"
    if len(devices) > 1 and not view.has_help:
        keys += "   up, down: another device"
    parts.append(Layout(_line(Text(f"every {interval:g} s   {keys}", DIM),
                              Text(time.strftime("%H:%M:%S"), DIM)), size=1))
    root.split_column(*parts)
    return root


def _line(left: Text, right: Text) -> Table:
    """One line with text at both ends."""
    line = Table.grid(expand=True)
    line.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    line.add_column(justify="right", no_wrap=True)
    line.add_row(left, right)
    return line


def _title(device: Watched, width: int) -> Table:
    place = device.place
    words = f" on {place.where}"
    if place.mounted == "[SWAP]":
        words += "   in use as swap"
    elif place.mounted and place.mounted != place.where:
        words += f"   mounted on {place.mounted}"
    if width >= WIDE and place.where != str(place.directory):
        words += f"   its files in {place.directory}"
    state = state_text(device)
    # The name is made of the directory, so that is what stays whole where there is not room for both.
    words = plain(words)
    name = shortened(device.name, max(LEAST_NAME, width - len(words) - len(state) - 1))
    return _line(Text.assemble((name, HEAD), words), Text.assemble(" ", state))


def _device(device: Watched, shares: Plan, width: int, has_graphs: bool) -> list[Layout]:
    title = _title(device, width)
    # rich draws a box of its own in place of an empty text, so none of these is empty.
    if device.last is None:
        words = device.advice or "No figures have come from it yet."
        return [Layout(title, size=2), Layout(Text(plain(words)))]
    # With a long path the advice takes two lines.
    summary = Layout(panels.summary(device), size=1 + shares.gap)
    if device.advice is not None:
        summary = Layout(Text(plain(device.advice), BAD), size=2)
    parts = [
        Layout(title, size=1), summary, Layout(panels.requests(device), size=REQUEST_LINES + shares.gap),
    ]
    if has_graphs:
        parts.append(_below(panels.graphs(device, 0)))
    else:
        if shares.graphs:
            graphs = _beside(panels.graphs(device, shares.gap))
            graphs.size = shares.graphs + shares.gap
            parts.append(graphs)
        parts.append(_middle(device, shares, width))
    if shares.has_contents:
        parts.append(Layout(panels.Contents(device), size=CONTENTS_LINES + shares.gap))
    if shares.has_fullness:
        parts.append(Layout(panels.Fullness(device), size=FULLNESS_LINES + shares.gap))
    return [*parts, Layout(panels.error_line(device), size=1)]


def _middle(device: Watched, shares: Plan, width: int) -> Layout:
    """How long requests took, compaction, and on a wide screen the size classes."""
    middle = Layout()
    is_wide = width >= WIDE
    middle.split_row(
        Layout(panels.Latencies(device), size=width // 3 if is_wide else LEFT),
        Layout(panels.compaction(device, not shares.graphs)))
    if is_wide:
        middle.add_split(Layout(panels.Classes(device), size=RIGHT))
    return middle


def _beside(parts: Sequence[RenderableType]) -> Layout:
    row = Layout()
    row.split_row(*(Layout(part) for part in parts))
    return row


def _below(parts: Sequence[RenderableType]) -> Layout:
    column = Layout()
    column.split_column(*(Layout(part) for part in parts))
    return column


def _help() -> Table:
    """What the keys do, and what the colours mean, in 22 lines."""
    table = columns(False, False, padding=3)
    table.add_row(Text("keys", HEAD))
    for keys, words in (
        ("q, Ctrl-C", "ends it"),
        ("up, down", "the device before or after (also k, j), which is shown in full"),
        (BY_NAME, "sorts the list by name"),
        *((column.key or "", f"sorts it by {_SORTED_BY[column.name]}") for column in SORT_KEYS.values()),
        ("", "the same key again turns the order round"),
        ("g", "graphs as wide as the screen, a column for each look, or the figures"),
        ("?", "this page; any key leads back"),
    ):
        table.add_row(keys, words)
    table.add_row("")
    table.add_row(Text("colours", HEAD))
    table.add_row(Text("green", GOOD), "it answers; memory is below 75 % of its limit")
    table.add_row(Text("yellow", WARN),
                  "75 % of its limit; 10 ms for a request; ratio below 1.2; ended")
    table.add_row(Text("red", BAD), "90 % of its limit; 100 ms; errors; it is dead, or does not answer")
    return table


_SORTED_BY = {
    "read/s": "reads a second", "write/s": "writes a second",
    "99 %": "how long the slowest of 100 requests took",
    "data": "data", "memory": "memory of the pool", "limit": "the share of its limit that is used",
    "ratio": "data / memory",
}
