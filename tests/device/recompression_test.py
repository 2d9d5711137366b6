# SPDX-License-Identifier: Apache-2.0
"""Recompression, idle marks and block_state through the commands of a device; work that is cut short."""
from __future__ import annotations

import errno
import random
import time

import pytest
import trio

from tests.support.box import BY_NAME, MIB, PAGE, Box
from tests.support.page_kinds import block, hard, noise, prose
from zramfs.device import postprocess
from zramfs.errors import ZramfsError
from zramfs.model.config import Algorithm


@pytest.fixture
async def box() -> Box:
    return await Box().start()


# ---- recompress and idle ----------------------------------------------------------------------------------

THREE = (Algorithm("lz4"), Algorithm("lz4hc"), Algorithm("zstd", 9))


async def three(**more: object) -> Box:
    box = await Box(size=8 * MIB, algorithms=THREE, **more).start()
    box.store.write(0, b"".join([prose(1), hard(1), noise(1), bytes(PAGE)]))
    return box


@pytest.mark.parametrize("data, won", [
    ("", 1), ("priority=2", 2), ("algo=zstd", 2), ("algo=zstd priority=2", 2), ("type=huge algo=zstd", 1),
    ("type=idle", 0), ("type=huge type=huge_idle algo=zstd", 0), ("threshold=3000 algo=zstd", 0),
    ("max_pages=1 priority=2", 0), ("max_pages=0 priority=2\n", 0), ("color=red algo=zstd", 2),
])
async def test_recompress(data: str, won: int) -> None:
    box = await three()
    await box.write("recompress", data)
    stats = box.device.stats().recompression
    assert stats.won == won
    assert box.store.read(0, 4 * PAGE) == b"".join([prose(1), hard(1), noise(1), bytes(PAGE)])
    box.store.check(3)


@pytest.mark.parametrize("data, code, words", [
    ("priority=3", errno.EINVAL, "#1 lz4hc or #2 zstd; nothing has the priority 3"),
    ("priority=0", errno.EINVAL, "priority=1 to 3, got 0"),
    ("priority=4", errno.EINVAL, "got 4"),
    ("algo=lz4", errno.EINVAL, "#1 lz4hc or #2 zstd; got algo='lz4'"),
    ("algo=zstd priority=1", errno.EINVAL, "priority 1 is lz4hc"),
    ("threshold=3625", errno.EINVAL, "at most 3624"),
    ("threshold=-1", errno.EINVAL, "threshold takes"),
    ("threshold=4294967296", errno.ERANGE, "threshold takes"),
    ("max_pages=18446744073709551616", errno.ERANGE, "max_pages takes"),
    ("max_pages=many", errno.EINVAL, "max_pages takes"),
    ("type=nonsense algo=zstd", errno.EINVAL, "type=idle, huge or huge_idle, got 'nonsense'"),
    ("type=all", errno.EINVAL, "got 'all'"), ("idle", errno.EINVAL, "KEY=VALUE"),
    ("type=", errno.EINVAL, "KEY=VALUE"),
])
async def test_recompress_refuses(data: str, code: int, words: str) -> None:
    box = await three()
    assert await box.refused("recompress", data, words) == code
    assert box.device.stats().recompression.tried == 0


async def test_without_a_size_or_a_second_algorithm(box: Box) -> None:
    for name, data in (("recompress", ""), ("idle", "all")):
        assert await box.refused(name, data, "not set up") == errno.EINVAL
    with pytest.raises(ZramfsError):
        box.device.block_state(0, 4096)
    await box.write("disksize", "1M")
    assert await box.refused("recompress", "", "a secondary algorithm, and there is none") == errno.EINVAL


async def test_statistics_are_sums_until_reset() -> None:
    box = await three()
    await box.write("recompress", "priority=1")
    once = box.device.stats().recompression
    await box.write("recompress", "priority=2")
    stats = box.device.stats().recompression
    assert stats.tried == once.tried + 3 and stats.won == once.won + 2 and stats.incompressible == 1
    await box.device.command("reset")
    assert box.device.stats().recompression.tried == 0


@pytest.mark.parametrize("data", ["all", "all\n", "0", "0x0", "+00", "1\n", "0777"])
async def test_idle(data: str) -> None:
    box = await three(access_times=True)
    await trio.sleep(2.1 if data == "1\n" else 0)
    await box.write("idle", data)
    assert box.device.block_state(0, 4096)[0].count(b"i") == (0 if data == "0777" else 3)


@pytest.mark.parametrize("data", ["", "some", "-1", "1s", "08", "0x", "1 2", "18446744073709551616"])
async def test_idle_refuses(data: str) -> None:
    box = await three(access_times=True)
    assert await box.refused("idle", data) == errno.EINVAL


async def test_an_age_needs_access_times() -> None:
    box = await three()
    assert await box.refused("idle", "5", "access_times=on in control") == errno.EINVAL
    await box.device.command("access_times=on")
    await box.write("idle", "5")
    assert box.device.stats().access_times
    await box.device.command("access_times off")
    assert await box.refused("idle", "5") == errno.EINVAL


# ---- block_state ------------------------------------------------------------------------------------------

def lines(box: Box, slot: int = 0, room: int = 1 << 20) -> list[str]:
    return box.device.block_state(slot, room)[0].decode().splitlines()


