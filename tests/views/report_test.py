# SPDX-License-Identifier: Apache-2.0
"""Reports: what is read from the tree, kept as JSON, drawn, and written as a page."""
from __future__ import annotations

import base64
import errno
import html.parser
import io
import json
import random
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path

import pytest

from tests.support.fakes import FakeLane
from tests.support.paths import ROOT
from zramfs.device.device import Device
from zramfs.errors import ZramfsError
from zramfs.model.config import DeviceConfig
from zramfs.text.sizes import format_size
from zramfs.tree.files import tree_of
from zramfs.tree.tree import Directory
from zramfs.views import sample
from zramfs.views.sample import MARK, Pageblock, Sample, SizeClass

pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install zramfs[report])")

MIB = 1 << 20
PAGE = 4096
FULL = Pageblock(0, 512, 512, 0, 0, True)
RETURNED = Pageblock(512, 0, 0, 0, 0, False)
DARK, YELLOW = "#00224e", "#fee838"  # the ends of cividis: a full pageblock, an empty one


@pytest.fixture
async def device() -> Iterator[Device]:
    made = Device(DeviceConfig(Path("/mnt/z0"), Path("/run/z0"), name="z0"), FakeLane())
    yield made
    await made.close()


def texts(device: Device) -> dict[str, str]:
    """As sample.texts() reads them, from the tree itself."""
    found = {}
    for name in (*sample.FILES, sample.UNITS, sample.CONTENTS):
        node = tree_of(device, Path("/run/z0/disk"))
        for part in name.split("/"):
            assert isinstance(node, Directory)
            node = next(child for child in node.children if child.name == part)
        found[name] = node.read().decode()
    return found


def made(full: int, returned: int = 0, *more: Pageblock, name: str = "z0") -> Sample:
    """A sample of so many full and returned pageblocks, and `more`."""
    return Sample(
        name, "/mnt/z0", "2026-11-22T22:04:11+00:00", 64 * MIB, "lz4",
        dict.fromkeys(sample.MM_STAT, 0), (0,) * 9 + (returned,),
        (FULL,) * full + (RETURNED,) * returned + more,
        (SizeClass(1, 48, (0,) * 10 + (5,), 425, 425, 15, 3, 0),), {"runs": 1}, {"size": 0},
    )


async def fill(device: Device) -> None:
    """Objects of many classes, holes between them, a balloon, and a pageblock given back."""
    await device.command("disksize=64M")
    store = device._store
    source = random.Random(7)
    for page in range(4000):
        size = source.choice((200, 900, 1500, 2100, 2900, PAGE))
        store.write(page * PAGE, source.randbytes(size).ljust(PAGE, b"z"))
    store.zero(2000 * PAGE, 1500 * PAGE)
    for page in source.sample(range(2000), 900):
        store.zero(page * PAGE, PAGE)
    store.balloon.set_target(300)
    while store.balloon.adjust(100):
        pass
    assert any(not block.resident for block in store.migration.pageblocks())


# ---- reading and keeping ----------------------------------------------------------------------------
async def test_a_sample_says_what_the_store_says(device: Device) -> None:
    await fill(device)
    store = device._store
    taken = sample.parse_sample(texts(device), "z0", "/mnt/z0")
    stats, memory = store.stats(), device.memory()
    assert (taken.name, taken.directory) == ("z0", "/mnt/z0")
    assert (taken.algorithm, taken.disksize) == ("lz4", 64 * MIB)
    assert {name: getattr(stats, name) for name in sample.MM_STAT} == taken.mm_stat
    assert taken.orders == store.buddyinfo()
    assert [astuple(b) for b in taken.pageblocks] == [astuple(b) for b in store.migration.pageblocks()]
    assert [astuple(c) for c in taken.classes] == [
        (c.index, c.size, c.zspages_by_group[1:], c.obj_allocated, c.obj_used, c.pages_used,
         c.pages_per_zspage, c.freeable) for c in store.classes()
    ]
    assert taken.in_use == stats.pageblocks_in_use
    assert taken.returned == store.buddyinfo()[-1] > 0
    assert taken.resident == stats.resident
    assert taken.free == stats.frames_free * PAGE + taken.returned * 2 * MIB
    assert taken.whole_share == pytest.approx(1 - memory.unusable_index)
    assert taken.ratio == stats.orig_data_size / stats.mem_used_total
    assert taken.compaction["bytes_returned"] == stats.bytes_returned
    assert taken.balloon == {"target": 300 * PAGE, "size": 300 * PAGE, "isolated": 0, "migrated": 0}
    assert sum(block.balloon for block in taken.pageblocks) == 300


