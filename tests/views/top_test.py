# SPDX-License-Identifier: Apache-2.0
"""What `zramfs top` makes of the readings of `metrics`: rates, percentiles, the screen."""
from __future__ import annotations

import io
import math
import os
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.support.page_kinds import prose
from tests.support.screens import PAGE, SIZES, drawn, latency, made, on, picture, reading, two_readings
from zramfs.errors import ZramfsError
from zramfs.model.config import Algorithm
from zramfs.model.policy import Recompress, Units, Writeback
from zramfs.model.stats import BUCKET_BOUNDS, NO_LATENCY
from zramfs.tree import metrics
from zramfs.views import scrape, watched
from zramfs.views.charts import Curve, amount
from zramfs.views.panels import fitted
from zramfs.views.screen import View, plan, screen
from zramfs.views.watched import Place, Rates, Reading, Watched, errors, percentile


@pytest.mark.parametrize("values, shown", [
    ([1, 1.5, 2], "▁▅█"), ([2, 1], "█▁"), ([9, 9, 9, 1, 2, 3, 4, 5], "▁▃▅▇█"), ([], ""),
    # What hardly moves is a line in the middle, and no mountain range.
    ([2, 2, 2], "▅▅▅"), ([2, 2.01], "▄▅"), ([0, 0], "▅▅"),
])
def test_a_curve_goes_from_the_least_to_the_most_of_what_fits(values: list[float], shown: str) -> None:
    console = Console(file=io.StringIO(), width=5, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(Curve(values))
    assert capture.get().strip("\n") == shown


async def test_rates_are_differences_over_time():
    watched_device = await two_readings()
    rates = watched_device.rates
    assert rates.requests("read") == 1000 and rates.requests("write") == 10 and rates.requests("discard") == 0
    assert rates.bytes("read") == 1000 * PAGE
    assert rates.mean("read") == pytest.approx(3e-6) and rates.mean("discard") is None
    histogram = rates.histogram("read")
    assert {bound: n for bound, n in histogram.items() if n} == {4.096e-06: 2000}
    assert sum(rates.histogram().values()) == 2020
    assert 2.048e-06 < percentile(histogram, 0.5) < 4.096e-06


async def test_a_reset_in_between_counts_from_zero():
    device = made()
    before = reading(device, 1.0, latency=latency(read=1000, write=5))
    after = reading(device, 2.0, latency=latency(read=7))
    rates = Rates(before, after)
    assert rates.requests("read") == 7 and rates.requests("write") == 0
    assert sum(rates.histogram().values()) == 7


async def test_the_window_is_the_last_minute():
    device = made()
    readings = [reading(device, float(when), latency=latency(read=when)) for when in (0, 50, 100, 130, 150)]
    assert sum(on(*readings).window.histogram().values()) == 50
    assert sum(on(*readings[:2]).window.histogram().values()) == 50
    assert on(readings[0]).window is None and on(readings[0]).rates is None
    # An interval longer than the window: there is nothing else.
    assert on(readings[0], readings[2]).window.seconds == 100


@given(st.lists(st.integers(0, 50), min_size=5, max_size=5), st.floats(0.01, 1))
def test_percentiles_lie_in_the_bucket_of_their_request(counts: list[int], share: float) -> None:
    bounds = [1.0, 2.0, 4.0, 8.0, math.inf]
    found = percentile(dict(zip(bounds, counts, strict=True)), share)
    if not sum(counts):
        assert found is None
        return
    wanted, below = share * sum(counts), 0
    for i, count in enumerate(counts):
        if count and below + count >= wanted:
            lower = bounds[i - 1] if i else 0.0
            assert lower <= found <= (bounds[i] if bounds[i] < math.inf else lower)
            return
        below += count


@given(st.lists(st.integers(0, 9), min_size=26, max_size=26), st.integers(1, 30))
def test_a_histogram_that_is_cut_keeps_all_requests(counts: list[int], room: int) -> None:
    bounds = [*(bound / 1e9 for bound in BUCKET_BOUNDS), math.inf]
    rows = fitted(dict(zip(bounds, counts, strict=True)), room)
    assert len(rows) <= room
    assert sum(count for _, count in rows) == sum(counts)
    assert len({label for label, _ in rows}) == len(rows)


@pytest.mark.parametrize("value, text", [
    (0, "0"), (0.04, "0.0"), (7, "7"), (12.34, "12.3"), (999.4, "999"), (1234, "1234"), (9999, "9999"),
    (10_000, "10.0k"), (56_700, "56.7k"), (999_600, "1.0M"), (8.9e9, "8.9G"), (2e12, "2T"),
])
def test_amounts_have_five_characters_at_most(value: float, text: str) -> None:
    assert amount(value) == text and len(text) <= 5


async def test_the_screen_of_80_by_24_has_everything():
    lines = drawn([await two_readings()], color_system=None).splitlines()
    assert len(lines) == 24 and all(len(line) <= 80 for line in lines)
    text = "\n".join(lines)
    for words in (
        "mnt-z0 on /mnt/mnt-z0", "ready", "size 64M", "of 32M (", "ratio ", "requests ", "99.9 %",
        "time they took, last 2 s", "I/O ", "compaction", "winnable", "resident", "full up to",
        "zspages", "errors none", "longest request 2.4 ms", "3 under way", "every 1 s   q quits   ? help",
    ):
        assert words in text, words
    [read] = [line.split() for line in lines if line.startswith("read ")]
    assert read[1:3] == ["1000", "3.9"] and read[3:5] == ["3.0", "us"] and read[-1] == "2010"
    assert "<= 4.1 us ██████████████████ 99.0 %" in text and "<= 131 us ▏                   1.0 %" in text
    assert "\x1b" not in text


async def test_policies_that_are_on_have_a_line_each():
    device = made(policies=(Recompress(600), Writeback(7 * 86400, 1 << 30)),
                  algorithms=(Algorithm("lz4"), Algorithm("zstd")))
    await device.start()
    text = drawn([on(reading(device, 0.0))], height=30, color_system=None)
    assert re.search(r"policy +recompress 10min: 0 pages", text)
    assert re.search(r"policy +writeback 7d: 0 pages", text)
    device = made(policies=(Writeback(90),))
    await device.start()
    text = drawn([on(reading(device, 0.0))], height=30, color_system=None)
    assert re.findall(r"policy +([^:]*)", text) == ["writeback 90s"]


async def test_units_have_a_line_when_there_are_some():
    device = made(policies=(Units(1800),))
    await device.start()
    text = drawn([on(reading(device, 0.0))], height=30, color_system=None)
    assert "saved in" not in text and re.search(r"policy +units 30min: 0 pages", text)
    for number in range(32):
        device.store.write(number * PAGE, prose(number % 8))
    await device.command("units idle=all")
    text = drawn([on(reading(device, 0.0))], height=30, color_system=None)
    assert re.search(r"uni\S* +[\d.]+K saved in [\d.]+ [um]?s of CPU", text), text


async def mixed_device() -> Watched:
    """With recompressed pages, units, shared and same-filled ones."""
    device = made(algorithms=(Algorithm("lz4"), Algorithm("zstd")))
    await device.start()
    for number in range(400):
        device.store.write(number * PAGE, prose(number % 300) if number < 380 else bytes(PAGE))
    for command in ("recompress max_pages=200", "share idle=all", "units idle=all"):
        await device.command(command)
    device.store.write(380 * PAGE, b"".join(prose(number) for number in range(1000, 1020)))
    return on(reading(device, 0.0))


async def test_what_lies_where_is_shown_where_pages_are_of_several_kinds():
    device = await mixed_device()
    text = drawn([device], color_system=None)
    [legend] = [line for line in text.splitlines() if line.startswith("pages ")]
    shares = dict(re.findall(r"(\w+) (\d+) %", legend))
    assert set(shares) == {"hot", "units", "shared"} and 98 <= sum(map(int, shares.values())) <= 102
    rows = text.splitlines()[text.splitlines().index(legend):][1:3]
    assert [row.split()[0] for row in rows] == ["data", "memory"]
    data, memory = (row.split(maxsplit=1)[1] for row in rows)
    # The bars are as long as each other, each in the pieces that there are.
    assert len(data) == len(memory) and data.strip() == data
    assert data.count("▚") / len(data) == pytest.approx(int(shares["shared"]) / 100, abs=0.03)
    assert memory.count("▚") < data.count("▚"), "shared pages take less than their share"
    assert len(text.splitlines()) == 24 and "full up to" in text and "q quits" in text
    plain = drawn([await two_readings()], color_system=None)
    assert not [line for line in plain.splitlines() if line.startswith("pages ")], "they are all hot"


@pytest.mark.parametrize("devices", [1, 2, 9])
@pytest.mark.parametrize("height", range(4, 60))
def test_what_lies_where_has_its_lines_or_is_left_out(devices: int, height: int) -> None:
    shares = plan(devices, height, True)
    without = plan(devices, height)
    assert not without.has_contents
    heading = 1 + shares.gap if shares.listed else 0
    used = shares.listed + heading + 1 + (1 + shares.gap) + (4 + shares.gap) + 2
    used += (shares.has_fullness + shares.has_contents) * (3 + shares.gap)
    assert not shares.has_contents or height - used >= 8
    if height >= 40:
        assert shares.has_contents and shares.has_fullness


async def test_without_block_characters_plain_ones_stand_for_them():
    device = await two_readings()
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=80, height=24,
                      force_terminal=True, color_system=None)
    console.print(screen([device], View(), 1.0, 80, 24), end="")
    console.file.flush()
    text = console.file.buffer.getvalue().decode("ascii")
    assert "<= 4.1 us ##################" in text and "#####" in text.split("memory ")[-1]


