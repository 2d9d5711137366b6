# SPDX-License-Identifier: Apache-2.0
"""The screen of `zramfs top` under its user's keys: order, help, graphs, colours, and every size."""
from __future__ import annotations

import io
import os
import re
from pathlib import Path

import pytest
from rich.console import Console

from tests.support.screens import PAGE, SIZES, drawn, latency, made, on, picture, reading, two_readings
from zramfs.model.config import Algorithm
from zramfs.model.policy import Recompress
from zramfs.model.stats import BUCKET_BOUNDS, NO_LATENCY, Latency
from zramfs.tree import metrics
from zramfs.views import scrape, watched
from zramfs.views.charts import Graph, amount
from zramfs.views.screen import View
from zramfs.views.watched import Place, Reading, Watched


async def several() -> list[Watched]:
    """Three devices: `much` has most data and reads, `slow` the slowest writes, `none` no figures."""
    device = made(mem_limit=1 << 20)
    await device.start()
    much, slow = on(reading(device, 0.0), name="much"), on(reading(device, 0.0), name="slow")
    store = device._lane.store
    for page in range(100):
        store.write(page * PAGE, os.urandom(PAGE // 4).ljust(PAGE, b"z"))
    much.note(reading(device, 1.0, latency=latency(read=900), read_sectors=8 * 900))
    store.zero(0, 60 * PAGE)
    slow.note(reading(device, 1.0, latency=latency(read=5, write=50), read_sectors=40))
    none = Watched(Place(Path("/mnt/none"), "none", "/mnt/none"))
    none.state = "it has ended"
    for each in (much, slow):
        each.state = "ready"
        each.place = Place(Path(f"/run/zramfs/{each.name}/tree"), each.name, f"/mnt/{each.name}")
    return [slow, none, much]


def names_in(lines: list[str]) -> list[str]:
    """The devices of the list, from above."""
    return [match[1] for line in lines if (match := re.match("[> ] +(much|slow|none) ", line))]


@pytest.mark.parametrize("keys, order", [
    ("", ["much", "none", "slow"]), ("n", ["slow", "none", "much"]), ("nn", ["much", "none", "slow"]),
    ("r", ["much", "slow", "none"]), ("rr", ["slow", "much", "none"]), ("w", ["slow", "much", "none"]),
    ("d", ["much", "slow", "none"]), ("dd", ["slow", "much", "none"]), ("m", ["much", "slow", "none"]),
    ("l", ["slow", "much", "none"]), ("f", ["much", "slow", "none"]), ("c", ["much", "slow", "none"]),
    ("rm", ["much", "slow", "none"]),
])
async def test_keys_sort_the_list_and_those_without_a_value_come_last(keys: str, order: list[str]) -> None:
    devices = await several()
    found, _ = view_after(keys, devices).arranged(devices)
    assert [device.name for device in found] == order
    assert names_in(picture(devices, 120, 40, keys=keys)) == order


def view_after(keys: str, devices: list[Watched]) -> View:
    view = View()
    for key in keys:
        assert view.press(key.encode(), devices)
    return view


async def test_the_chosen_device_stays_chosen_wherever_it_stands() -> None:
    devices = await several()
    view = view_after("jj", devices)
    assert view.chosen.name == "slow"
    for keys, number in (("r", 1), ("r", 0), ("n", 2)):
        for key in keys:
            view.press(key.encode(), devices)
        found, at = view.arranged(devices)
        assert (found[at].name, at) == ("slow", number)
    assert [bool(view.press(key, devices)) for key in (b"q", b"Q", b"\x04", b"")] == [False] * 3 + [True]
    assert view_after("jjj", devices).chosen.name == "much" == view_after("kkk", devices).chosen.name


async def test_the_sorted_column_is_marked() -> None:
    devices = await several()
    assert "device ^" in picture(devices, 80, 24)[0]
    assert "read/s v" in picture(devices, 80, 24, keys="r")[0]
    assert "read/s ^" in picture(devices, 80, 24, keys="rr")[0]


@SIZES
async def test_help_names_every_key_and_colour_and_any_key_leads_back(columns: int, lines: int) -> None:
    devices = await several()
    shown = picture(devices, columns, lines, keys="?")
    text = "\n".join(shown)
    keys = {line.split()[0].rstrip(",") for line in shown[1:shown.index("colours") - 1] if line[0] != " "}
    assert keys == {"q", "up", "n", "r", "w", "d", "m", "l", "f", "c", "g", "?"}
    assert re.search("^green .*\nyellow .*\nred ", text, re.MULTILINE)
    assert "…" not in text and "requests" not in shown[3]
    for back in ("?", "x", "r", " "):
        assert "requests" in "\n".join(picture(devices, columns, lines, keys="?" + back))
    after = names_in(picture(devices, columns, lines, keys="?r"))
    assert after == ["much", "none", "slow"], "no sorting there"


@SIZES
async def test_graphs_show_io_ratio_and_memory_over_time(columns: int, lines: int) -> None:
    device = await two_readings()
    for number in range(600):
        wave = 1 + number % 50
        device.points.append(watched.Point(wave * 1048576.0, 2.0 + number / 1000, wave * 1000.0))
    for keys in ("", "g"):
        shown = picture([device], columns, lines, keys=keys)
        text = "\n".join(shown)
        if columns > 80 or keys:
            assert re.search(r"I/O 50M/s +0 to 50M/s", text), text
            assert re.search(r"ratio 2\.60 +2\.\d\d to 2\.6\d", text) and "memory 48.8K" in text
            # The wave is seen: the last column is full, and its neighbours to the left are lower and lower.
            first = shown[next(i for i, line in enumerate(shown) if line.startswith("I/O ")) + 1]
            assert re.search("[▁-█]*█", first) and re.search(" [▁-▆]+[▁-█]*█", first), first
        else:
            assert re.search(r"I/O +[▁-█]{10,} +50M/s", text)
            assert re.search(r"ratio +[▁-█]{10,} +2.60", text)
            assert re.search(r"memory +[▁-█]{10,} +48.8K", text)
        assert ("time they took" in text) == (not keys) and "full up to" in text
        assert "errors none" in text and shown[-1].startswith("every 1 s")


def test_a_graph_fills_its_lines_by_value_and_leaves_gaps() -> None:
    console = Console(file=io.StringIO(), width=22, height=4, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(Graph("x", [0.0, 4.0, None, 8.0, 16.0], amount), height=4)
    assert [line.rstrip() for line in capture.get().splitlines()[:4]] == [
        "x 16         0 to 16", " " * 19 + "█", " " * 18 + "▄█", " " * 15 + "▁▆ ██"]


async def test_a_device_that_does_not_answer_leaves_a_gap_in_the_graphs() -> None:
    device = await two_readings()
    device.late()
    device.note(device.last)
    assert [point.ratio is None for point in device.points] == [False, False, True, False]
    assert [point.io is None for point in device.points][:3] == [True, False, True]


async def test_wide_screens_show_full_names_and_where_devices_are_mounted() -> None:
    one = await two_readings()
    one.place = Place(Path("/run/zramfs/x/tree"), "a-name-of-forty-characters-for-this-test", "/mnt/x",
                      "/srv/data/deep/down/in/the/tree")
    swap = on(*one.readings, name="swap0")
    swap.place = Place(Path("/run/zramfs/swap0/tree"), "swap0", "swap0", "[SWAP]")
    shown = picture([one, swap], 200, 50)
    assert re.search(rf"^> +{one.name} +{one.place.mounted} ", shown[1]), shown[1]
    assert re.search(r"^ +swap0 +\[SWAP\] ", shown[2])
    assert all(word in shown[0] for word in ("on", "rMiB/s", "wMiB/s", "99 %", "limit"))
    assert f"{one.name} on /mnt/x   mounted on {one.place.mounted}   its files in /run/zramfs/x/tree" in (
        "\n".join(shown))
    assert "swap0 on swap0   in use as swap" in "\n".join(picture([one, swap], 200, 50, chosen=1))
    shown = picture([one, swap], 120, 40)
    assert "~" in shown[1] and shown[1].rstrip().endswith("ready"), "cut, and nothing is pushed out"
    assert "on" not in picture([one, swap], 80, 24)[0].split()
    many = [one, *(on(*one.readings, name=f"d{n}") for n in range(40))]
    listed = [line for line in picture(many, 200, 50) if re.match("[> ] +(a-name|d[0-9]+)", line)]
    assert len(listed) >= 15, "more devices"


@pytest.mark.parametrize(
    "used, code", [(0.1, "32"), (0.74, "32"), (0.75, "33"), (0.9, "1;31"), (1.0, "1;31")])
async def test_the_colour_of_memory_says_how_near_its_limit_is(used: float, code: str) -> None:
    device = made(mem_limit=1000 * PAGE)
    await device.start()
    text = metrics.openmetrics_text(device).decode()
    text = re.sub(r"(zramfs_mem_used_bytes\{.*\}) .*", rf"\1 {used * 1000 * PAGE}", text)
    shown = drawn([on(Reading(1.0, scrape.parse_metrics(text, "x")))], color_system="standard")
    assert f"\x1b[{code}mof 3.9M ({100 * used:.0f} %)\x1b[0m" in shown


@pytest.mark.parametrize("bucket, code", [(2, None), (14, "33"), (18, "1;31")])
async def test_the_colour_of_a_time_says_whether_it_is_slow(bucket: int, code: str | None) -> None:
    device = made()
    counts = [0] * (len(BUCKET_BOUNDS) + 1)
    counts[bucket] = 100
    slow = (Latency(tuple(counts), 1), NO_LATENCY, NO_LATENCY)
    shown = drawn([on(reading(device, 1.0), reading(device, 2.0, latency=slow))], color_system="standard")
    [row] = [line for line in shown.splitlines() if line.startswith("read ")]
    assert re.findall(r"\x1b\[([\d;]+)m *[\d.]+ [mu]?s\x1b", row) == ([code] * 3 if code else [])


@pytest.mark.parametrize(
    "columns, lines", [(1, 1), (10, 3), (20, 60), (40, 12), (79, 23), (110, 25), (300, 90)])
@pytest.mark.parametrize("keys", ["", "g", "?", "d"])
async def test_a_screen_of_any_size_is_drawn(columns: int, lines: int, keys: str) -> None:
    devices = await several()
    for some in ([], devices[:1], devices):
        text = drawn(some, width=columns, height=lines, keys=keys, color_system=None)
        shown = text.removesuffix("\n").split("\n")
        assert len(shown) <= lines and all(len(line) <= columns for line in shown)


@SIZES
@pytest.mark.parametrize("keys", ["", "g"])
async def test_nothing_that_a_device_says_steers_the_terminal(columns: int, lines: int, keys: str) -> None:
    """Another user's device may be watched, and directories may have any name."""
    evil = "\x1b[2J\x1b]0;owned\x07\udcff\n\u202e"
    device = made(policies=(Recompress(60),), algorithms=(Algorithm("lz4"), Algorithm("zstd")))
    await device.start()
    device._lane.store.write(0, os.urandom(PAGE))
    text = metrics.openmetrics_text(device).decode()
    for old in ('algorithm="lz4"', 'policy="recompress"', 'size="4096"'):
        assert old in text
        text = text.replace(old, old[:-1] + "\x1b[2J\x07" + '"')
    shown = on(Reading(1.0, scrape.parse_metrics(text, "x")), Reading(2.0, scrape.parse_metrics(text, "x")))
    shown.place = Place(Path(f"/mnt/{evil}"), evil, f"/mnt/{evil}", f"/mnt/{evil}")
    other = Watched(shown.place)
    other.state = f"somewhere{evil}"
    for chosen in (0, 1):
        drawn_text = drawn([shown, other], width=columns, height=lines, chosen=chosen, keys=keys,
                           color_system=None)
        assert not [each for each in drawn_text if not each.isprintable() and each != "\n"]
