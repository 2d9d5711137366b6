# SPDX-License-Identifier: Apache-2.0
"""A report on a device's pool: one HTML page with its picture and its figures, or the picture alone."""
from __future__ import annotations

import base64
import errno
import html
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from zramfs import __version__
from zramfs.errors import ZramfsError
from zramfs.host import programs
from zramfs.host.package_managers import advise_install
from zramfs.text.sizes import format_size

from . import sample
from .sample import PAGEBLOCK_FRAMES, Sample

FORMATS = (".png", ".html")
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 1100px; margin: 2rem auto; padding: 0 1rem }
img { width: 100%; height: auto }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
footer { margin: 2rem 0; color: #555; font-size: .85rem }
"""
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

    png = picture.draw_pool(after, before, titles)
    if output.suffix.lower() == ".png":
        output.write_bytes(png)
    else:
        output.write_text(page(after, before, png, titles), encoding="utf-8", errors="replace")


def page(
    after: Sample, before: Sample | None, png: bytes, titles: tuple[str, str] = ("before", "after")
) -> str:
    """The HTML page, with the picture in it: no other file is needed to show it."""
    samples = [after] if before is None else [before, after]
    names = [""] if before is None else list(titles)
    title = html.escape(f"{after.name} on {after.directory}")
    image = base64.b64encode(png).decode()
    body = "\n".join(
        f'<h2>{html.escape(heading)}</h2>\n<div class="wide">{_table(rows)}</div>'
        for heading, rows in _tables(samples, names)
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>zramfs report: {title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<img alt="Pageblocks, free memory by order and size classes of {title}; the tables below have the '
        f'figures." src="data:image/png;base64,{image}">\n{body}\n'
        f"<footer>zramfs {__version__}</footer>\n</body>\n</html>\n"
    )


def _table(rows: Rows) -> str:
    head, *body = rows
    lines = ["<thead><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr></thead>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    return "\n".join(["<table>", *lines, "</table>"])


def _tables(samples: Sequence[Sample], names: Sequence[str]) -> Iterator[tuple[str, Rows]]:
    yield "The device", _beside(samples, names, _summary)
    yield "Free blocks of 2^order frames of 4 KiB", _beside(samples, names, _orders)
    yield "Pageblocks by the share that is in use", _beside(samples, names, pageblocks_by_share)
    yield "Compaction since the device was set up", _beside(samples, names, _compaction)
    for one, name in zip(samples, names, strict=True):
        yield "Size classes in use" + (f" ({name})" if name else ""), _classes(one)


def _beside(
    samples: Sequence[Sample], names: Sequence[str], figures: Callable[[Sample], dict[str, str]]
) -> Rows:
    """A column a sample, a row for what any of them has."""
    found = [figures(one) for one in samples]
    rows = dict.fromkeys(name for each in found for name in each)
    return [["", *names], *([row, *(each.get(row, "") for each in found)] for row in rows)]


def _summary(one: Sample) -> dict[str, str]:
    share = one.whole_share
    return {
        "taken": one.taken,
        "algorithm": one.algorithm,
        "disksize": _bytes(one.disksize),
        **{name: _bytes(one.mm_stat[name]) for name in sample.MM_STAT[:5]},
        **{name: str(one.mm_stat[name]) for name in sample.MM_STAT[5:]},
        "ratio (data / pool memory)": f"{one.ratio:.3f}" if one.ratio else "",
        "pageblocks in use": str(one.in_use),
        "pageblocks given back to the OS": str(one.returned),
        "resident": _bytes(one.resident),
        "balloon": _bytes(one.balloon.get("size", 0)),
        "free": _bytes(one.free),
        "of it in whole pageblocks": "" if share is None else f"{100 * share:.1f} %",
    }


def _orders(one: Sample) -> dict[str, str]:
    return {str(order): str(blocks) for order, blocks in enumerate(one.orders)}


def pageblocks_by_share(one: Sample) -> dict[str, str]:
    """How many pageblocks are in use up to 10 %, 20 % ... 100 %, and how many are given back."""
    counts = [0] * 10
    for block in one.pageblocks:
        if block.resident:
            counts[max(0, -(-block.used * 10 // PAGEBLOCK_FRAMES) - 1)] += 1
    return {"given back": str(one.returned)} | {f"≤ {10 * i + 10} %": str(n) for i, n in enumerate(counts)}


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
    return f"{size} ({format_size(size)})"
