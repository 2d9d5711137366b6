# SPDX-License-Identifier: Apache-2.0
"""Numbers, bars and curves made of characters, and what their colours mean.

Colour only repeats what a number or a word says too, so that nothing is lost where there is none. A terminal
without block characters gets plain ones.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from zramfs.text.sizes import format_size, format_time

MIB = 1 << 20
BLOCKS, PLAIN = " ▁▂▃▄▅▆▇█", " .:-=+*%#"
HEAD, DIM, GOOD, WARN, BAD = "bold", "dim", "green", "yellow", "bold red"
TRAFFIC = "cyan"  # of what is read and written
# Shares of a limit, and seconds that the slowest of 100 requests took. A request to memory takes 10 us to
# 1 ms, one to a backing store on a disk 10 ms and more.
NEARLY_FULL, FULL = 0.75, 0.9
SLOW, VERY_SLOW = 0.01, 0.1
# Below this ratio memory is hardly won. Of little memory that is no news: the first pages of a file system
# compress badly.
POOR_RATIO, MUCH_MEMORY = 1.2, 16 * MIB


def amount(value: float) -> str:
    """A number of at most five characters: 0, 12.3, 1234, 56.7k, 8.9M."""
    for unit in ("", "k", "M", "G"):
        if abs(value) < 999.5 or (not unit and abs(value) < 9999.5):
            digits = 0 if value == int(value) and not unit or abs(value) >= 99.95 else 1
            return f"{value:.{digits}f}{unit}"
        value /= 1000
    return f"{value:.0f}T"


def size(value: float) -> str:
    return format_size(int(value))


def span(seconds: float | None) -> str:
    return "-" if seconds is None else format_time(seconds)


def time_style(seconds: float | None) -> str:
    """The colour of how long the slowest requests took."""
    return "" if not seconds or seconds < SLOW else WARN if seconds < VERY_SLOW else BAD


def share_style(share: float | None) -> str:
    """The colour of memory that has this share of its limit; None: there is no limit."""
    return "" if share is None else GOOD if share < NEARLY_FULL else WARN if share < FULL else BAD


def ratio_style(ratio: float | None, memory: float) -> str:
    """The colour of a ratio."""
    return WARN if ratio and ratio < POOR_RATIO and memory >= MUCH_MEMORY else ""


def glyphs(console: Console) -> str:
    return PLAIN if console.options.ascii_only else BLOCKS


class Curve:
    """As many of the latest `values` as fit, in one line. The height of each shows where it lies between the
    least and the greatest of them, or between 0 and the greatest. None leaves a gap."""

    def __init__(self, values: Sequence[float | None], from_zero: bool = False, style: str = "") -> None:
        self._values, self._from_zero, self._style = values, from_zero, style

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        marks = glyphs(console)
        shown = list(self._values)[-options.max_width:]
        low, high = limits(shown, self._from_zero)
        top = len(marks) - 1
        yield Text("".join(
            " " if v is None else marks[1 + min(top - 1, int((v - low) / (high - low) * top))] for v in shown
        ), self._style, no_wrap=True)


def limits(values: Sequence[float | None], from_zero: bool) -> tuple[float, float]:
    """What the bottom and the top of a curve stand for: two different numbers."""
    known = [v for v in values if v is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    if from_zero:
        return 0.0, high or 1.0
    # A curve that hardly moves is a line in the middle, not a mountain range.
    room = max(high - low, 0.02 * high, 1e-9)
    low -= (room - (high - low)) / 2
    return low, low + room


class Graph:
    """As many of the latest `values` as fit, over all lines that there are but the first, which has `name`,
    the present value, and what the bottom and the top stand for. The newest is at the right. below: lines to
    be left blank."""

    def __init__(
        self, name: str, values: Sequence[float | None], words: Callable[[float], str],
        from_zero: bool = True, style: str = "", below: int = 0,
    ) -> None:
        self._name, self._values, self._words = name, values, words
        self._from_zero, self._style, self._below = from_zero, style, below

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, lines = max(8, options.max_width - 2), max(1, (options.height or 6) - 1 - self._below)
        shown = list(self._values)[-width:]
        low, high = limits(shown, self._from_zero)
        now = shown[-1] if shown else None
        head = Text.assemble((self._name, HEAD), " " + ("-" if now is None else self._words(now)))
        bottom = "0" if self._from_zero else self._words(low)
        scale = Text(f"{bottom} to {self._words(high)}" if any(shown) else "", DIM)
        gap = width - head.cell_len - scale.cell_len
        yield Text.assemble(head, " " * gap, scale) if gap > 0 else head
        marks = glyphs(console)
        top = len(marks) - 1
        style = Style.parse(self._style)
        # What is known is seen, if only as the lowest mark.
        levels = [0 if v is None else max(1, round((v - low) / (high - low) * top * lines)) for v in shown]
        for line in range(lines - 1, -1, -1):
            cells = (marks[min(top, max(0, level - line * top))] for level in levels)
            yield Segment("".join(cells).rjust(width), style)
            yield Segment.line()


class Stack:
    """Shares of a whole, as pieces of one line: (value, style, mark, mark of a plain terminal)."""

    def __init__(self, parts: Sequence[tuple[float, str, str, str]]) -> None:
        self._parts = parts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        total, below, at = sum(value for value, *_ in self._parts), 0.0, 0
        line = Text(no_wrap=True)
        for value, style, mark, plain in self._parts:
            below += value
            end = round(options.max_width * below / total) if total else 0
            line.append((plain if console.options.ascii_only else mark) * (end - at), style)
            at = end
        yield line


class Bar:
    """A share, 0 to 1, of `width` columns. Less than half a column is shown as a thin mark."""

    def __init__(self, share: float, width: int, style: str = "") -> None:
        self._share, self._width, self._style = share, width, style

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        full, thin = "#|" if console.options.ascii_only else "█▏"
        long = round(self._share * self._width)
        yield Text(full * long or thin * (self._share > 0), self._style, no_wrap=True)
