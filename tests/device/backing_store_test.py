# SPDX-License-Identifier: Apache-2.0
"""The backing store of a device: its life from backing_dev to reset, the budget, and what cuts write-back
short."""
from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from tests.support.backing_tools import MIB, PAGE, backing_file
from tests.support.page_kinds import noise
from tests.support.unmounted import OK, Ours, device
from zramfs.device import backing_store
from zramfs.store.backing import Backing


async def backed(ours: Ours, path: Path, pages: int = 0, size: str = "64M", room: int = 64 * MIB) -> None:
    """A device with that many raw pages, and a backing file."""
    await ours.done(("zram/backing_dev", str(backing_file(path, room))), ("zram/disksize", size))
    for n in range(0, pages, 256):
        ours.store.write(n * PAGE, os.urandom(min(256, pages - n) * PAGE))


def bd_stat(ours: Ours) -> list[int]:
    return [int(word) for word in ours.read("zram/bd_stat").split()]


async def test_from_backing_dev_to_reset(tmp_path: Path) -> None:
    path = tmp_path / "back"
    async with device(tmp_path) as ours:
        assert ours.read("zram/backing_dev") == "none\n"
        assert ours.read("zram/bd_stat") == "       0        0        0\n"
        await backed(ours, path, 20)
        assert ours.read("zram/backing_dev") == f"{path}\n"
        await ours.done(("zram/writeback", "page_indexes=0-8"))
        assert ours.read("zram/bd_stat") == "       9        0        9\n"
        assert ours.read("zram/mm_stat").split()[:2] == [str(20 * PAGE), str(11 * PAGE)]
        ours.store.read(0, PAGE)
        assert bd_stat(ours) == [9, 1, 9]
        assert f"backing      {path}: 9 of 16384 blocks in use" in ours.read("control")
        assert path.stat().st_blocks
        await ours.done(("zram/writeback_limit", "7"), ("zram/writeback_limit_enable", "1"),
                        ("zram/writeback_batch_size", "3"), ("zram/reset", "1"))
        assert ours.read("zram/backing_dev") == "none\n" and bd_stat(ours) == [0, 0, 0]
        assert path.stat().st_blocks == 0, "its space is given back"
        Backing(str(path)).close()
        # As in the kernel, these outlive it.
        assert [ours.read(f"zram/{name}") for name in (
            "writeback_limit", "writeback_limit_enable", "writeback_batch_size")] == ["7\n", "1\n", "3\n"]
        await backed(ours, path, 1)
        assert await ours.write("zram/writeback", "idle") == OK


async def test_another_backing_dev_takes_the_place_of_the_first(tmp_path: Path) -> None:
    first, second = backing_file(tmp_path / "first"), backing_file(tmp_path / "second")
    async with device(tmp_path) as ours, device(tmp_path) as other:
        await ours.done(("zram/backing_dev", str(first)), ("zram/backing_dev", str(second)))
        assert await other.write("zram/backing_dev", str(second)) == "EBUSY"
        await other.done(("zram/backing_dev", str(first)))
        # A wrong one leaves what there is.
        assert await ours.write("zram/backing_dev", "/nonexistent") == "ENOENT"
        assert ours.read("zram/backing_dev") == f"{second}\n"
        await ours.done(("zram/disksize", "1M"))
        assert await ours.write("zram/writeback", "huge") == OK


async def test_a_disksize_that_fails_leaves_it(tmp_path: Path) -> None:
    async with device(tmp_path) as ours:
        await ours.done(("zram/backing_dev", str(backing_file(tmp_path / "back"))))
        await ours.done(("zram/comp_algorithm", "lz4hc"), ("zram/algorithm_params", "level=99"))
        assert await ours.write("zram/disksize", "1M") == "EINVAL"
        await ours.done(("zram/algorithm_params", "level=3"), ("zram/disksize", "1M"))
        ours.store.write(0, noise(1))
        await ours.done(("zram/writeback", "huge"))
        assert bd_stat(ours) == [1, 0, 1]


