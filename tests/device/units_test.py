# SPDX-License-Identifier: Apache-2.0
"""The command `units` of a device: what it takes, what it does, what shows it."""
from __future__ import annotations

import errno

import pytest
import trio

from tests.support.box import MIB, PAGE, Box
from tests.support.page_kinds import noise, prose
from zramfs.device import postprocess
from zramfs.device.postprocess import UnitArguments, parse_units
from zramfs.errors import ZramfsError
from zramfs.model.config import Algorithm
from zramfs.tree import metrics
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
    text = metrics.openmetrics_text(box.device).decode()
    for line in ('units{device="z0"} 32.0', 'unit_places{device="z0",state="live"} 512.0',
                 'unit_making_total{device="z0",result="made"} 32.0',
                 f'unit_saved_bytes_total{{device="z0"}} {float(saved)}'):
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
