# SPDX-License-Identifier: Apache-2.0
"""The command `units` of a device: what it takes, what it does, what shows it."""
from __future__ import annotations

import errno
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.support.backing_tools import backing_file
from tests.support.box import MIB, PAGE, Box
from tests.support.page_kinds import noise, prose
from zramfs.device import policies, postprocess
from zramfs.device.host_memory import HostMemory
from zramfs.device.postprocess import UnitArguments, parse_units
from zramfs.errors import ZramfsError
from zramfs.model.config import Algorithm
from zramfs.model.policy import Units
from zramfs.model.stats import Progress
from zramfs.tree import metrics
from zramfs.tree.memory_files import format_units
from zramfs.tree.state import control_text

BOTH = (Algorithm("lz4"), Algorithm("zstd", 3))


async def full(**more: object) -> Box:
    """32 groups that can become units, and one that can't."""
    box = await Box(**{"size": 8 * MIB, "algorithms": BOTH, **more}).start()
    for number in range(512):
        box.store.write(number * PAGE, prose(number % 100))
    for number in range(512, 528):
        box.store.write(number * PAGE, noise(number))
    return box


def holds(box: Box) -> bool:
    box.store.check(3)
    return box.store.read(0, 512 * PAGE) == b"".join(prose(number % 100) for number in range(512))


@pytest.mark.parametrize("text, wanted", [
    ("", UnitArguments()), ("idle=all", UnitArguments(marked=False)), ("idle=0x10", UnitArguments(age=16)),
    ("level=19", UnitArguments(level=19)), ("level=-7 idle=5", UnitArguments(age=5, level=-7)),
])
def test_what_units_takes(text: str, wanted: UnitArguments) -> None:
    assert parse_units(text) == wanted


@pytest.mark.parametrize("text, code, words", [
    ("idle", errno.EINVAL, "KEY=VALUE"), ("idle=soon", errno.EINVAL, "all or an age"),
    ("level=0", errno.EINVAL, "no level 0"), ("level=23", errno.ERANGE, "-7 to 22"),
    ("level=much", errno.EINVAL, "level takes"), ("color=red", errno.EINVAL, "idle= and level=, not"),
])
async def test_what_units_refuses(text: str, code: int, words: str) -> None:
    box = await full()
    with pytest.raises(ZramfsError, match=words) as caught:
        await box.device.command(f"units {text}")
    assert caught.value.errno == code
    assert box.store.stats().units == 0


async def test_units_are_made_of_marked_pages_of_old_ones_or_of_all() -> None:
    box = await full(access_times=True)
    await box.device.command("units")
    assert box.store.stats().unit_pages == 0
    await box.device.command("idle=all")
    box.store.read(0, 8 * PAGE)
    await box.device.command("units")
    assert box.store.stats().unit_pages == 504
    await box.device.command("units idle=3600")
    assert box.store.stats().unit_pages == 504, "nothing was unused for an hour"
    await box.device.command("units=idle=all level=9")
    assert box.store.stats().unit_pages == 512
    assert holds(box)


async def test_the_results_are_in_control_and_in_metrics_until_reset() -> None:
    box = await full()
    assert "units        none\n" in control_text(box.device.stats())
    await box.device.command("units idle=all")
    stats = box.device.stats()
    assert stats.unit_making.made == 32 and stats.unit_making.kept == 1
    saved = stats.unit_making.bytes_saved
    assert "units        32 of 512 pages in" in control_text(stats) and saved > 0
    assert re.search(r"saved in [\d.]+ m?s of CPU", control_text(stats)) and stats.unit_making.cpu_ns > 0
    text = metrics.openmetrics_text(box.device).decode()
    for line in ('units{device="z0"} 32.0', 'unit_places{device="z0",state="live"} 512.0',
                 'unit_making_total{device="z0",result="made"} 32.0',
                 f'unit_saved_bytes_total{{device="z0"}} {float(saved)}',
                 f'unit_making_cpu_seconds_total{{device="z0"}} {stats.unit_making.cpu_ns / 1e9}'):
        assert f"\nzramfs_{line}\n" in text
    await box.device.command("units idle=all")
    assert box.device.stats().unit_making.made == 32
    await box.device.command("reset")
    assert box.device.stats().unit_making.made == 0