async def test_a_path_with_blanks_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/a b\xff"
    with open(path, "wb") as file:
        file.truncate(MIB)
    async with device(tmp_path) as ours:
        assert await ours.write("zram/backing_dev", path + b"\n") == OK
        assert ours.files["zram/backing_dev"].read() == path + b"\n"
        ours.read("control"), ours.read("metrics")


async def test_the_budget(tmp_path: Path) -> None:
    async with device(tmp_path) as ours:
        await backed(ours, tmp_path / "back", 30)
        await ours.done(("zram/writeback_limit_enable", "1"))
        assert await ours.write("zram/writeback", "huge") == "EIO"
        await ours.done(("zram/writeback", "idle"))      # nothing to do costs nothing
        await ours.done(("zram/writeback_limit", "10"))
        assert await ours.write("zram/writeback", "huge") == "EIO"
        assert bd_stat(ours)[0] == 10 and ours.read("zram/writeback_limit") == "0\n"
        assert "writeback_limit is used up after 10 pages" in ours.read("control")
        await ours.done(("zram/writeback_limit", "25"), ("zram/writeback", "huge"))
        assert bd_stat(ours)[0] == 30 and ours.read("zram/writeback_limit") == "5\n"
        ours.store.write(0, os.urandom(9 * PAGE))
        await ours.done(("zram/writeback_limit_enable", "0"), ("zram/writeback", "huge"))
        assert ours.read("zram/writeback_limit") == "5\n", "it is not counted while it is off"
        ours.store.check(3)


async def test_no_room(tmp_path: Path) -> None:
    async with device(tmp_path) as ours:
        await backed(ours, tmp_path / "back", 30, room=12 * PAGE)
        assert await ours.write("zram/writeback", "huge") == "ENOSPC"
        assert bd_stat(ours) == [12, 0, 12]
        assert "the backing store is full after 12 pages" in ours.read("control")
        ours.store.check(3)


@pytest.mark.parametrize("what", ["reset", "the end of the device"])
async def test_write_back_is_cut_short(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backing_store, "SLICE_NS", 100_000)
    async with device(tmp_path) as ours:
        await backed(ours, tmp_path / "back", 16384)
        await ours.done(("zram/writeback_batch_size", "1"))
        ends = []

        async def write_back() -> None:
            ends.append(await ours.write("zram/writeback", "huge"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write_back)
            while bd_stat(ours)[2] < 16:
                await trio.sleep(0.001)
            if what == "reset":
                await ours.done(("zram/reset", "1"))
            else:
                ours.device.end_jobs()
        assert ends == ["EINTR"]
        if what == "reset":
            assert ours.store is None and (tmp_path / "back").stat().st_blocks == 0
        else:
            written = bd_stat(ours)[2]
            assert 16 <= written < 16384
            assert ours.store.stats().written_back >= written - 2
            ours.store.check(2)
            assert await ours.write("zram/writeback", "huge") == "EINTR", "none begins any more"


async def test_neither_settings_nor_reads_wait_for_the_end_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backing_store, "SLICE_NS", 100_000)  # so that it has hundreds of steps
    async with device(tmp_path) as ours:
        await backed(ours, tmp_path / "back", 4096)
        ends = []

        async def write(name: str, text: str) -> None:
            ends.append((name, await ours.write(f"zram/{name}", text)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, "writeback", "huge")
            await trio.sleep(0)
            nursery.start_soon(write, "writeback_limit", "5")
            ours.read("control"), ours.read("metrics"), bd_stat(ours)
        assert ends == [("writeback_limit", OK), ("writeback", OK)]


async def test_freed_blocks_become_holes_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backing_store, "TRIM_PAUSE", 0.01)
    async with device(tmp_path) as ours, trio.open_nursery() as nursery:
        nursery.start_soon(ours.device.backing_store.run)
        await backed(ours, tmp_path / "back", 8192)
        await ours.done(("zram/writeback", "huge"))
        ours.store.zero(PAGE, 8190 * PAGE)
        with trio.fail_after(60):
            while ours.device.stats().backing.stale:
                await trio.sleep(0.01)
        assert (tmp_path / "back").stat().st_blocks * 512 < 10 * PAGE
        ours.store.check(3)
        await ours.done(("zram/reset", "1"))
        await trio.sleep(0.05)
        nursery.cancel_scope.cancel()