async def test_a_wide_screen_has_the_size_classes():
    text = drawn([await two_readings()], width=120, height=40, color_system=None)
    assert "class  objects" in text and len(text.splitlines()) == 40
    assert "class  objects" not in drawn([await two_readings()], color_system=None)


async def test_no_colour_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch):
    device = await two_readings()
    assert "\x1b[32m" in drawn([device], color_system="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    plain = drawn([device], color_system="standard")
    assert not [code for code in ("\x1b[32m", "\x1b[31m", "\x1b[1;31m") if code in plain]
    assert "ready" in plain


async def test_errors_are_words_with_what_is_new():
    device = made()
    await device.start()
    first = reading(device, 1.0)
    store = device._lane.store
    store.set_mem_limit(PAGE)
    for page in range(3):
        with pytest.raises(OSError, match="No space"):
            store.write(page * PAGE, os.urandom(PAGE) if page else os.urandom(2 * PAGE))
    shown = on(first, reading(device, 2.0, protocol_errors=2))
    failed = store.stats().failed_writes
    assert errors(shown) == {"failed writes": (failed, failed), "protocol errors": (2, 2)}
    text = drawn([shown], color_system=None)
    assert f"errors {failed} failed writes (+{failed}), 2 protocol errors (+2)" in text


async def test_what_only_some_devices_have_is_shown_where_it_is():
    device = made()
    await device.start()
    plain = metrics.openmetrics_text(device).decode()
    label = '{device="mnt-z0"'
    text = re.sub(rf"(zramfs_written_back_pages\{label}\}}) 0.0", r"\1 1200", plain)
    for state, value in (("ready", 48 << 20), ("target", 64 << 20)):
        text = text.replace(f'zramfs_reserve_bytes{label},state="{state}"}} 0.0',
                            f'zramfs_reserve_bytes{label},state="{state}"}} {value}')
    shown, without = (drawn([on(Reading(1.0, scrape.parse_metrics(each, "x")))], height=40, color_system=None)
                      for each in (text, plain))
    for words in ("1200 pages written back", "48M of 64M, 0 misses"):
        assert words in shown, shown
        assert words not in without, without


async def test_several_devices_are_a_list_and_one_in_full():
    one = await two_readings()
    device = made(size=0)
    many = [one, *(on(reading(device, 1.0), name=f"device-{n}") for n in range(8))]
    many[3].state = "it has ended"
    text = drawn(many, chosen=3, color_system=None)
    assert re.search("^> +device-2 ", text, re.MULTILINE)
    assert "it has ended" in text and "device-2 on /mnt/device-2" in text
    assert "not set up: it has no size yet" in text and "another device" in text
    assert "no pool yet" in drawn(many, chosen=3, height=30, color_system=None)
    assert len(text.splitlines()) == 24
    assert "No zramfs device of yours is there" in drawn([], color_system=None)


@SIZES
@pytest.mark.parametrize("state, words", [
    ("dead", "The daemon is dead, and its data is lost. `zramfs stop /mnt/r` cleans up."),
    ("not read yet", "No figures have come from it yet."),
    ("it has ended", "No figures have come from it yet."),
])
def test_a_device_without_a_sample_is_explained(columns: int, lines: int, state: str, words: str) -> None:
    never = Watched(Place(Path("/run/zramfs/r/tree"), "r", "/mnt/r"))
    never.state = state
    shown = picture([never], columns, lines)
    tree = ["its", "files", "in", "/run/zramfs/r/tree"] if columns > 80 else []
    assert shown[0].split() == ["r", "on", "/mnt/r", *tree, *state.split()]
    assert shown[2] == words and not any(shown[3:-1]), "nothing else, and no box of rich's"
    assert shown[-1].startswith("every 1 s   q quits")


@SIZES
async def test_a_device_that_died_keeps_its_last_figures(columns: int, lines: int) -> None:
    device = await two_readings()
    device.state = "dead"
    shown = picture([device], columns, lines)
    assert shown[1] == "The daemon is dead, and its data is lost. `zramfs stop /mnt/mnt-z0` cleans up."
    assert shown[0].endswith(" dead") and any(line.startswith("read ") for line in shown)
    shown = picture([device, on(*device.readings, name="other")], columns, lines, chosen=1)
    [cells] = [line.split() for line in shown if re.match(" +mnt-z0 ", line)]
    assert cells[1 + (columns > 80):][:2] == ["-", "-"], "what it held, but no rates"
    assert cells[-1] == "dead"


@SIZES
@pytest.mark.parametrize("devices", [1, 2, 5, 6, 40])
async def test_every_part_has_room_whatever_the_number_of_devices(
    columns: int, lines: int, devices: int
) -> None:
    one = await two_readings()
    others = [on(*one.readings, name=f"device-{n}") for n in range(devices - 1)]
    shown = picture([*others, one], columns, lines, chosen=devices - 1)
    text = "\n".join(shown)
    for words in ("time they took", "I/O", "ratio", "memory", "compaction", "moved", "emptied", "returned",
                  "winnable", "errors none", "requests  "):
        assert words in text, f"{words}\n{text}"
    assert "<= 4.1 us" in text and "<= 131 us" in text and "inf" not in text, text
    listed = [line for line in shown if re.match("[> ] +(device-|mnt-z0)", line)]
    least, more = (0, 0) if devices == 1 else (min(devices, 5), min(devices, 6))
    assert len(listed) >= least
    assert [line.split()[1] for line in listed if line[0] == ">"] == ["mnt-z0"][:least]
    assert shown[-1].startswith("every 1 s   q quits")
    if lines > 24:
        assert "full up to" in text and len(listed) >= more, text


def test_one_line_of_a_histogram_stands_for_all() -> None:
    assert fitted({1.0: 5, 2.0: 0, 4.0: 2, math.inf: 0}, 1) == [("<= 4.0 s", 7)]
    assert fitted({1.0: 5, 2.0: 0, 4.0: 2, math.inf: 1}, 1) == [("any time", 8)]
    assert fitted({1.0: 5, 2.0: 0, 4.0: 0, math.inf: 0}, 1) == [("<= 1.0 s", 5)]


def test_text_that_is_not_ours():
    for text in ("", "x 1\n# EOF\n", "nonsense", '# TYPE a gauge\na{b="c"} 1\n# EOF\n', "a\n"):
        with pytest.raises(ZramfsError, match="somewhere/metrics does not read as OpenMetrics of zramfs"):
            scrape.parse_metrics(text, "somewhere/metrics")


def test_readings_of_files_come_and_go(tmp_path: Path):
    """A directory in place of a tree: what a reader meets whose device comes, is another, and goes."""
    device = Watched(Place(tmp_path, "z", str(tmp_path)))
    watched.poll_devices([device], 5)
    assert device.state == "it has ended" and device.rates is None
    (tmp_path / "metrics").write_bytes(metrics.openmetrics_text(made(size=0, name="mine")))
    watched.poll_devices([device], 5)
    assert (device.state, device.name) == ("ready", "mine")
    (tmp_path / "metrics").write_text("{}")
    watched.poll_devices([device], 5)
    assert "does not read as OpenMetrics" in device.state and len(device.readings) == 1
    (tmp_path / "metrics").unlink()
    os.mkfifo(tmp_path / "metrics")  # whose reader waits, as behind a server that hangs
    began = time.monotonic()
    watched.poll_devices([device], 0.1)
    assert time.monotonic() - began < 60 and "OpenMetrics" in device.state
    asked = device.reader._call
    device.reader._asked -= 7
    watched.poll_devices([device], 0.1)
    waited = re.fullmatch(r"no answer for (\d+) s", device.state)
    assert waited and int(waited[1]) >= 7
    assert device.reader._call is asked, "one read is under way, not two"
    with open(tmp_path / "metrics", "wb") as pipe:
        pipe.write(metrics.openmetrics_text(made(size=0)))
    watched.poll_devices([device], 5)
    assert device.ready
    device.reader.ask()
    device.close()
    assert device.reader._call is None


def test_nothing_counted_yet():
    assert percentile({}, 0.5) is None and fitted({}, 5) == []
    assert NO_LATENCY.count == 0