async def test_units_without_a_size_and_on_a_device_that_wipes() -> None:
    box = await Box().start()
    with pytest.raises(ZramfsError, match="not set up") as caught:
        await box.device.command("units")
    assert caught.value.errno == errno.EINVAL
    box = await full(wipe=True)
    with pytest.raises(ZramfsError, match="wipes what is discarded") as caught:
        await box.device.command("units idle=all")
    assert caught.value.errno == errno.EINVAL
    box = await full()
    with pytest.raises(ZramfsError, match="access_times=on") as caught:
        await box.device.command("units idle=1")
    assert caught.value.errno == errno.EINVAL


async def test_recompression_beside_the_making_is_ebusy_and_a_reset_cuts_it_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(postprocess, "SLICE_NS", 1)
    box = await full()
    ended = []

    async def make() -> None:
        with pytest.raises(ZramfsError) as caught:
            await box.device.command("units idle=all level=19")
        ended.append(caught.value.errno)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(make)
        while box.device.stats().unit_making.groups == 0:
            await trio.sleep(0.001)
        with pytest.raises(OSError, match="making of units") as caught:
            await box.device.command("recompress")
        assert caught.value.errno == errno.EBUSY
        with pytest.raises(ZramfsError) as caught:
            await box.device.command("units")
        assert caught.value.errno == errno.EBUSY
        store = box.store
        await box.device.command("reset")
    assert ended == [errno.EINTR]
    with pytest.raises(ValueError, match="closed"):
        store.stats()


async def test_a_pool_without_room_for_any_unit_is_enomem() -> None:
    box = await full()
    box.store.set_mem_limit(PAGE)
    with pytest.raises(ZramfsError, match="no room") as caught:
        await box.device.command("units idle=all")
    assert caught.value.errno == errno.ENOMEM
    assert box.store.stats().units == 0 and holds(box)


# ---- by itself --------------------------------------------------------------------------------------

@asynccontextmanager
async def at_work(box: Box) -> AsyncIterator[None]:
    """With the task of the policies, which looks as often as it can."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(box.device.policies.run)
        yield
        nursery.cancel_scope.cancel()


async def until(true: Callable[[], bool]) -> None:
    """Bounded by the limit of the test alone."""
    while not true():
        await trio.sleep(0.005)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "UPKEEP_INTERVAL", 0.01)
    monkeypatch.setattr(policies, "UPKEEP_SHARE", 1.0)


async def test_units_with_dead_places_are_made_anew_without_a_command(quick: None) -> None:
    box = await full()
    await box.device.command("units idle=all")
    made = box.device.stats().unit_making.made
    for number in range(0, 512, 4):
        box.store.zero(number * PAGE, PAGE)
    before = box.store.stats()
    assert before.unit_dead == 128
    async with at_work(box):
        await until(lambda: box.store.stats().unit_dead == 0)
    now = box.store.stats()
    assert (now.units, now.unit_pages) == (32, 384)
    assert now.unit_bytes < before.unit_bytes - 128 * 500
    assert box.device.stats().unit_making.made == made + 32
    box.store.check(3)
    for number in range(512):
        assert box.store.read(number * PAGE, PAGE) == (prose(number % 100) if number % 4 else bytes(PAGE))


async def test_a_few_dead_places_are_left_where_they_are(quick: None) -> None:
    box = await full()
    await box.device.command("units idle=all")
    made = box.device.stats().unit_making
    box.store.zero(0, 7 * PAGE)
    async with at_work(box):
        await trio.sleep(0.2)
        assert box.device.stats().unit_making == made
        box.store.zero(7 * PAGE, 2 * PAGE)
        await until(lambda: box.store.stats().unit_dead == 0)


@pytest.mark.parametrize("line", ["reset", "end"])
async def test_a_reset_and_the_end_stop_upkeep_at_once(
    line: str, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the slice that is under way, which is one group here."""
    monkeypatch.setattr(postprocess, "SLICE_NS", 1)
    box = await full()
    await box.device.command("units idle=all")
    made = box.device.stats().unit_making.made
    for number in range(0, 512, 16):
        box.store.zero(number * PAGE, 9 * PAGE)
    store = box.store
    async with at_work(box):
        await until(lambda: box.device.stats().unit_making.made > made)
        if line == "reset":
            await box.device.command("reset")
        else:
            await box.device.close()
    with pytest.raises(ValueError, match="closed"):
        store.stats()