async def test_json_brings_the_same_sample_back(device: Device) -> None:
    await fill(device)
    taken = sample.parse_sample(texts(device), "z\udc80 \N{SNOWMAN} $1", "/mnt/<z>")
    assert sample.from_json(taken.to_json(), "x.json") == taken


async def test_units_are_in_the_sample_and_have_a_table_where_there_are_some(device: Device) -> None:
    from zramfs.views import report

    await fill(device)
    drawn = [report.Drawn("", b"\x89PNG x")]
    before = sample.parse_sample(texts(device), "z0", "/mnt/z0")
    assert before.units["pages"] == 0 and "dead_places" not in report.page(before, None, drawn)
    await device.command("units idle=all")
    after = sample.parse_sample(texts(device), "z0", "/mnt/z0")
    stats = device.stats()
    assert after.units["pages"] == stats.store.unit_pages > 0
    assert after.units["bytes_saved"] == stats.unit_making.bytes_saved > 0
    [units] = [table for table in Page(report.page(after, before, drawn)).tables if table[1][0] == "units"]
    assert ["pages", "0", str(stats.store.unit_pages)] in units


async def test_what_lies_where_is_in_the_sample_and_on_the_page(device: Device) -> None:
    from zramfs.views import report

    await fill(device)
    drawn = [report.Drawn("", b"\x89PNG x")]
    before = sample.parse_sample(texts(device), "z0", "/mnt/z0")
    await device.command("units idle=all")
    after = sample.parse_sample(texts(device), "z0", "/mnt/z0")
    stats = device.stats().store
    assert after.kinds["units"] == (stats.unit_pages, stats.unit_bytes)
    assert sum(pages for pages, _ in after.kinds.values()) * PAGE == stats.orig_data_size
    assert sum(nbytes for _, nbytes in after.kinds.values()) == stats.mem_used_total
    tables = Page(report.page(after, before, drawn)).tables
    [row] = [row for table in tables for row in table if row[0].endswith("neighbours (units)")]
    assert row[1] == "" and row[2].startswith(f"{format_size(stats.unit_pages * PAGE)} in ")
    [row] = [row for table in tables for row in table if row[0] == "pages in units (units)"]
    assert row[1] == "0, 0B saved in 0.0 s of CPU"
    assert re.fullmatch(rf"{device.stats().unit_making.pages}, \S+ saved in [\d.]+ s of CPU", row[2])


async def test_the_picture_has_a_chart_of_what_lies_where(device: Device) -> None:
    pytest.importorskip("matplotlib")
    from zramfs.views import picture

    await fill(device)
    one = sample.parse_sample(texts(device), "z0", "/mnt/z0")
    old = replace(one, contents={})
    with_it, without = (_size(picture.draw_pool(each)) for each in (one, old))
    assert with_it[0] == without[0] and with_it[1] > without[1] + 100


def _size(png: bytes) -> tuple[int, int]:
    """Width and height, from its header."""
    return struct.unpack(">II", png[16:24])


async def test_a_device_of_a_daemon_without_units_and_its_json_can_be_read(
    device: Device, tmp_path: Path
) -> None:
    await fill(device)
    for name, text in texts(device).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert sample.texts(tmp_path) == texts(device)
    for name in (sample.UNITS, sample.CONTENTS):
        (tmp_path / name).unlink()
    taken = sample.parse_sample(sample.texts(tmp_path), "z0", "/mnt/z0")
    assert taken.units == taken.contents == taken.kinds == {}
    figures = json.loads(taken.to_json())
    del figures["units"], figures["contents"]
    assert sample.from_json(json.dumps(figures), "x.json") == taken


async def test_an_empty_pool_has_no_shares(device: Device) -> None:
    await device.command("disksize=64M")
    taken = sample.parse_sample(texts(device), "z0", "/mnt/z0")
    assert (taken.ratio, taken.whole_share, taken.pageblocks, taken.free) == (None, None, (), 0)


async def test_a_device_without_a_size_has_nothing_to_report(device: Device) -> None:
    with pytest.raises(ZramfsError, match="/mnt/z0 has no pool yet") as caught:
        sample.parse_sample(texts(device), "z0", "/mnt/z0")
    assert caught.value.errno == errno.ENODATA


