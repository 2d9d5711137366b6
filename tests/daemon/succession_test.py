# SPDX-License-Identifier: Apache-2.0
"""What a daemon leaves in writing for the next one, and what it tells its keeper."""
from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import trio

from tests.support.fakes import FakeLane
from zramfs.daemon.keeper_line import Inherited, Kept
from zramfs.daemon.layouts import LAYOUTS
from zramfs.daemon.own_mount import OwnMount
from zramfs.daemon.papers import Papers, packed_config, unpacked_config
from zramfs.daemon.succession import NO_RESEND, SURVIVES, Succession
from zramfs.device.device import Device
from zramfs.device.mapped_memory import MappedMemory
from zramfs.device.takeover import restore, settings_of
from zramfs.host import memory_file
from zramfs.model.config import Algorithm, DeviceConfig
from zramfs.model.density import AUTO, Density
from zramfs.model.policy import Recompress, Units, Writeback

CONFIG = DeviceConfig(
    directory=Path("/mnt/z0"), rundir=Path("/run/zramfs/mnt-z0"), name="mnt-z0", size=1 << 30,
    algorithms=(Algorithm("zstd", 3, Path("/etc/dictionary")), Algorithm("lz4hc")), threads=4,
    mem_limit=1 << 20,
    policies=(Recompress(3600, "lz4hc"), Writeback(7200, 1 << 30)), keep_free=0, writeback=Path("/dev/null"),
    density=Density("auto", 20), mode=0o660, owner=1, group=2, standby=True, wipe=True, lock=True)


class FakeLine:
    """What is said to a keeper."""

    def __init__(self) -> None:
        self.said: list[object] = []
        self.on_mount = lambda: self.said.append("mounted")

    def keep(self, kept: Kept) -> None:
        self.said.append(("keep", kept.backing))

    def serving(self, survives: bool) -> None:
        self.said.append(("serving", survives))

    def forget_way_back(self) -> None:
        self.said.append("no way back")

    def ending(self) -> None:
        self.said.append("ending")

    async def watch(self) -> None:
        pass


@pytest.fixture
def papers():
    made = Papers(memory_file.new("papers"))
    yield made
    os.close(made.fd)


@pytest.mark.parametrize("config", [CONFIG, DeviceConfig()], ids=["all", "nothing"])
def test_a_description_comes_back_from_the_papers_as_it_was(papers: Papers, config: DeviceConfig) -> None:
    papers.write(packed_config(config))
    assert unpacked_config(Papers(papers.fd).read()) == config


def test_a_field_of_another_version_is_passed_over_or_has_its_default() -> None:
    packed = packed_config(CONFIG)
    packed["colour"] = "blue"
    del packed["wipe"]
    assert unpacked_config(packed).wipe is False


def test_papers_that_are_half_written_leave_the_ones_before(papers: Papers) -> None:
    assert papers.read() == {}
    papers.write({"number": 1})
    papers.write({"number": 2})
    before = os.pread(papers.fd, os.fstat(papers.fd).st_size, 0)
    papers.write({"number": 3, "more": "x" * 5000})
    after = os.pread(papers.fd, os.fstat(papers.fd).st_size, 0)
    # A kill after any part of the text, and before the eight bytes that say where it is.
    for end in (0, 1, 5000, 9000, len(after)):
        torn = before[:8] + after[8:end] + before[max(8, end):]
        os.pwrite(papers.fd, torn, 0)
        assert papers.read() == {"number": 2}
    os.pwrite(papers.fd, after, 0)
    assert papers.read()["number"] == 3


def succession(line: FakeLine | None, inherited: Inherited | None = None) -> Succession:
    mount = OwnMount("z0", Path("/nowhere"), {"fsname": "z0", "subtype": "zramfs"})
    return Succession(CONFIG, line, inherited, None, mount, mount)


@pytest.mark.parametrize("can_resend", [True, False])
def test_a_kernel_that_sends_nothing_again_is_told_of(
    can_resend: bool, caplog: pytest.LogCaptureFixture
) -> None:
    line, null = FakeLine(), os.open("/dev/null", os.O_RDWR)
    made = succession(line)
    kept = made.prepare(null)
    device = Device(DeviceConfig(), FakeLane(), kept.memory)
    assert "ends with its daemon" in device.stats().survival
    made.begin(device, can_resend)
    assert line.said == [("keep", None), ("serving", can_resend)]
    assert device.stats().survival == (SURVIVES if can_resend else NO_RESEND)
    assert ("older than 6.9" in caplog.text) is not can_resend
    for fd in kept.fds():
        os.close(fd)


@pytest.mark.parametrize("layouts, can_go_back", [
    (LAYOUTS, True), ({**LAYOUTS, "store": LAYOUTS["store"] - 1}, False), (None, False)])
