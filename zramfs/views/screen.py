# SPDX-License-Identifier: Apache-2.0
"""The screen of `zramfs top`: what watched devices look like on 80 x 24 characters or more.

Colour only repeats what a word says too. A terminal without block characters gets plain ones.
"""
from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.layout import Layout
from rich.table import Table
from rich.text import Text

from zramfs.model.policy import format_age
from zramfs.model.stats import FULLNESS_GROUPS, OPERATIONS
from zramfs.text.sizes import format_size, format_time

from .scrape import Scrape
from .watched import WINDOW, Rates, Watched, errors, percentile

MIB = 1 << 20
BLOCKS, PLAIN = " ▁▂▃▄▅▆▇█", " .:-=+*%#"
HEAD, DIM, GOOD, BAD = "bold", "dim", "green", "bold red"
REQUEST_LINES = 5  # a heading and four kinds of requests
FULLNESS_LINES = 3  # a heading and two rows
LIST_LINES = 5  # devices in the list, where the screen has room for no more
# Lines of the part in the middle. Fewer cut the compaction panel off, which begins in its third line
# and has its first four rows there; with more than the second, further devices are worth more.
MIDDLE_LEAST, MIDDLE_ENOUGH = 7, 16
NAME = 20  # characters of a device's name in it
LEFT = 39  # columns of the histogram
WIDE, RIGHT = 110, 32  # a screen of WIDE columns has room for the size classes, in RIGHT columns


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


class Curve:
    """As many of the latest `values` as fit. The height of each shows where it lies between the least and
    the greatest of them."""

    def __init__(self, values: Sequence[float]) -> None:
        self._values = values

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        marks = glyphs(console)
        shown = list(self._values)[-options.max_width:]
        low, high = (min(shown), max(shown)) if shown else (0.0, 0.0)
        # A curve that hardly moves is a line in the middle, not a mountain range.
        room = max(high - low, 0.02 * high, 1e-9)
        low -= (room - (high - low)) / 2
        top = len(marks) - 1
        yield Text("".join(marks[1 + min(top - 1, int((v - low) / room * top))] for v in shown), no_wrap=True)


def glyphs(console: Console) -> str:
    return PLAIN if console.options.ascii_only else BLOCKS


class Bar:
    """A share, 0 to 1, of `width` columns. Less than half a column is shown as a thin mark."""

    def __init__(self, share: float, width: int) -> None:
        self._share, self._width = share, width

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        full, thin = "#|" if console.options.ascii_only else "█▏"
        long = round(self._share * self._width)
        yield Text(full * long or thin * (self._share > 0), no_wrap=True)


@dataclass(frozen=True)
class Plan:
    """How the lines of a screen are shared out. listed: devices in the list, 0 without a list. gap: blank
    lines below each part, 0 or 1. has_fullness: whether the table of zspages is there."""

    listed: int
    gap: int
    has_fullness: bool


def plan(devices: int, height: int) -> Plan:
    """For this number of devices on a screen of `height` lines. The middle, with latencies and compaction,
    keeps MIDDLE_LEAST lines as long as possible: the blank lines are given up first, then the table of
    zspages."""
    listed = min(devices, LIST_LINES) if devices > 1 else 0

    def middle(gap: int, has_fullness: bool) -> int:
        heading = 1 + gap if listed else 0
        fixed = 1 + (1 + gap) + (REQUEST_LINES + gap) + 2  # title, summary, requests; errors and keys
        return height - listed - heading - fixed - has_fullness * (FULLNESS_LINES + gap)

    choices = [(1, True), (0, True), (1, False), (0, False)]
    gap, has_fullness = next((each for each in choices if middle(*each) >= MIDDLE_LEAST), (0, False))
    if listed:
        listed = min(devices, listed + max(0, middle(gap, has_fullness) - MIDDLE_ENOUGH))
    return Plan(listed, gap, has_fullness)