@pytest.mark.parametrize(("file", "text"), [
    ("zram/disksize", "many"),
    ("zram/comp_algorithm", "lz4 zstd\n"),
    ("zram/mm_stat", "1 2 3\n"),
    ("memory/buddyinfo", "Node 0, zone    arena      1      2\n"),
    ("memory/pageblocks", "pageblock free used movable isolated balloon state\n0 1 511 511 0 0 lost\n"),
    ("memory/pageblocks", "pageblock free used movable isolated balloon state\n0 1 511\n"),
    ("memory/pageblocks", "pageblock free used state\n0 1 511 resident\n"),
    ("memory/pageblocks", ""),
    ("zsmalloc/classes", "class size 10% 20%\n 1 32 0\n"),
    ("memory/compaction", "runs\n"),
    ("memory/balloon", "target much\n"),
])
async def test_another_version_of_the_tree_is_refused(device: Device, file: str, text: str) -> None:
    await device.command("disksize=64M")
    with pytest.raises(ZramfsError, match=f"^/mnt/z0/{file} does not read as expected .*version") as caught:
        sample.parse_sample(texts(device) | {file: text}, "z0", "/mnt/z0")
    assert caught.value.errno == errno.EBADMSG


def changed(**figures: object) -> str:
    return json.dumps(json.loads(made(3).to_json()) | figures)


@pytest.mark.parametrize(("text", "reason"), [
    ("", "Expecting value"),
    ("[1]", "expected old.json to be the JSON"),
    ("{}", MARK),
    (json.dumps({MARK: 1}), "orders"),
    (changed(**{MARK: 2}), "in version 1; it has version 2"),
    (changed(orders=[1, 2]), "2 orders, not 10"),
    (changed(orders=[-1] + 9 * [0]), "-1 stands where a count belongs"),
    (changed(disksize="64M"), "'64M' stands where a count belongs"),
    (changed(mm_stat={}), "mm_stat lacks orig_data_size"),
    (changed(taken="yesterday"), "yesterday"),
    (changed(pageblocks={"columns": ["free"], "rows": [[1, 2]]}), "longer"),
    (changed(pageblocks={"columns": ["free", "used", "movable", "isolated", "balloon", "resident"],
                         "rows": [[5, 5, 0, 0, 0, True]]}), "5 free and 5 used frames"),
    (changed(classes=[{"size": 32}]), "zspages"),
    (changed(more=1), "more"),
])
def test_other_json_is_refused_with_a_reason(text: str, reason: str) -> None:
    with pytest.raises(ZramfsError, match=re.escape(reason)) as caught:
        sample.from_json(text, "old.json")
    assert caught.value.errno == errno.EINVAL
    assert "`zramfs report`" in str(caught.value)


async def test_the_page_on_compaction_names_every_line_of_its_file(device: Device) -> None:
    page = (ROOT / "docs" / "compaction.md").read_text()
    table = page.split("## What it says")[1].split("\n## ")[0]
    named = re.findall(r"^\| ([a-z_, ]+) \|", table, re.M)
    await device.command("disksize=64M")
    lines = texts(device)["memory/compaction"].splitlines()
    explained = [name for cell in named if cell != "name" for name in cell.split(", ")]
    assert sorted(explained) == sorted(line.split()[0] for line in lines)


# ---- the picture ------------------------------------------------------------------------------------
def drawn(png: bytes):
    """The picture as an array of height x width x RGB, 0 to 255."""
    import matplotlib.image

    return (matplotlib.image.imread(io.BytesIO(png))[:, :, :3] * 255).round().astype(int)


def area(taken: Sample, colour: str, before: Sample | None = None) -> int:
    """Pixels of nearly that colour, in the whole picture with its legends."""
    from zramfs.views import picture

    wanted = [int(colour[i:i + 2], 16) for i in (1, 3, 5)]
    return int((abs(drawn(picture.draw_pool(taken, before)) - wanted).max(axis=2) < 12).sum())


def test_every_full_pageblock_covers_the_same_area_in_dark() -> None:
    none, some, many = (area(made(full, 64 - full), DARK) for full in (0, 16, 48))
    assert some - none > 16 * 200
    assert many - none == pytest.approx(3 * (some - none), rel=0.02)


def test_sparse_pageblocks_are_yellow_and_returned_ones_are_not() -> None:
    sparse = Pageblock(511, 1, 1, 0, 0, True)
    assert area(made(32, 0, *[sparse] * 32), YELLOW) - area(made(32, 32), YELLOW) > 32 * 200


def test_the_mark_of_the_balloon_is_as_large_as_its_share() -> None:
    from zramfs.views import picture

    none, half, whole = (
        area(made(32, 0, *[Pageblock(0, 512, 512, 0, frames, True)] * 32), picture.BALLOON)
        for frames in (0, 256, 512)
    )
    assert half - none > 16 * 200
    # The white edge of each mark weighs more on the smaller ones.
    assert whole - none == pytest.approx(2 * (half - none), rel=0.1)