def test_a_version_that_may_not_read_what_this_one_writes_is_not_to_follow(
    layouts: dict[str, int] | None, can_go_back: bool
) -> None:
    """As the keeper would have it, after an upgrade to this one that does not hold."""
    line, null = FakeLine(), os.open("/dev/null", os.O_RDWR)
    kept = Kept.new(null, unswapped=False)
    made = succession(line, Inherited(kept, {} if layouts is None else {"layouts": layouts}))
    device = Device(DeviceConfig(), FakeLane(), kept.memory)
    made.begin(device, True)
    before = [] if can_go_back else ["no way back"]
    assert line.said == [*before, ("keep", None), ("serving", True)]
    for fd in kept.fds():
        os.close(fd)


async def test_a_command_is_written_down_before_it_is_answered() -> None:
    line = FakeLine()
    made = succession(line)
    kept = made.prepare(os.open("/dev/null", os.O_RDWR))
    device = Device(DeviceConfig(), FakeLane(), kept.memory)
    made.begin(device, True)
    await device.command("proactiveness=77")
    assert Papers(kept.papers).read()["settings"]["proactiveness"] == 77
    await device.command("policy=writeback idle=1h limit=1G")
    assert Papers(kept.papers).read()["settings"]["policies"] == ["writeback idle=1h limit=1G"]
    said = len(line.said)
    made.write()
    assert len(line.said) == said, "nothing has changed"
    made.tree_mounted()
    assert line.said[-1] == "mounted"
    made.end()
    assert line.said[-1] == "ending"
    await device.command("proactiveness=1")
    assert Papers(kept.papers).read() == {}, "nobody is to take over"
    for fd in kept.fds():
        os.close(fd)


async def test_a_successor_has_the_policies_of_its_predecessor() -> None:
    device = Device(DeviceConfig(size=1 << 20), FakeLane(), memory_file.new("zramfs"))
    await device.start()
    await device.command("policy=units idle=30min level=9")
    next_one = Device(DeviceConfig(), FakeLane(), device.memory_file)
    device.store.leave()
    await restore(next_one, json.loads(json.dumps(settings_of(device))), None, MappedMemory())
    assert [each.policy for each in next_one.policies.stats()] == [None, None, Units(1800, 9)]
    assert next_one.store.access_times
    next_one.store.close()
    os.close(device.memory_file)


async def test_a_successor_has_the_density_of_its_predecessor_and_that_of_an_older_version_none() -> None:
    device = Device(DeviceConfig(size=1 << 20, density=AUTO), FakeLane(), memory_file.new("zramfs"))
    await device.start()
    for text in ("max", "auto:20%", "off"):
        await device.command(f"density={text}")
        saved = json.loads(json.dumps(settings_of(device)))
        next_one = Device(DeviceConfig(density=AUTO), FakeLane())
        next_one.memory_file = memory_file.new("nothing")
        await restore(next_one, saved, None, MappedMemory())
        assert str(next_one.density.wanted) == text
        del saved["density"]
        await restore(next_one, saved, None, MappedMemory())
        assert str(next_one.density.wanted) == "off"
        os.close(next_one.memory_file)
    # The algorithm that density has brought is the store's, and so the successor's.
    next_one = Device(DeviceConfig(), FakeLane(), device.memory_file)
    device.store.leave()
    await restore(next_one, json.loads(json.dumps(settings_of(device))), None, MappedMemory())
    assert next_one.stats().algorithms[1] == Algorithm("zstd", 3) and next_one.store.access_times
    next_one.store.close()
    os.close(device.memory_file)


async def test_a_successor_saves_the_device_where_its_user_has_said() -> None:
    device = Device(DeviceConfig(keep=Path("/var/first")), FakeLane(), memory_file.new("zramfs"))
    for line, path in (("keep=/var/second", Path("/var/second")), ("keep=off", None)):
        await device.command(line)
        next_one = Device(DeviceConfig(keep=Path("/var/first")), FakeLane(), device.memory_file)
        await restore(next_one, json.loads(json.dumps(settings_of(device))), None, MappedMemory())
        assert next_one.kept_image.path == path
    os.close(device.memory_file)


def test_without_a_keeper_nothing_is_kept() -> None:
    made = succession(None)
    device = Device(DeviceConfig(), FakeLane())
    assert made.prepare(0) is None and made.tasks() == []
    made.begin(device, True)
    made.end()
    assert "ends with its daemon" in device.stats().survival


async def test_a_successor_saves_the_device_when_its_predecessor_would_have() -> None:
    """And not an interval later, or one that is killed more often is never saved."""
    device = Device(DeviceConfig(keep_every=3600), FakeLane(), memory_file.new("zramfs"))
    due, seen = time.monotonic() - 1.0, trio.Event()
    device.kept_image.due = due
    next_one = Device(DeviceConfig(keep_every=3600), FakeLane(), device.memory_file)
    await restore(next_one, json.loads(json.dumps(settings_of(device))), None, MappedMemory())
    assert next_one.kept_image.due == due

    async def save() -> None:
        seen.set()

    next_one.kept_image.save = save
    async with trio.open_nursery() as nursery:
        nursery.start_soon(next_one.kept_image.run)
        with trio.fail_after(60):
            await seen.wait()
        nursery.cancel_scope.cancel()
    os.close(device.memory_file)