async def test_a_command_goes_before_upkeep_which_goes_on_afterwards(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = await full()
    await box.device.command("units idle=all")
    for number in range(0, 512, 16):
        box.store.zero(number * PAGE, 9 * PAGE)
    async with at_work(box):
        for _ in range(3):
            await box.device.command("recompress type=idle")
        await until(lambda: box.store.stats().unit_dead == 0)
    box.store.check(3)


async def test_the_policy_makes_units_of_what_is_idle_and_says_what_it_did() -> None:
    box = await full(access_times=True)
    work, done = box.device.policies._work, Progress()

    def did(progress: Progress) -> None:
        nonlocal done
        done += progress

    async def rest(took: float) -> None:
        await trio.lowlevel.checkpoint()

    await work.make_units_idle(Units(3600), did, rest)
    assert (done, box.store.stats().units) == (Progress(), 0), "nothing was unused for an hour"
    box.store.mark_idle()
    await work._post.make_units(box.store, UnitArguments(thorough=False))
    assert box.store.stats().units == 32
    # Those of the 33rd group were tried. Neither they nor the units are looked at again.
    box.store.mark_idle()
    before = box.device.stats().unit_making
    await work._post.make_units(box.store, UnitArguments(thorough=False))
    assert box.device.stats().unit_making == before
    assert holds(box)


async def test_a_policy_of_units_on_a_device_that_wipes_is_einval() -> None:
    box = await full(wipe=True)
    with pytest.raises(ZramfsError, match="wipes what is discarded") as caught:
        await box.device.command("policy=units idle=1h")
    assert caught.value.errno == errno.EINVAL
    assert all(each.policy is None for each in box.device.stats().policies)


async def test_what_is_left_of_worn_units_on_the_backing_store_comes_back_unless_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(policies, "UPKEEP_INTERVAL", 0.01)
    supply = ["short"]
    monkeypatch.setattr(HostMemory, "supply", property(lambda _: supply[0]))
    box = await full(writeback=backing_file(tmp_path / "back"))
    await box.device.command("units idle=all")
    await box.device.command("writeback=page_indexes=0-511")
    written = box.store.backing.stats().writes
    # Of each unit two pages are left.
    for group in range(32):
        box.store.zero((group * 16 + 2) * PAGE, 14 * PAGE)
    looked: list[int] = []
    run = box.device._post.return_worn_units

    async def return_worn_units(*args: object) -> object:
        looked.append(box.store.stats().written_back)
        return await run(*args)

    monkeypatch.setattr(box.device._post, "return_worn_units", return_worn_units)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(box.device.policies.run)
        await trio.sleep(0.1)
        assert box.store.stats().written_back == 64 and not looked
        supply[0] = "fair"
        with trio.fail_after(60):
            while box.store.backing.stats().used:
                await trio.sleep(0.01)
        await trio.sleep(0.1)
        assert looked == [64], "without a change there is no second look"
        nursery.cancel_scope.cancel()
    stats = box.device.stats()
    assert (stats.back_upkeep.units, stats.back_upkeep.pages) == (32, 64)
    assert stats.backing.writes == written and stats.store.written_back == 0
    assert "\nreturned_units 32\nreturned_pages 64\nreturn_cpu_ms " in format_units(stats)
    for group in range(32):
        for number in range(group * 16, group * 16 + 2):
            assert box.store.read(number * PAGE, PAGE) == prose(number % 100)
    await box.device.close()
