# SPDX-License-Identifier: Apache-2.0
"""The parts of the screen of `zramfs top` that show one device in full."""
from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from zramfs.model.contents import KINDS, REST
from zramfs.model.policy import format_age
from zramfs.model.stats import FULLNESS_GROUPS, OPERATIONS
from zramfs.text.plain import plain

from .charts import (
    BAD,
    DIM,
    HEAD,
    MIB,
    TRAFFIC,
    Bar,
    Curve,
    Graph,
    Stack,
    amount,
    glyphs,
    ratio_style,
    share_style,
    size,
    span,
    time_style,
)
from .listing import columns, limit_share
from .scrape import Scrape
from .watched import WINDOW, Point, Rates, Watched, errors, percentile

LABELS = 21  # columns beside the bars of the histogram


def summary(device: Watched) -> Text:
    last = device.last
    assert last is not None
    s = last.scrape
    if not s.number("disksize_bytes"):
        return Text("not set up: it has no size yet")
    limit = s.number("mem_limit_bytes")
    used = s.number("mem_used_bytes")
    text = Text(no_wrap=True, overflow="ellipsis")
    for words, style in (
        (plain(s.labels("device_info").get("algorithm", "")), ""),
        (f"size {size(s.number('disksize_bytes'))}", ""),
        (f"data {size(s.number('orig_data_bytes'))}", ""), (f"memory {size(used)}", ""),
        (f"of {size(limit)} ({100 * used / limit:.0f} %)" if limit else "no limit",
         share_style(limit_share(device))),
        (f"ratio {last.ratio:.2f}" if last.ratio else "no ratio yet", ratio_style(last.ratio, used)),
    ):
        text.append("   " if text else "").append(words, style)
    return text


def requests(device: Watched) -> Table:
    last, rates, window = device.last, device.rates, device.window
    assert last is not None
    table = columns(False, *[True] * 7)
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
            *(Text(span(found), time_style(found))
              for found in (percentile(histogram, share) for share in (0.5, 0.99, 0.999))),
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
        table = columns(True, False, True, padding=1)
        room = max(4, options.max_width - LABELS)
        table.columns[1].width = room
        for label, count in rows:
            share = 100 * count / total
            table.add_row(label, Bar(count / most, room, TRAFFIC),
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
    for step, saved, cpu in (("recompress", "recompress", "recompress"), ("share", "share", "share"),
                             ("units", "unit", "unit_making")):
        if won := s.number(f"{saved}_saved_bytes_total"):
            rows.append((step, f"{size(won)} saved in {span(s.number(f'{cpu}_cpu_seconds_total'))} of CPU"))
    for kind, idle in s.by("policy_idle_seconds", "policy").items():
        if idle:
            done = amount(s.number("policy_pages_total", policy=kind))
            rows.append(("policy", f"{plain(kind)} {format_age(int(idle))}: {done} pages"))
    if target := s.number("balloon_target_bytes"):
        rows.append(("balloon", f"{size(s.number('balloon_bytes'))} of {size(target)}"))
    return rows


def compaction(device: Watched, has_curves: bool) -> Table:
    """What compaction does, and where the memory is. has_curves: three lines over time come first."""
    last, rates = device.last, device.rates
    assert last is not None
    s = last.scrape
    table = Table.grid(expand=True)
    table.add_column()
    if has_curves:
        table.add_row(_curves(device))
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
    inner = columns(False, False, padding=1)
    for row in rows:
        inner.add_row(*row)
    table.add_row(inner)
    return table


def _curves(device: Watched) -> Table:
    """I/O, ratio and memory over time, a line each."""
    table = Table.grid(padding=(0, 1, 0, 0), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    table.add_column(no_wrap=True, justify="right")
    points = list(device.points)
    now = points[-1] if points else Point()
    memory_style = share_style(limit_share(device))
    table.add_row(Text("I/O", HEAD), Curve([p.io for p in points], True, TRAFFIC),
                  "-" if now.io is None else io_words(now.io))
    table.add_row(Text("ratio", HEAD), Curve([p.ratio for p in points]),
                  f"{now.ratio:.2f}" if now.ratio else "-")
    table.add_row(Text("memory", HEAD), Curve([p.memory for p in points], True, memory_style),
                  "-" if now.memory is None else size(now.memory))
    return table


def io_words(rate: float) -> str:
    return f"{size(rate)}/s"


def graphs(device: Watched, below: int) -> list[Graph]:
    """I/O, ratio and memory over time, several lines high, with `below` blank lines."""
    points = list(device.points)
    return [
        Graph("I/O", [p.io for p in points], io_words, style=TRAFFIC, below=below),
        Graph("ratio", [p.ratio for p in points], lambda v: f"{v:.2f}", False, below=below),
        Graph("memory", [p.memory for p in points], size, True, share_style(limit_share(device)), below),
    ]


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
        table = columns(True, True, True, True)
        table.add_row(*(Text(word, HEAD) for word in ("class", "objects", "memory", "full")))
        order = sorted(self._pages, key=lambda each: -self._pages[each])
        for each in order[:max(1, (options.height or 40) - 2)]:
            table.add_row(plain(each), amount(self._used[each]), size(4096 * self._pages[each]),
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
        table = columns(False, *[True] * len(FULLNESS_GROUPS), padding=1)
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


# Colour and mark of each kind, and its mark on a plain terminal.
_MARKS = {"hot": ("red", "█", "#"), "huge": ("magenta", "▞", "%"), "recompressed": ("yellow", "▓", "+"),
          "units": ("green", "▒", "="), "shared": ("cyan", "▚", "o"), "same": ("blue", "░", ":"),
          "written_back": ("white", "─", "."), REST: (DIM, "·", "-")}


def is_mixed(device: Watched) -> bool:
    """Whether any page is kept in another way than the first write left it."""
    if device.last is None:
        return False
    pages = device.last.scrape.by("contents_pages", "kind")
    return any(pages.get(kind) for kind in ("recompressed", "units", "shared", "written_back"))


class Contents:
    """What lies where, in three lines: the share of the pages that each kind has, and bars of the data and of
    the memory that they take."""

    def __init__(self, device: Watched) -> None:
        assert device.last is not None
        self._pages = device.last.scrape.by("contents_pages", "kind")
        self._bytes = device.last.scrape.by("contents_bytes", "kind")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        total = sum(self._pages.values())
        legend = Text(no_wrap=True, overflow="ellipsis")
        for kind in KINDS:
            if pages := self._pages.get(kind):
                style, mark, plain_mark = _MARKS[kind]
                share = 100 * pages / total
                legend.append("   " if legend else "")
                legend.append(plain_mark if console.options.ascii_only else mark, style)
                legend.append(f" {kind.replace('_', ' ')} " + (f"{share:.0f} %" if share >= 0.5 else "<1 %"))
        style, mark, plain_mark = _MARKS[REST]
        legend.append("   " + (plain_mark if console.options.ascii_only else mark), style)
        legend.append(" rest of the pool")
        table = Table.grid(padding=(0, 1, 0, 0), expand=True)
        table.add_column(no_wrap=True)
        table.add_column(ratio=1)
        table.add_row(Text("pages", HEAD), legend)
        for name, values, kinds in (("data", self._pages, KINDS), ("memory", self._bytes, _MARKS)):
            table.add_row(Text(name, HEAD), Stack([(values.get(kind, 0), *_MARKS[kind]) for kind in kinds]))
        yield table


def error_line(device: Watched) -> Text:
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
