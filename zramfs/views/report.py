# SPDX-License-Identifier: Apache-2.0
"""A report on a device's pool: one HTML page with its picture and its figures, or the picture alone."""
from __future__ import annotations

import base64
import errno
import html
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from zramfs import __version__
from zramfs.errors import ZramfsError
from zramfs.host import programs
from zramfs.host.package_managers import advise_install
from zramfs.model.contents import KINDS, REST, STEPS
from zramfs.text.sizes import format_size

from .sample import FRAME, PAGEBLOCK, PAGEBLOCK_FRAMES, Sample, moment

FORMATS = (".png", ".html")
# Readers of a page; 700 px is a tablet held upright.
_NARROW, _DARK = "(max-width: 700px)", "(prefers-color-scheme: dark)"
# A reader whose system is dark gets dark colours, and one with a narrow screen the parts below each other.
# Tables that are wide move inside their own frame, so that the page itself never does.
_STYLE = """
:root { color-scheme: light dark;
        --ground: #fff; --text: #1a1a1a; --quiet: #555; --line: #ddd; --card: #f4f5f7 }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171c; --text: #e4e6ea; --quiet: #a4abb6; --line: #343a44; --card: #1e232b } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--ground);
       max-width: 1100px; margin: 1.5rem auto; padding: 0 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.35rem; margin: 0 0 .25rem }
h2 { font-size: 1.1rem; margin: 2rem 0 .25rem }
p { margin: .25rem 0 .75rem; max-width: 46rem }
p.quiet, small, footer { color: var(--quiet); font-size: .85rem }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1rem 0 }
dl div { background: var(--card); border-radius: .5rem; padding: .5rem .75rem }
dt { color: var(--quiet); font-size: .85rem }
dd { margin: 0; font-size: 1.3rem; font-weight: 600 }
img { display: block; width: 100%; height: auto; margin: 1rem 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th, td { overflow-wrap: normal }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 6rem }
@media (max-width: 700px) { th, td { white-space: normal; padding: .25rem .3rem } }
summary { cursor: pointer; padding: .4rem 0 }
footer { margin: 2rem 0 }
"""
_PICTURE_WORDS = (
    "Memory is taken from the system in pageblocks of 2 MiB, and given back when one is empty. Compaction "
    "moves what is left in sparse ones together. The picture shows how full each pageblock is, how large the "
    "free pieces between the data are, and of which sizes the compressed pages are."
)
Rows = Sequence[Sequence[str]]