def test_a_cell_of_several_pageblocks_is_filled_as_far_as_they_are_resident() -> None:
    """Beyond 16 GiB: two pageblocks a cell."""
    halves = [FULL, RETURNED] * 4100
    whole, half = area(made(8200), DARK), area(made(0, 0, *halves), DARK)
    none = area(made(0, 8200), DARK)
    # Cells are 10 pixels wide here, and a part of each edge is mixed with what lies beside it.
    assert 0.4 < (half - none) / (whole - none) < 0.6


def test_the_scale_falls_evenly_in_grey() -> None:
    from zramfs.views import picture

    scale = picture.LIGHT.fullness()
    lightness = []
    for i in range(51):
        red, green, blue, _ = scale(i / 50)
        lightness.append(0.2126 * red + 0.7152 * green + 0.0722 * blue)
    assert all(left > right for left, right in zip(lightness, lightness[1:], strict=False))
    assert lightness[0] - lightness[-1] > 0.7


def test_on_a_dark_ground_more_is_brighter_and_nothing_is_as_dark_as_the_ground() -> None:
    from zramfs.views import picture

    grey = [0.2126 * r + 0.7152 * g + 0.0722 * b
            for r, g, b, _ in (picture.DARK.fullness()(i / 50) for i in range(51))]
    assert all(left < right for left, right in zip(grey, grey[1:], strict=False))
    ground = int(picture.DARK.ground[3:5], 16) / 255
    assert grey[0] > ground + 0.1 and grey[-1] > 0.8


@pytest.mark.parametrize("both", [False, True])
def test_a_picture_for_a_phone_is_narrow_and_a_dark_one_dark(both: bool) -> None:
    from zramfs.views import picture
    from zramfs.views.picture import DARK as NIGHT
    from zramfs.views.picture import Form

    samples = (made(40, 10), made(60) if both else None)
    wide, narrow, dark = (drawn(picture.draw_pool(*samples, form=form)) for form in (
        Form(has_header=False), Form(narrow=True, has_header=False), Form(NIGHT, True, False)))
    assert narrow.shape[1] < 600 < 1000 < wide.shape[1] and narrow.shape[0] > narrow.shape[1]
    assert dark.shape == narrow.shape
    assert (narrow[0, 0] == 255).all() and abs(dark[0, 0] - [0x14, 0x17, 0x1c]).max() <= 1
    # Most of it is ground, and what is written on it stands out from that.
    assert narrow.mean() > 200 and dark.mean() < 80 and dark.max() > 220


@pytest.mark.parametrize("blocks", [0, 1, 31, 33, 512, 513, 2048, 8192, 8193, 16385, 51200])
def test_a_map_has_a_cell_for_every_pageblock(blocks: int) -> None:
    from zramfs.views import picture

    columns, rows, per_cell = picture._grid(blocks)
    assert columns * rows * per_cell >= blocks
    assert columns * (rows - 1) * per_cell < max(blocks, 1)
    assert rows <= picture.MAP_ROWS and columns in picture.MAP_COLUMNS
    # Rows begin at round numbers.
    assert per_cell & (per_cell - 1) == 0


@pytest.mark.parametrize("taken", [
    made(0), made(1), made(0, 9000),
    made(3, name="$x^2 \\frac <b> \N{SNOWMAN} \u65e5\u672c \udc80 " + 90 * "z"),
], ids=["nothing", "one", "many", "odd name"])
def test_whatever_there_is_can_be_drawn(taken: Sample) -> None:
    """Without a warning, too: they are errors here."""
    from zramfs.views import picture

    alone, both = drawn(picture.draw_pool(taken)), drawn(picture.draw_pool(taken, made(40)))
    assert both.shape[1] > alone.shape[1] > 1000
    assert alone.shape[0] < 1500 > both.shape[0]