def screen(devices: Sequence[Watched], chosen: int, interval: float, width: int, height: int) -> Layout:
    """What to show of all devices on a screen of width x height characters. The device with the number
    `chosen` is shown in full."""
    root = Layout()
    shares = plan(len(devices), height)
    parts = []
    if shares.listed:
        parts.append(Layout(_list(devices, chosen, shares.listed), size=shares.listed + 1 + shares.gap))
    if devices:
        parts += _device(devices[chosen], shares, width >= WIDE)
    else:
        parts.append(Layout(Text("No zramfs device of yours is there; this goes on looking for one.")))
    keys = "q quits" + ("   up, down: another device" if len(devices) > 1 else "")
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


def _columns(*right: bool, padding: int = 2) -> Table:
    table = Table.grid(padding=(0, padding, 0, 0))
    for each in right:
        table.add_column(justify="right" if each else "left", no_wrap=True)
    return table


def _state(device: Watched) -> Text:
    return Text(device.state, GOOD if device.ready else BAD)


def _list(devices: Sequence[Watched], chosen: int, room: int) -> Table:
    """A heading and `room` of the devices, with the chosen one among them."""
    first = max(0, min(chosen - room // 2, len(devices) - room))
    table = _columns(False, False, True, True, True, True, True, False)
    table.add_row(*(Text(word, HEAD) for word in (
        "", "device", "read/s", "write/s", "data", "memory", "ratio", "state")))
    for number, device in enumerate(devices[first:first + room], first):
        # Of a device that does not answer there is no rate, only what it held.
        rates, last = device.rates if device.ready else None, device.last
        cells = ["-"] * 5
        if last is not None:
            cells = [
                amount(rates.requests("read")) if rates else "-",
                amount(rates.requests("write")) if rates else "-",
                size(last.scrape.number("orig_data_bytes")), size(last.scrape.number("mem_used_bytes")),
                f"{last.ratio:.2f}" if last.ratio else "-",
            ]
        # Names made of a directory differ at their ends.
        name = device.name if len(device.name) <= NAME else f"~{device.name[1 - NAME:]}"
        table.add_row(">" if number == chosen else " ", Text(name), *cells, _state(device))
    return table


def _device(device: Watched, shares: Plan, wide: bool) -> list[Layout]:
    title = _line(Text.assemble((device.name, HEAD), f" on {device.directory}"), _state(device))
    # rich draws a box of its own in place of an empty text, so none of these is empty.
    if device.last is None:
        return [Layout(title, size=2), Layout(Text(device.advice or "No figures have come from it yet."))]
    below = Layout()
    below.split_row(Layout(Latencies(device), size=LEFT), Layout(_memory(device)))
    if wide:
        below.add_split(Layout(Classes(device), size=RIGHT))
    # With a long path the advice takes two lines.
    summary = Layout(_summary(device), size=1 + shares.gap)
    if device.advice is not None:
        summary = Layout(Text(device.advice, BAD), size=2)
    parts = [
        Layout(title, size=1), summary,
        Layout(_requests(device), size=REQUEST_LINES + shares.gap), Layout(below),
    ]
    if shares.has_fullness:
        parts.append(Layout(Fullness(device), size=FULLNESS_LINES + shares.gap))
    return [*parts, Layout(_errors(device), size=1)]


def _summary(device: Watched) -> Text:
    last = device.last
    assert last is not None
    s = last.scrape
    if not s.number("disksize_bytes"):
        return Text("not set up: it has no size yet")
    limit = s.number("mem_limit_bytes")
    used = s.number("mem_used_bytes")
    parts = [
        s.labels("device_info").get("algorithm", ""), f"size {size(s.number('disksize_bytes'))}",
        f"data {size(s.number('orig_data_bytes'))}", f"memory {size(used)}",
        f"of {size(limit)} ({100 * used / limit:.0f} %)" if limit else "no limit",
        f"ratio {last.ratio:.2f}" if last.ratio else "no ratio yet",
    ]
    return Text("   ".join(parts), no_wrap=True, overflow="ellipsis")


def _requests(device: Watched) -> Table:
    last, rates, window = device.last, device.rates, device.window
    assert last is not None
    table = _columns(False, *[True] * 7)
    table.add_row(*(Text(word, HEAD) for word in (
        "requests", "/s", "MiB/s", "mean", "50 %", "99 %", "99.9 %", "in all")))
    for operation in OPERATIONS:
        total = last.scrape.number("request_duration_seconds_count", operation=operation)
        histogram = window.histogram(operation) if window else {}
        table.add_row(
            operation,
            amount(rates.requests(operation)) if rates else "-",
            amount(rates.bytes(operation) / MIB) if rates else "-",
            span(window.mean(operation)) if window else "-",
            *(span(percentile(histogram, share)) for share in (0.5, 0.99, 0.999)),
            amount(total),
        )
    return table


class Latencies:
    """How long requests took, one line for each bucket. Where they do not all fit, the lines with the most
    requests are shown, and the first and the last of them include what lies beyond."""

    def __init__(self, device: Watched) -> None:
        self._window = device.window

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        seconds = self._window.seconds if self._window else 0
        yield Text(f"time they took, last {min(seconds, WINDOW):.0f} s", HEAD)
        rows = fitted(self._window.histogram() if self._window else {}, (options.height or 40) - 2)
        if not rows:
            yield Text("no request", DIM)
            return
        total, most = sum(count for _, count in rows), max(count for _, count in rows)
        table = _columns(True, False, True, padding=1)
        table.columns[1].width = LEFT - 21
        for label, count in rows:
            share = 100 * count / total
            table.add_row(label, Bar(count / most, LEFT - 21),
                          f"{share:.1f} %" if share >= 0.05 or not count else "<0.1 %")
        yield table


def fitted(histogram: Mapping[float, float], room: int) -> list[tuple[str, float]]:
    """(label, requests) of at most `room` buckets, from the first to the last in use. Where only one fits,
    it stands for all."""
    bounds = sorted(histogram)
    used = [i for i, bound in enumerate(bounds) if histogram[bound]]
    if not used:
        return []
    shown = bounds[used[0]:used[-1] + 1]
    room = max(1, room)
    if len(shown) > room:
        weights = [sum(histogram[bound] for bound in shown[i:i + room]) for i in range(len(shown) - room + 1)]
        first = weights.index(max(weights))
        below, above = shown[:first], shown[first + room:]
        shown = shown[first:first + room]
    else:
        below = above = []
    if room == 1 and (below or above):
        last = bounds[used[-1]]
        return [(f"<= {span(last)}" if last != float("inf") else "any time", sum(histogram.values()))]
    rows = [(f"<= {span(bound)}" if bound != float("inf") else f"> {span(bounds[-2])}", histogram[bound])
            for bound in shown]
    label, count = rows[0]
    rows[0] = (label, count + sum(histogram[bound] for bound in below))
    if above:
        lower = f"> {span(bounds[bounds.index(shown[-1]) - 1])}"
        rows[-1] = (lower, rows[-1][1] + sum(histogram[bound] for bound in above))
    return rows


def _rows_of_options(s: Scrape) -> list[tuple[str, str]]:
    """For what not every device has."""
    rows = []
    if target := s.number("reserve_bytes", state="target"):
        rows.append(("reserve", f"{size(s.number('reserve_bytes', state='ready'))} of {size(target)}, "
                                f"{amount(s.number('reserve_misses_total'))} misses"))
    if pages := s.number("written_back_pages"):
        rows.append(("on disk", f"{amount(pages)} pages written back"))
    if won := s.number("recompress_pages_total", result="won"):
        rows.append(("smaller", f"{amount(won)} pages by recompression, "
                                f"{size(s.number('recompress_saved_bytes_total'))} saved"))
    for kind, idle in s.by("policy_idle_seconds", "policy").items():
        if idle:
            done = amount(s.number("policy_pages_total", policy=kind))
            rows.append(("policy", f"{kind} {format_age(int(idle))}: {done} pages"))
    if target := s.number("balloon_target_bytes"):
        rows.append(("balloon", f"{size(s.number('balloon_bytes'))} of {size(target)}"))
    return rows


def _memory(device: Watched) -> Table:
    """Ratio over time, compaction, and where the memory is."""
    last, rates = device.last, device.rates
    assert last is not None
    s = last.scrape
    table = Table.grid(expand=True)
    table.add_column()
    now = f"{device.ratios[-1]:.2f}" if device.ratios and device.ratios[-1] else "-"
    known = [ratio for ratio in device.ratios if ratio]
    spread = f", {min(known):.2f} to {max(known):.2f}" if known else ""
    table.add_row(Text.assemble(("ratio over time", HEAD), f"  now {now}{spread}"))
    table.add_row(Curve(device.ratios))
    table.add_row(Text("compaction", HEAD))
    if not s.number("disksize_bytes"):
        table.add_row(Text("no pool yet", DIM))
        return table
    rows = [
        ("moved", f"{_rate(rates, 'migration_pages_migrated_total')} pages/s, "
                  f"{amount(s.number('migration_pages_migrated_total'))} in all"),
        ("emptied", f"{amount(s.number('migration_pageblocks_freed_total'))} pageblocks, "
                    f"{amount(s.number('pages_compacted_total'))} pages"),
        ("returned", f"{size(s.number('returned_bytes_total'))} to the system"),
        ("winnable", f"{100 * s.number('compaction_winnable_ratio'):.1f} % of "
                     f"{s.number('pageblocks_in_use'):.0f} pageblocks"),
    ]
    rows += _rows_of_options(s)
    # Last what may be cut off on a small screen.
    rows += [
        ("resident", f"{size(s.number('resident_bytes'))}, "
                     f"{size(4096 * s.number('frames', state='free'))} of it free"),
        ("took", f"{100 * rates.rate('compactor_time_seconds_total'):.1f} % of the time" if rates else "-"),
    ]
    inner = _columns(False, False, padding=1)
    for row in rows:
        inner.add_row(*row)
    table.add_row(inner)
    return table


def _rate(rates: Rates | None, name: str) -> str:
    return amount(rates.rate(name)) if rates else "-"


class Classes:
    """As many size classes as fit, those that take the most memory first."""

    def __init__(self, device: Watched) -> None:
        assert device.last is not None
        s = device.last.scrape
        self._pages = s.by("class_pages_used", "size")
        self._used = s.by("class_obj_used", "size")
        self._places = s.by("class_obj_allocated", "size")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = _columns(True, True, True, True)
        table.add_row(*(Text(word, HEAD) for word in ("class", "objects", "memory", "full")))
        order = sorted(self._pages, key=lambda each: -self._pages[each])
        for each in order[:max(1, (options.height or 40) - 2)]:
            table.add_row(each, amount(self._used[each]), size(4096 * self._pages[each]),
                          f"{100 * self._used[each] / self._places[each]:.0f} %")
        yield table


class Fullness:
    """The zspages by how full they are: their number, and a mark as high as their share of the memory."""

    def __init__(self, device: Watched) -> None:
        assert device.last is not None
        s = device.last.scrape
        self._zspages = s.by("class_zspages", "fullness")
        self._pages = _pages(s)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        marks = glyphs(console)
        most = max([*self._pages.values(), 1.0])
        table = _columns(False, *[True] * len(FULLNESS_GROUPS), padding=1)
        table.add_row(Text("full up to", HEAD), *(Text(f"{group:>5}", HEAD) for group in FULLNESS_GROUPS))
        table.add_row("zspages", *(amount(self._zspages.get(group, 0)) for group in FULLNESS_GROUPS))
        levels = [self._pages.get(group, 0) / most for group in FULLNESS_GROUPS]
        top = len(marks) - 1
        bars = (marks[min(top, -int(-level * top // 1))] * 5 for level in levels)
        table.add_row("memory", *bars)
        yield table


def _pages(s: Scrape) -> dict[str, float]:
    """Pages of the pool by the fullness of their zspages."""
    found: dict[str, float] = {}
    for class_size, pages in s.by("class_pages_per_zspage", "size").items():
        for group, zspages in s.by("class_zspages", "fullness", size=class_size).items():
            found[group] = found.get(group, 0) + pages * zspages
    return found


def _errors(device: Watched) -> Text:
    last = device.last
    assert last is not None
    longest = f"   longest request {span(last.scrape.number('longest_request_seconds'))}"
    flying = f"   {last.scrape.number('requests_in_flight'):.0f} under way"
    found = errors(device)
    if not found:
        return Text.assemble(("errors", HEAD), " none", longest, flying)
    words = ", ".join(f"{amount(total)} {name}" + (f" (+{amount(new)})" if new else "")
                      for name, (total, new) in found.items())
    return Text.assemble(("errors ", BAD), (words, BAD), longest, flying)
