# SPDX-License-Identifier: Apache-2.0
"""What `zramfs top` makes of the readings of `metrics`: rates, percentiles, the screen."""
from __future__ import annotations

import dataclasses
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

from tests.support.fakes import FakeLane
from zramfs.device.device import Device
from zramfs.errors import ZramfsError
from zramfs.model.config import Algorithm, DeviceConfig
from zramfs.model.policy import Recompress, Writeback
from zramfs.model.stats import BUCKET_BOUNDS, NO_LATENCY, OPERATIONS, Latency
from zramfs.tree import metrics
from zramfs.views import scrape, watched
from zramfs.views.screen import Curve, amount, fitted, screen
from zramfs.views.watched import Rates, Reading, Watched, errors, percentile

PAGE = 4096


def latency(**requests: int) -> tuple[Latency, ...]:
    """read=N: N reads of 3 us; write=N: N writes of 100 us, and so on."""
    found = []
    for operation in OPERATIONS:
        n = requests.get(operation, 0)
        bucket, ns = {"read": (2, 3000), "write": (7, 100_000)}.get(operation, (10, 1_000_000))
        counts = [0] * (len(BUCKET_BOUNDS) + 1)
        counts[bucket] = n
        found.append(Latency(tuple(counts), n * ns))
    return tuple(found)


def made(size: int = 64 << 20, name: str = "mnt-z0", **more: object) -> Device:
    return Device(DeviceConfig(directory=Path(f"/mnt/{name}"), rundir=Path("/run/z0"), size=size, name=name,
                               **more), FakeLane())


def reading(device: Device, when: float, **counters: object) -> Reading:
    lane = device._lane
    lane.counters = dataclasses.replace(lane.counters, **counters)
    return Reading(when, scrape.parse(metrics.openmetrics_text(device).decode(), "metrics"))


def drawn(
    devices: list[Watched], *, width: int = 80, height: int = 24, chosen: int = 0, **how: object
) -> str:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, **how)
    with console.capture() as capture:
        console.print(screen(devices, chosen, 1.0, width), end="")
    return capture.get()


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


def on(*readings: Reading, name: str = "mnt-z0") -> Watched:
    device = Watched(Path(f"/mnt/{name}"), name)
    for each in readings:
        device.readings.append(each)
        device.ratios.append(each.ratio or 0.0)
    device.state = "ready"
    return device


async def two_readings(seconds: float = 2.0) -> Watched:
    device = made(mem_limit=32 << 20)
    await device.start()
    store = device._lane.store
    for page in range(400):
        store.write(page * PAGE, os.urandom(PAGE // 4).ljust(PAGE, b"z"))
    first = reading(device, 100.0, latency=latency(read=10, write=10), read_sectors=80)
    for page in range(0, 400, 3):
        store.zero(page * PAGE, PAGE)
    last = reading(device, 100.0 + seconds, latency=latency(read=2010, write=30), longest_us=2400,
                   read_sectors=80 + 2000 * 8, in_flight=3)
    return on(first, last)


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
        "time they took, last 2 s", "ratio over time", "compaction", "winnable", "resident", "full up to",
        "zspages", "errors none", "longest request 2.4 ms", "3 in hand", "every 1 s   q quits",
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


async def test_without_block_characters_plain_ones_stand_for_them():
    device = await two_readings()
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=80, height=24,
                      force_terminal=True, color_system=None)
    console.print(screen([device], 0, 1.0, 80), end="")
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
    shown = drawn([on(Reading(1.0, scrape.parse(text, "x")))], height=40, color_system=None)
    for words in ("1200 pages written back", "48M of 64M, 0 misses"):
        assert words in shown, shown
        assert words not in drawn([on(Reading(1.0, scrape.parse(plain, "x")))], height=40, color_system=None)


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
    never = Watched(Path("/mnt/never"), "never")
    assert "not read yet" in drawn([never], color_system=None)


def test_text_that_is_not_ours():
    for text in ("", "x 1\n# EOF\n", "nonsense", '# TYPE a gauge\na{b="c"} 1\n# EOF\n', "a\n"):
        with pytest.raises(ZramfsError, match="somewhere/metrics does not read as OpenMetrics of zramfs"):
            scrape.parse(text, "somewhere/metrics")


def test_readings_of_files_come_and_go(tmp_path: Path):
    """A directory in place of a tree: what a reader meets whose device comes, is another, and goes."""
    device = Watched(tmp_path, "z")
    watched.poll([device], 5)
    assert device.state == "it has ended" and device.rates is None
    (tmp_path / "metrics").write_bytes(metrics.openmetrics_text(made(size=0, name="mine")))
    watched.poll([device], 5)
    assert (device.state, device.name) == ("ready", "mine")
    (tmp_path / "metrics").write_text("{}")
    watched.poll([device], 5)
    assert "does not read as OpenMetrics" in device.state and len(device.readings) == 1
    (tmp_path / "metrics").unlink()
    os.mkfifo(tmp_path / "metrics")  # whose reader waits, as behind a server that hangs
    began = time.monotonic()
    watched.poll([device], 0.1)
    assert time.monotonic() - began < 10 and "OpenMetrics" in device.state
    asked = device._call
    device._asked -= 7
    watched.poll([device], 0.1)
    assert device.state == "no answer for 7 s" and device._call is asked, "one read is under way, not two"
    with open(tmp_path / "metrics", "wb") as pipe:
        pipe.write(metrics.openmetrics_text(made(size=0)))
    watched.poll([device], 5)
    assert device.ready
    device.ask()
    device.close()
    assert device._call is None


def test_nothing_counted_yet():
    assert percentile({}, 0.5) is None and fitted({}, 5) == []
    assert NO_LATENCY.count == 0