async def test_block_state_is_the_kernels(box: Box) -> None:
    box = await three()
    assert lines(box) == [
        "           0            0.000000 ......", "           1            0.000000 ..h...",
        "           2            0.000000 ..h...", "           3            0.000000 s....."]
    await box.write("idle", "all")
    await box.device.command("access_times=on")
    box.store.read(0, PAGE)
    await box.write("recompress", "priority=2")
    now = int(time.clock_gettime(time.CLOCK_BOOTTIME))
    found = lines(box)
    assert [line[-6:] for line in found] == ["....r.", "....r.", "..h..n", "s....."]
    assert all(now - 60 <= int(line[13:25]) <= now and line[25:33] == ".000000 " for line in found)


async def test_block_state_in_pieces(box: Box) -> None:
    await box.write("disksize", "64M")
    stored = sorted(random.Random(1).sample(range(16384), 3000))
    for slot in stored:
        box.store.write(slot * PAGE, block("text", slot % 9, PAGE))
    for room in (40, 41, 100, 4096, 1 << 20):
        at, found = 0, []
        while True:
            data, following = box.device.block_state(at, room)
            if not data:
                break
            assert len(data) <= room and following > at and data.endswith(b"\n")
            found += [int(line.split()[0]) for line in data.splitlines()]
            at = following
        assert found == stored
    assert box.device.block_state(0, 39) == (b"", stored[0])
    assert lines(box, stored[-1])[0].split()[0] == str(stored[-1])
    assert lines(box, stored[-1] + 1) == lines(box, 1 << 60) == []


async def test_block_state_of_a_full_chunk_of_the_table(box: Box) -> None:
    """No room for the first line of a chunk must not be taken for its end."""
    await box.write("disksize", "64M")
    box.store.write(0, prose(1) * 1024)
    assert box.device.block_state(512, 10) == (b"", 512)
    assert len(lines(box)) == 1024


async def test_a_terabyte_without_pages_is_quick(box: Box) -> None:
    await box.write("disksize", "64T")
    began = time.monotonic()
    assert lines(box) == []
    assert time.monotonic() - began < 60


# ---- cut short --------------------------------------------------------------------------------------------

async def busy_box() -> Box:
    """With 16 MiB that take zstd 19 some seconds."""
    box = await Box(size=16 * MIB, algorithms=(Algorithm("lz4"), Algorithm("zstd", 19))).start()
    for slot in range(4096):
        box.store.write(slot * PAGE, prose(slot % 64))
    return box


async def test_reset_cuts_recompression_short() -> None:
    box = await busy_box()
    outcome: list[int] = []

    async def work() -> None:
        outcome.append(await box.outcome("recompress", ""))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        while box.device.stats().recompression.tried < 3:
            await trio.sleep(0.005)
        with trio.fail_after(60):
            await box.device.command("reset")
    assert outcome == [errno.EINTR]
    assert box.device.stats().disksize == 0
    # Nothing is left behind: the device is set up and recompressed again.
    await box.write("recomp_algorithm", "algo=zstd")
    await box.write("disksize", "1M")
    box.store.write(0, prose(1))
    await box.write("recompress", "")
    assert box.device.stats().recompression.won == 1


async def test_a_reset_that_is_refused_cuts_nothing_short() -> None:
    box = await busy_box()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(box.write, "recompress", "max_pages=200")
        while box.device.stats().recompression.tried < 3:
            await trio.sleep(0.005)
        box.lane.open_count = 1
        assert await box.refused("reset", "1", "disk is open") == errno.EBUSY
    assert box.device.stats().recompression.tried == 200
    box.store.check(3)


async def test_the_end_of_the_device_cuts_it_short() -> None:
    box = await busy_box()
    outcome: list[int] = []

    async def work(name: str, data: str) -> None:
        outcome.append(await box.outcome(name, data))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work, "recompress", "")
        while box.device.stats().recompression.tried < 3:
            await trio.sleep(0.005)
        nursery.start_soon(work, "idle", "all")
        with trio.fail_after(60):
            await box.device.close()
    assert sorted(outcome) in ([errno.EINTR, errno.EINTR], [errno.EINTR, errno.EINVAL])


async def test_the_loop_goes_on_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    box = await busy_box()
    monkeypatch.setattr(postprocess, "SLICE_NS", 1_000_000_000)
    outcome: list[int] = []

    async def work() -> None:
        outcome.append(await box.outcome("recompress", ""))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        turns = 0
        # It takes some seconds. With slices on the loop there would be one turn for each of them.
        while turns < 20 and not outcome:
            await trio.sleep(0.001)
            turns += 1
        assert turns == 20 and not outcome
        await box.device.command("reset")
    assert outcome == [errno.EINTR]


async def test_a_full_pool_says_what_to_do() -> None:
    box = await Box(size=4 * MIB, algorithms=(Algorithm("lz4"), Algorithm("zstd"))).start()
    for slot in range(200):
        box.store.write(slot * PAGE, hard(slot))
    await box.device.command(f"mem_limit={box.store.stats().mem_used_total // 2}")
    assert await box.refused("recompress", "", "the pool is full") == errno.ENOMEM
    await box.device.command("mem_limit=4M")
    await box.write("recompress", "")
    assert box.device.stats().recompression.won == 200


def test_formats() -> None:
    assert BY_NAME["debug_stat"].show(None) == "version: 1\n0        0\n"
    assert {name: BY_NAME[name].mode for name in (
        "algorithm_params", "recomp_algorithm", "recompress", "idle", "debug_stat")} == {
        "algorithm_params": 0o200, "recomp_algorithm": 0o644, "recompress": 0o200, "idle": 0o200,
        "debug_stat": 0o444}
