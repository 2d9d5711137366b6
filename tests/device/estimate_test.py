# SPDX-License-Identifier: Apache-2.0
"""The command `estimate` of a device: what it takes, what it leaves in memory/estimate, how it is cut
short."""
from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.support.box import MIB, Box
from tests.support.mixed_pages import mixed
from zramfs.device import estimator
from zramfs.device.commands import parse
from zramfs.device.device import Device
from zramfs.errors import ZramfsError
from zramfs.model.config import Algorithm
from zramfs.model.contents import STEPS
from zramfs.store.estimate import Estimating
from zramfs.tree.files import tree_of

BOTH = (Algorithm("lz4"), Algorithm("zstd", 9))


async def filled(**more: object) -> Box:
    box = await Box(**{"size": 8 * MIB, "algorithms": BOTH, **more}).start()
    box.store.write(0, mixed(1024, 3))
    return box


def shown(device: Device, name: str) -> dict[str, int]:
    root = tree_of(device, Path("/run/z0/disk"))
    memory = next(node for node in root.children if node.name == "memory")
    text = next(node for node in memory.children if node.name == name).read().decode()
    return {key: int(value) for key, value in (line.split() for line in text.splitlines())}


@pytest.mark.parametrize("text, size", [
    ("estimate", 64 * MIB), ("estimate=1M", MIB), ("estimate 1G", 1 << 30), ("estimate=1048576", MIB)])
def test_what_estimate_takes(text: str, size: int) -> None:
    command, value = parse(text)
    assert command.value(value) == size


@pytest.mark.parametrize("text", ["0", "1023K", "1025M", "-1", "some", "8E", str(1 << 63)])
async def test_what_estimate_refuses(text: str) -> None:
    box = await filled()
    with pytest.raises(ZramfsError) as caught:
        await box.device.command(f"estimate={text}")
    assert caught.value.errno == errno.EINVAL
    assert shown(box.device, "estimate") == {}


async def test_what_it_finds_is_what_the_commands_then_make_of_the_device() -> None:
    """Within 10 %, as of a sample; the sample here is all there is."""
    box = await filled()
    await box.device.command("compact objects")
    await box.device.command("estimate")
    found = shown(box.device, "estimate")
    stats = box.store.stats()
    assert (found["data"], found["memory"]) == (stats.orig_data_size, stats.mem_used_total)
    assert found["taken_at"] > 1_700_000_000 and found["own_ns"] > 0 and found["cpu_ns"] > 0
    now = shown(box.device, "contents")
    assert not any(now[f"step_{step}_pages"] for step in STEPS)
    for command in ("recompress", "share idle=all", "units idle=all level=9", "compact objects"):
        await box.device.command(command)
    assert box.store.stats().mem_used_total == pytest.approx(found["after"], rel=0.1)
    now = shown(box.device, "contents")
    won = sum(now[f"step_{step}_bytes_saved"] for step in STEPS)
    assert won > 0.8 * found["saved"]
    await box.device.command("estimate=2M")
    assert shown(box.device, "estimate")["memory"] == box.store.stats().mem_used_total


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Holds estimates in their first slice until it is set."""
    found = threading.Event()

    class Held(Estimating):
        def step(self, ns: int) -> bool:
            assert found.wait(60)
            return super().step(ns)

    monkeypatch.setattr(estimator, "Estimating", Held)
    yield found
    found.set()


async def wait_begun(box: Box) -> None:
    while not box.device.jobs._running:
        await trio.sleep(0.001)


async def test_a_second_estimate_is_refused_and_other_work_goes_on_beside_it(gate: threading.Event) -> None:
    box = await filled()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(box.device.command, "estimate")
        await wait_begun(box)
        with pytest.raises(ZramfsError) as caught:
            await box.device.command("estimate")
        assert caught.value.errno == errno.EBUSY
        await box.device.command("mem_used_max=0")
        await box.device.command("share idle=all")
        assert box.store.stats().shared_pages and not shown(box.device, "estimate")
        gate.set()
    assert shown(box.device, "estimate")["shared_pages"] == box.store.stats().shared_pages
    box.store.check(3)


async def test_reset_cuts_it_short_and_forgets_the_last_one(gate: threading.Event) -> None:
    box = await filled()
    gate.set()
    await box.device.command("estimate=1M")
    assert shown(box.device, "estimate")
    gate.clear()
    refused: list[int | None] = []

    async def estimate() -> None:
        with pytest.raises(ZramfsError) as caught:
            await box.device.command("estimate")
        refused.append(caught.value.errno)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(estimate)
        await wait_begun(box)
        nursery.start_soon(box.device.command, "reset")
        while not box.device.jobs._reasons:
            await trio.sleep(0.001)
        gate.set()
    assert refused == [errno.EINTR]
    assert shown(box.device, "estimate") == {} == shown(box.device, "contents")
