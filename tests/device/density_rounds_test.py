# SPDX-License-Identifier: Apache-2.0
"""What density makes of the pages of a device, without a mount, and the command that sets it."""
from __future__ import annotations

import errno
import functools
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio

from tests.support.box import MIB, Box
from tests.support.memory_file import MemoryFile
from tests.support.page_kinds import noise, prose, record
from tests.support.unit_tools import unit_of
from zramfs.device import density, postprocess
from zramfs.errors import ZramfsError
from zramfs.model.config import Algorithm
from zramfs.model.density import AUTO, OFF, Density
from zramfs.model.policy import Units
from zramfs.model.stats import DensityStats
from zramfs.tree import metrics
from zramfs.tree.state import control_text

MAX = Density("max")


@functools.cache
def content() -> bytes:
    """Pages of prose, each of which differs from its neighbours; 32 that are equal; some that do not
    compress."""
    return b"".join([*map(prose, range(480)), *[prose(7)] * 32, *map(noise, range(16))])


@pytest.fixture(autouse=True)
def every_page_is_old_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second after its last use. The steps come as fast as they can."""
    monkeypatch.setattr(density, "MAX_AGE", 0.0)
    monkeypatch.setattr(density, "AGES", dict.fromkeys(density.AGES, 0.0))
    monkeypatch.setattr(density, "INTERVALS", {"auto": 0.02, "max": 0.02})
    monkeypatch.setattr(density, "MIN_INTERVAL", 0.01)


@asynccontextmanager
async def running(**config: object) -> AsyncIterator[Box]:
    """All pages are old for the first round, so that no step finds what the one before it has not seen."""
    box = await Box(size=8 * MIB, access_times=True, **config).start()
    box.store.write(0, content())
    written = int(time.clock_gettime(time.CLOCK_BOOTTIME))
    # 0.1 s more: the store's clock goes in steps of up to 10 ms.
    while time.clock_gettime(time.CLOCK_BOOTTIME) < written + 1.1:
        await trio.sleep(0.05)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(box.device.density.run)
        yield box
        nursery.cancel_scope.cancel()
    await box.device.close()


async def rest(box: Box) -> DensityStats:
    """Waits until nothing is left to do."""
    with trio.fail_after(300):
        while not (found := box.device.stats().density).is_resting:
            await trio.sleep(0.02)
    return found


def holds(box: Box) -> bool:
    box.store.check(3)
    return box.store.read(0, len(content())) == content()


async def test_max_makes_a_device_dense_and_comes_to_rest() -> None:
    """The bytes stay, and the idle marks of a user do, too. Units leave nothing for recompression to win."""
    async with running(density=MAX) as box:
        before = box.store.stats()
        box.store.mark_idle()
        done = await rest(box)
        after = box.store.stats()
        assert after.units > 0 and after.shared_pages >= 32
        assert after.compr_data_size < 0.7 * before.compr_data_size
        for name, step in done.steps.items():
            assert step.rounds > 0, name
            # A dictionary needs more pages than this device has.
            assert (step.pages > 0 and step.cpu_seconds > 0) != (name == "dictionaries"), name
            assert (step.bytes > 0) == (name in ("share", "units")), name
        assert done.lacks is done.last_error is None
        assert box.device.stats().algorithms[1] == Algorithm("zstd", 9)
        text = metrics.openmetrics_text(box.device).decode()
        for line in ('density_mode{device="z0",mode="max"} 1.0', 'density_mode{device="z0",mode="off"} 0.0',
                     'density_resting{device="z0"} 1.0',
                     f'density_pages_total{{device="z0",step="units"}} {float(done.steps["units"].pages)}',
                     f'density_saved_bytes_total{{device="z0",step="share"}} '
                     f'{float(done.steps["share"].bytes)}',
                     f'density_cpu_seconds_total{{device="z0",step="recompress"}} '
                     f'{done.steps["recompress"].cpu_seconds}'):
            assert f"\nzramfs_{line}\n" in text
        await trio.sleep(0.3)
        assert box.device.stats().density == done, "it has come to rest"
        assert holds(box)


async def test_what_auto_has_packed_is_packed_better_when_the_mode_becomes_max_and_once(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    # The level makes a tenth of them.
    monkeypatch.setattr(sys.modules[__name__], "content", lambda: b"".join(map(record, range(256))))
    async with running(density=Density("auto", 100)) as box:
        await rest(box)
        before = box.store.stats()
        file = MemoryFile(box.store.migration.arena.fileno())
        assert before.units > 0 and unit_of(file, 0).level == 3
        await box.device.command("density=max")
        await rest(box)
        after = box.store.stats()
        assert unit_of(file, 0).level == 9
        assert (after.units, after.unit_pages) == (before.units, before.unit_pages)
        assert after.unit_bytes < before.unit_bytes
        for mode in ("auto:100%", "max"):
            made = box.device._post.units.made
            await box.device.command(f"density={mode}")
            await rest(box)
            assert box.device._post.units.made == made
        assert holds(box)


async def test_a_device_in_use_without_a_secondary_algorithm_gets_one() -> None:
    """It is told to whoever takes over, and stays when density is off again."""
    told: list[Algorithm | None] = []
    async with running() as box:
        device = box.device
        assert "density      off\n" in control_text(device.stats())
        assert device.stats().algorithms[1] is None
        device.on_change = lambda: told.append(device.stats().algorithms[1])
        await device.command("density=max")
        done = await rest(box)
        assert done.lacks is done.last_error is None
        assert done.steps["recompress"].rounds > 0 and done.steps["recompress"].pages > 0
        assert box.store.stats().units > 0 and box.store.stats().shared_pages >= 32
        assert device.stats().algorithms[1] == told[-1] == Algorithm("zstd", 9)
        codec, *none = box.store.codecs[1:]
        assert (codec.algo, codec.level, none) == ("zstd", 9, [None, None])
        assert not any(box.store.generations), "nothing drops it"
        await device.command("density=off")
        await device.command("recompress=algo=zstd")
        assert holds(box)


async def test_a_device_whose_own_algorithm_is_as_good_recompresses_nothing_and_says_so() -> None:
    async with running(algorithms=(Algorithm("zstd", 9),)) as box:
        await box.device.command("density=max")
        done = await rest(box)
        sentence = "pages are not recompressed, as they were compressed with what density would take"
        assert done.lacks == sentence
        assert done.steps["recompress"].rounds == 0
        assert box.store.stats().units > 0 and box.store.stats().shared_pages >= 32
        text = control_text(box.device.stats())
        assert "\ndensity      max; recompress: 0 pages" in text and "density would take\n" in text
        assert holds(box)


async def test_a_device_that_wipes_has_no_units_and_says_so() -> None:
    async with running(density=MAX, wipe=True) as box:
        done = await rest(box)
        assert done.lacks == "no units are made, as this device wipes what is discarded at once"
        assert box.store.stats().units == 0 and box.store.stats().shared_pages >= 32
        assert done.steps["recompress"].bytes > 0
        assert holds(box)


async def test_density_keeps_access_times() -> None:
    box = await Box(size=MIB).start()
    assert not box.store.access_times
    await box.device.command("density=auto")
    assert box.store.access_times
    await box.device.close()
    box = await Box(size=MIB, density=AUTO).start()
    assert box.store.access_times
    await box.device.close()


@pytest.mark.parametrize(("algorithms", "wanted", "secondary"), [
    ([Algorithm("lz4")], AUTO, Algorithm("zstd", 3)), ([Algorithm("lz4")], MAX, Algorithm("zstd", 9)),
    ([Algorithm("lz4")], OFF, None), ([Algorithm("zstd")], AUTO, None), ([Algorithm("zstd", 1)], AUTO,
                                                                          Algorithm("zstd", 3)),
    ([Algorithm("zstd", 12)], MAX, None), ([Algorithm("lz4"), Algorithm("lz4hc")], MAX, Algorithm("lz4hc")),
])
async def test_density_brings_an_algorithm_where_nobody_has_chosen_one(
    algorithms: list[Algorithm], wanted: Density, secondary: Algorithm | None
) -> None:
    box = await Box(size=MIB, algorithms=tuple(algorithms), density=wanted).start()
    assert box.device.stats().algorithms[1:] == (secondary, None, None)
    assert [codec and codec.algo for codec in box.store.codecs[1:]] == [
        secondary and secondary.name, None, None]
    await box.device.close()


async def test_the_algorithm_comes_with_the_size_and_goes_with_a_reset() -> None:
    box = await Box(density=MAX).start()
    assert box.device.stats().algorithms[1] is None
    await box.device.command("density=auto:20%")
    await box.device.command("disksize=1M")
    assert box.device.stats().algorithms[1] == Algorithm("zstd", 3)
    assert str(box.device.density.wanted) == "auto:20%"
    await box.device.command("reset")
    assert box.device.stats().algorithms[1] is None
    assert box.device.stats().density == DensityStats()
    await box.device.close()


async def test_the_highest_priority_recompresses() -> None:
    chosen = (Algorithm("lz4"), Algorithm("lz4hc"), Algorithm("zstd", 5))
    async with running(density=MAX, algorithms=chosen, wipe=True) as box:
        await rest(box)
        assert box.device.stats().algorithms == (*chosen, None)
        # What zstd has made is eligible for no recompression, not even with a threshold of nothing.
        tried = box.device.stats().recompression.tried
        await box.device.command("recompress priority=2")
        again = box.device.stats().recompression
        assert tried > 400 and again.tried == tried


async def test_a_reset_cuts_a_step_short_and_switches_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postprocess, "SLICE_NS", 1)
    async with running(density=Density("auto", 100)) as box:
        with trio.fail_after(300):
            while box.device.stats().density.steps["recompress"].pages == 0:
                await trio.sleep(0.001)
        store = box.store
        await box.device.command("reset")
        assert box.device.stats().density == DensityStats()
        with pytest.raises(ValueError, match="closed"):
            store.stats()


async def test_upkeep_has_the_level_of_density_where_no_policy_says_another() -> None:
    box = await Box(size=MIB, density=MAX).start()
    assert box.device.policies.unit_level() == 9
    await box.device.command("density=auto")
    assert box.device.policies.unit_level() == 3
    await box.device.command("density=off")
    assert box.device.policies.unit_level() is None
    await box.device.command("policy=units idle=1h")
    assert Units(3600) in [each.policy for each in box.device.policies.stats()]
    await box.device.close()


@pytest.mark.parametrize("text", ["density", "density=on", "density=auto:0", "density=max:10%"])
async def test_what_the_command_refuses(text: str) -> None:
    box = await Box(size=MIB, density=AUTO).start()
    with pytest.raises(ZramfsError) as caught:
        await box.device.command(text)
    assert caught.value.errno == errno.EINVAL
    assert box.device.density.wanted == AUTO
    await box.device.close()


async def test_without_access_times_a_step_says_what_is_missing() -> None:
    async with running(density=MAX) as box:
        await box.device.command("access_times=off")
        # Used, so that there is something to look for even if it has come to rest before that.
        box.lane.counters = replace(box.lane.counters, read_ios=1)
        with trio.fail_after(300):
            while box.device.stats().density.last_error is None:
                await trio.sleep(0.02)
        assert "access times are not kept" in box.device.stats().density.last_error
        await box.device.command("density=max")
        assert (await rest(box)).last_error is None
        assert holds(box)