# ---- the page ---------------------------------------------------------------------------------------
class Page(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.cell = True

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.cell:
            self.tables[-1][-1][-1] += data


def test_the_page_holds_the_picture_and_the_figures() -> None:
    from zramfs.views import report

    before, after = made(9), made(4, 5)
    drawn = [report.Drawn("(wide)", b"other"), report.Drawn("", b"\x89PNG x")]
    page = Page(report.page(after, before, drawn))
    assert [tag for tag, attributes in page.tags if "src" in attributes or "href" in attributes] == ["img"]
    [image] = [attributes for tag, attributes in page.tags if tag == "img"]
    [other] = [attributes for tag, attributes in page.tags if tag == "source"]
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == b"\x89PNG x"
    assert base64.b64decode(other["srcset"].removeprefix("data:image/png;base64,")) == b"other"
    assert other["media"] == "(wide)"
    device, pageblocks, orders, compaction, *classes = page.tables
    assert device[0] == ["", "before", "after"]
    assert ["pageblocks in use", "9", "4"] in device
    assert ["free", "0B (0)", f"10M ({10 * MIB})"] in device
    assert ["of it in whole pageblocks", "", "100.0 %"] in device
    assert orders[-1] == ["2M", "0", "5"]
    assert pageblocks[1] == ["given back", "0", "5"] and pageblocks[-1] == ["≤ 100 %", "9", "4"]
    assert compaction[1] == ["runs", "1", "1"]
    assert len(classes) == 2
    assert classes[0][1] == ["48", *["0"] * 10, "5", "425", "425", "15", "3", "0"]


def test_the_page_begins_with_what_it_is_about_in_plain_words() -> None:
    from zramfs.views import report

    stat = dict.fromkeys(sample.MM_STAT, 0)
    stat |= {"orig_data_size": 30 * MIB, "mem_used_total": 10 * MIB, "mem_limit": 40 * MIB}
    after = replace(made(5, 3), mm_stat=stat)
    page = report.page(after, made(9), [report.Drawn("", b"")], ("old", "new"))
    body = re.sub(r"<[^>]*>", " ", page.split("<body>")[1].split("<picture>")[0])
    text = " ".join(body.split())
    assert text.startswith(
        "z0 on /mnt/z0 30M of data is kept in 10M of memory: each byte of memory holds 3.00 bytes of data. "
        "That is 25 % of the limit of 40M. Its pageblocks take 8M less than “old”.")
    assert "data 30M memory for it 10M ratio 3.00 taken from the system 10M" in text
    nothing = report.page(made(0), None, [report.Drawn("", b"")])
    assert "There is no data on it that takes memory." in nothing and "<dd>–</dd>" in nothing


def test_the_colours_of_the_page_can_be_read_in_the_light_and_in_the_dark() -> None:
    """A contrast of 4.5 and more, as WCAG 2 wants it (level AA)."""
    from zramfs.views import report

    def lightness(colour: str) -> float:
        digits = colour if len(colour) == 6 else "".join(2 * digit for digit in colour)
        parts = [int(digits[i:i + 2], 16) / 255 for i in (0, 2, 4)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    both = re.findall(r"--(\w+): #(\w+)", report._STYLE)
    assert len(both) == 10
    for scheme in (dict(both[:5]), dict(both[5:])):
        for text in ("text", "quiet"):
            for ground in ("ground", "card"):
                low, high = sorted((lightness(scheme[text]), lightness(scheme[ground])))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


def test_a_name_cannot_break_the_page() -> None:
    from zramfs.views import report

    page = Page(report.page(made(1, name='<script>"&amp;</title>'), None, [report.Drawn("", b"")]))
    assert "script" not in [tag for tag, _ in page.tags]
    image = next(attributes for tag, attributes in page.tags if tag == "img")
    assert '<script>"&amp;</title> on /mnt/z0' in image["alt"]


def test_every_pageblock_is_counted_once_by_its_share() -> None:
    from zramfs.views import report

    blocks = [Pageblock(512 - used, used, used, 0, 0, True) for used in range(513)]
    counted = report.pageblocks_by_share(made(0, 7, *blocks))
    assert counted.pop("given back") == "7"
    assert [int(number) for number in counted.values()] == [52, 51, 51, 51, 52, 51, 51, 51, 51, 52]


def test_without_matplotlib_the_sentence_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from zramfs.views import report\n"
        "try: report.expect_able()\n"
        "except OSError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "pip install 'zramfs[report]'" in done.stdout, done


def test_a_report_writes_what_its_name_asks_for(tmp_path: Path) -> None:
    from zramfs.views import report

    for name in ("x.png", "x.PNG"):
        report.write_report(made(3), None, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    odd = replace(made(3), name="a\udc80b")
    report.write_report(odd, made(4), tmp_path / "x.html", titles=("then", "now"))
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "<title>zramfs report: a?b on /mnt/z0</title>" in text
    page = Page(text)
    pictures = [attributes["srcset"] for tag, attributes in page.tags if tag == "source"]
    assert [attributes["media"] for tag, attributes in page.tags if tag == "source"] == [
        "(max-width: 700px) and (prefers-color-scheme: dark)", "(max-width: 700px)",
        "(prefers-color-scheme: dark)"]
    assert len(set(pictures)) == 3 and all(each.startswith("data:image/png;base64,") for each in pictures)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "<th>then</th><th>now</th>" in text