def expect_able() -> None:
    """Raises ZramfsError if there is nothing to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ZramfsError(
            errno.ENOENT,
            "a report is drawn by matplotlib, which is not installed here: pip install 'zramfs[report]', "
            f"or {advise_install(programs.find, 'python3-matplotlib')}",
        )


def write_report(
    after: Sample, before: Sample | None, output: Path, titles: tuple[str, str] = ("before", "after")
) -> None:
    """Draws one sample, or two beside each other under their titles, into a .png or .html file."""
    from . import picture  # matplotlib takes half a second to load

    if output.suffix.lower() == ".png":
        output.write_bytes(picture.draw_pool(after, before, titles))
        return
    drawn = [
        Drawn(media, picture.draw_pool(after, before, titles, picture.Form(ink, narrow, has_header=False)))
        for media, ink, narrow in (
            (f"{_NARROW} and {_DARK}", picture.DARK, True), (_NARROW, picture.LIGHT, True),
            (_DARK, picture.DARK, False), ("", picture.LIGHT, False))
    ]
    output.write_text(page(after, before, drawn, titles), encoding="utf-8", errors="replace")


@dataclass(frozen=True)
class Drawn:
    """A PNG for readers of whom the media query is true; empty: for all others."""

    media: str
    png: bytes

    @property
    def source(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


def page(
    after: Sample, before: Sample | None, drawn: Sequence[Drawn],
    titles: tuple[str, str] = ("before", "after"),
) -> str:
    """The HTML page, with its pictures in it: no other file is needed to show it. drawn: the first that fits
    is shown, and the last is for all others."""
    samples = [after] if before is None else [before, after]
    names = [""] if before is None else list(titles)
    title = html.escape(f"{after.name} on {after.directory}")
    sources = "".join(
        f'<source media="{html.escape(each.media)}" srcset="{each.source}">\n' for each in drawn[:-1])
    body = "\n".join(_section(*each) for each in _tables(samples, names))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>zramfs report: {title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{title}</h1>\n{_lead(after, before, titles)}\n{_cards(after)}\n"
        f"<p>{_PICTURE_WORDS}</p>\n"
        f"<picture>\n{sources}"
        f'<img alt="Pageblocks, free memory by order and size classes of {title}; the tables below have the '
        f'figures." src="{drawn[-1].source}">\n</picture>\n{body}\n'
        f"<footer>zramfs {__version__}</footer>\n</body>\n</html>\n"
    )


def _lead(after: Sample, before: Sample | None, titles: tuple[str, str]) -> str:
    """What there is, in a sentence or two, and when it was."""
    s = after.mm_stat
    if after.ratio:
        text = (f"{format_size(s['orig_data_size'])} of data is kept in {format_size(s['mem_used_total'])} "
                f"of memory: each byte of memory holds {after.ratio:.2f} bytes of data.")
    else:
        text = "There is no data on it that takes memory."
    if s["mem_limit"]:
        text += (f" That is {100 * s['mem_used_total'] / s['mem_limit']:.0f} % of the limit of "
                 f"{format_size(s['mem_limit'])}.")
    if before is not None:
        change = after.resident - before.resident
        what = "less" if change < 0 else "more"
        text += (f" Its pageblocks take {format_size(abs(change))} {what} than “{titles[0]}”."
                 if change else f" Its pageblocks take as much as “{titles[0]}”.")
    when = "" if before is None else f"{moment(before)} and "
    what = f"{when}{moment(after)}, {after.algorithm}, size {format_size(after.disksize)}"
    return f'<p>{html.escape(text)}</p>\n<p class="quiet">{html.escape(what)}</p>'


def _cards(after: Sample) -> str:
    s, share = after.mm_stat, after.whole_share
    cards = {
        "data": format_size(s["orig_data_size"]),
        "memory for it": format_size(s["mem_used_total"]),
        "ratio": f"{after.ratio:.2f}" if after.ratio else "–",
        "taken from the system": format_size(after.resident),
        "of it free": format_size(max(0, after.free - after.returned * PAGEBLOCK)),
        "free memory in whole pageblocks": "–" if share is None else f"{100 * share:.0f} %",
    }
    shown = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in cards.items())
    return f"<dl>{shown}</dl>"


def _section(heading: str, words: str, rows: Rows, is_long: bool) -> str:
    """A table with a sentence on it. is_long: it opens when it is asked for."""
    table = f'<div class="wide">{_table(rows)}</div>'
    if is_long:
        table = f"<details><summary>{len(rows) - 1} rows</summary>{table}</details>"
    return f"<h2>{html.escape(heading)}</h2>\n<p class=\"quiet\">{html.escape(words)}</p>\n{table}"


def _table(rows: Rows) -> str:
    head, *body = rows
    lines = ["<thead><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr></thead>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    return "\n".join(["<table>", *lines, "</table>"])


def _tables(samples: Sequence[Sample], names: Sequence[str]) -> Iterator[tuple[str, str, Rows, bool]]:
    """Heading, a sentence, rows, and whether they are many."""
    yield ("The device", "Names in brackets are those of zram's mm_stat.",
           _beside(samples, names, _summary), False)
    if any(one.kinds for one in samples):
        yield ("What lies where", "Pages by how they are kept, and the memory that they take.",
               _beside(samples, names, _contents), False)
        yield ("What each step has won and cost", "Since the device was set up, by commands and policies.",
               _beside(samples, names, _steps), False)
    yield ("Pageblocks by the share that is in use", "Many sparse ones are work for compaction.",
           _beside(samples, names, pageblocks_by_share), False)
    yield ("Free memory by size",
           "How many free pieces of each size there are. Those of 2M are whole pageblocks, without memory.",
           _beside(samples, names, _orders), False)
    if any(one.units.get("pages_tried") for one in samples):
        yield ("Units: pages that are compressed together with their neighbours",
               "The lines of memory/units; docs/control.md explains each.",
               _beside(samples, names, _units), False)
    yield ("Compaction since the device was set up",
           "The lines of memory/compaction; docs/compaction.md explains each.",
           _beside(samples, names, _compaction), True)
    for one, name in zip(samples, names, strict=True):
        yield ("Compressed pages by size" + (f" ({name})" if name else ""),
               "A page lies in the first size class that it fits into. The columns count the zspages of a "
               "class by how full they are.", _classes(one), True)


def _beside(
    samples: Sequence[Sample], names: Sequence[str], figures: Callable[[Sample], dict[str, str]]
) -> Rows:
    """A column a sample, a row for what any of them has."""
    found = [figures(one) for one in samples]
    rows = dict.fromkeys(name for each in found for name in each)
    return [["", *names], *([row, *(each.get(row, "") for each in found)] for row in rows)]


def _summary(one: Sample) -> dict[str, str]:
    share, s = one.whole_share, one.mm_stat
    return {
        "taken": moment(one),
        "algorithm": one.algorithm,
        "size of the device (disksize)": _bytes(one.disksize),
        "data (orig_data_size)": _bytes(s["orig_data_size"]),
        "compressed to (compr_data_size)": _bytes(s["compr_data_size"]),
        "memory for it (mem_used_total)": _bytes(s["mem_used_total"]),
        "most memory there was (mem_used_max)": _bytes(s["mem_used_max"]),
        "limit of the memory (mem_limit)": _bytes(s["mem_limit"]) if s["mem_limit"] else "none",
        "ratio of data to memory": f"{one.ratio:.3f}" if one.ratio else "",
        "pages of one repeated word, which take no memory (same_pages)": str(s["same_pages"]),
        "pages that do not compress (huge_pages)": str(s["huge_pages"]),
        "such pages since the start (huge_pages_since)": str(s["huge_pages_since"]),
        "pages of the pool that compaction freed (pages_compacted)": str(s["pages_compacted"]),
        "pageblocks in use": str(one.in_use),
        "pageblocks given back to the system": str(one.returned),
        "memory of the pageblocks in use": _bytes(one.resident),
        "memory in the balloon": _bytes(one.balloon.get("size", 0)),
        "free": _bytes(one.free),
        "of it in whole pageblocks": "" if share is None else f"{100 * share:.1f} %",
    }


def _orders(one: Sample) -> dict[str, str]:
    return {format_size(FRAME << order): str(blocks) for order, blocks in enumerate(one.orders)}


def pageblocks_by_share(one: Sample) -> dict[str, str]:
    """How many pageblocks are in use up to 10 %, 20 % ... 100 %, and how many are given back."""
    counts = [0] * 10
    for block in one.pageblocks:
        if block.resident:
            counts[max(0, -(-block.used * 10 // PAGEBLOCK_FRAMES) - 1)] += 1
    return {"given back": str(one.returned)} | {f"≤ {10 * i + 10} %": str(n) for i, n in enumerate(counts)}


def _contents(one: Sample) -> dict[str, str]:
    rows = {}
    for name, (pages, nbytes) in one.kinds.items():
        what = f"{KINDS[name]} ({name})" if name != REST else "headers, and room between and behind (rest)"
        data = pages * FRAME
        ratio = f", ratio {data / nbytes:.2f}" if pages and nbytes else ""
        rows[what] = f"{format_size(data)} in {format_size(nbytes)}{ratio}" if pages else format_size(nbytes)
    return rows


def _steps(one: Sample) -> dict[str, str]:
    rows = {}
    for step, words in STEPS.items():
        pages, saved, ms = (
            one.contents.get(f"step_{step}_{name}", 0) for name in ("pages", "bytes_saved", "cpu_ms"))
        rows[f"{words} ({step})"] = f"{pages}, {format_size(saved)} saved in {ms / 1000:.1f} s of CPU"
    return rows


def _units(one: Sample) -> dict[str, str]:
    sizes = ("bytes", "bytes_saved")
    return {name: _bytes(value) if name in sizes else str(value) for name, value in one.units.items()}


def _compaction(one: Sample) -> dict[str, str]:
    return {name: str(value) for name, value in one.compaction.items()}


def _classes(one: Sample) -> Rows:
    head = ["size", *(f"≤ {10 * i} %" for i in range(1, 10)), "≤ 99 %", "full", "objects", "of", "pages",
            "pages a zspage", "freeable pages"]
    rows = (
        (c.size, *c.zspages, c.obj_used, c.obj_allocated, c.pages_used, c.pages_per_zspage, c.freeable)
        for c in one.classes if any(c.zspages)
    )
    return [head, *([str(number) for number in row] for row in rows)]


def _bytes(size: int) -> str:
    return f"{format_size(size)} ({size})"
