# SPDX-License-Identifier: Apache-2.0
"""The command `resize` on a device, without a mount."""
from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.support.fakes import FakeLane
from zramfs.device import size as sizes
from zramfs.device.device import Device
from zramfs.errors import ZramfsError
from zramfs.model.config import MAX_DISKSIZE, Algorithm, DeviceConfig
from zramfs.store.store import Store

MIB, GIB = 1 << 20, 1 << 30


async def started(**config: object) -> Device:
    device = Device(DeviceConfig(directory=Path("/mnt/z0"), rundir=Path("/run/z0"), **config), FakeLane())
    await device.start()
    device._lane.started = True
    return device


async def refused(device: Device, line: str) -> tuple[int, str]:
    with pytest.raises(ZramfsError) as failure:
        await device.command(line)
    return failure.value.errno, failure.value.strerror


async def test_a_device_in_use_becomes_larger_and_smaller() -> None:
    device = await started(size=4 * MIB)
    lane = device._lane
    lane.open_count = 2
    lane.store.write(0, b"front")
    await device.command("resize=64M")
    assert device.stats().disksize == lane.store.disksize == 64 * MIB
    await device.command("resize=5M")
    assert device.stats().disksize == 6 * MIB, "a multiple of 2 MiB"
    await device.command("resize=6M")
    assert lane.resized == [True, False], "the kernel is told of changes alone"
    assert lane.store.read(0, 5) == b"front"
    lane.store.write(5 * MIB, b"behind")
    number, said = await refused(device, "resize=4M")
    assert number == errno.ENOTEMPTY and "resize=4194304 discard" in said
    assert device.stats().disksize == 6 * MIB
    await device.command("resize=4M discard")
    assert (device.stats().disksize, device.stats().store.orig_data_size) == (4 * MIB, 4096)


async def test_sizes_that_no_device_has() -> None:
    device = await started(size=4 * MIB)
    most = sizes.LEAST_ROOM
    for size in ("0", str(most + 1), "1P"):
        number, said = await refused(device, f"resize={size}")
        assert number == errno.EINVAL and "1 to 68719476736 bytes (64G" in said
    for line in ("resize=4M drop", "resize=", "resize=4 apples"):
        assert (await refused(device, line))[0] == errno.EINVAL
    await device.command(f"resize={most}")
    assert device.stats().disksize == most
    empty = await started()
    assert (await refused(empty, "resize=4M"))[0] == errno.EINVAL


async def test_a_reset_forgets_the_room_of_the_old_size() -> None:
    device = await started(size=8 * GIB)
    await device.command(f"resize={8 * GIB * sizes.GROWTH}")
    await device.command("reset")
    await device.command("disksize=4M")
    assert (await refused(device, f"resize={8 * GIB * sizes.GROWTH}"))[0] == errno.EINVAL


async def test_policies_idle_marks_and_recompression_reach_into_the_new_part() -> None:
    device = await started(size=4 * MIB, algorithms=(Algorithm("lz4"), Algorithm("zstd")), access_times=True)
    await device.command("resize=64M")
    page = os.urandom(1024) * 4
    device._lane.store.write(63 * MIB, page * 256)
    await device.command("idle=all")
    await device.command("recompress=type=idle")
    assert device.stats().recompression.tried == 256
    assert device._lane.store.read(63 * MIB, MIB) == page * 256
    await device.command("resize=4M discard")
    await device.command("idle=all")
    await device.command("recompress")
    assert device.stats().recompression.tried == 256 and device.stats().store.orig_data_size == 0


def test_where_there_is_no_address_space_the_device_is_made_without_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def without_room(size: int, **arguments: object) -> Store:
        asked.append(arguments.get("grows_to"))
        if arguments.get("grows_to"):
            raise MemoryError("no address space")
        return Store(size, **arguments)

    monkeypatch.setattr(sizes, "Store", without_room)
    store = sizes.make_store(4 * MIB, reserve=0)
    assert asked == [sizes.LEAST_ROOM, None] and store.disksize == 4 * MIB
    with pytest.raises(ZramfsError, match="1 to 4194304 bytes"):
        sizes.change_size(store, FakeLane(), 8 * MIB, discard=False)
    store.close()


@pytest.mark.parametrize(("size", "room"), [
    (1, 64 * GIB), (4 * GIB, 64 * GIB), (5 * GIB, 80 * GIB), (MAX_DISKSIZE // 2, MAX_DISKSIZE)])
def test_the_room_of_a_device(size: int, room: int) -> None:
    assert sizes.room_for(size) == room


async def test_a_notification_that_fails_leaves_the_new_size(caplog: pytest.LogCaptureFixture) -> None:
    """The kernel asks for the attributes again after a second."""
    device = await started(size=4 * MIB)

    def fail(_larger: bool) -> None:
        raise OSError(errno.EIO, "the kernel refused the change of size")

    device._lane.notify_resize = fail
    await device.command("resize=8M")
    assert device.stats().disksize == 8 * MIB
    assert "a little later" in caplog.text
