# SPDX-License-Identifier: Apache-2.0
"""The commands of `control` and what they do to a device, without a mount."""
from __future__ import annotations

import errno
import logging
import os
import random
import re
from pathlib import Path

import pytest
import trio

from tests.support.fakes import FakeLane
from zramfs.device import commands
from zramfs.device.device import Device
from zramfs.errors import ZramfsError
from zramfs.model.config import Algorithm, DeviceConfig
from zramfs.text.sizes import format_size
from zramfs.tree import state

MIB = 1 << 20


def make_device(**config) -> tuple[Device, FakeLane]:
    lane = FakeLane()
    here = Path("/mnt/z0")
    rundir = Path("/run/zramfs/mnt-z0")
    return Device(DeviceConfig(directory=here, rundir=rundir, name="z0", **config), lane), lane


async def started(**config) -> tuple[Device, FakeLane]:
    device, lane = make_device(**config)
    await device.start()
    lane.started = True
    return device, lane


async def refused(device: Device, line: str) -> tuple[int, str]:
    """errno and sentence; what the device says of itself must be the same."""
    before = device.stats()
    with pytest.raises(ZramfsError) as caught:
        await device.command(line)
    after = device.stats()
    assert caught.value.sentence in after.last_error
    assert (after.disksize, after.algo, after.level, after.mem_limit) == (
        before.disksize, before.algo, before.level, before.mem_limit)
    return caught.value.errno, caught.value.sentence


def test_lines_are_stripped_and_comments_left_out():
    assert commands.lines(b"") == []
    assert commands.lines(b"compact") == ["compact"]
    text = b"# a comment\n\n  mem_limit=2G  \r\n\t\n #x\ncompact\n"
    assert commands.lines(text) == ["mem_limit=2G", "compact"]
    # Only the newline ends a line: these are what str.splitlines() would split at as well.
    assert commands.lines("a\x0bb\x85c\u2028d".encode()) == ["a\x0bb\x85c\u2028d"]
    assert commands.lines(b"compact\n" * 512) == ["compact"] * 512


@pytest.mark.parametrize("data, code, words", [
    (b"#" * 4097, errno.E2BIG, ["4096", "4097"]),
    (b"compact\n\0", errno.EINVAL, ["NUL", "8"]),
    (b"compact\n\xff\n", errno.EINVAL, ["UTF-8", "\\xff", "8"]),
])
def test_what_is_no_text_is_refused_whole(data, code, words):
    with pytest.raises(ZramfsError) as caught:
        commands.lines(data)
    assert caught.value.errno == code
    assert all(word in caught.value.sentence for word in words), caught.value.sentence


@pytest.mark.parametrize("line, name, value", [
    ("compact", "compact", ""), ("disksize=4G", "disksize", "4G"), ("disksize = 4G", "disksize", "4G"),
    ("comp_algorithm=zstd:3", "comp_algorithm", "zstd:3"), ("mem_limit=a=b", "mem_limit", "a=b"),
])
def test_parse(line, name, value):
    command, found = commands.parse(line)
    assert (command.name, found) == (name, value)


@pytest.mark.parametrize("line, words", [
    ("compct", ["unknown command 'compct'", *(command.usage for command in commands.COMMANDS.values())]),
    ("Compact", ["unknown command"]),
    ("compact now", ["objects, pages or all", "'now'"]),
    ("reset 1", ["takes no value", "'1'"]),
    ("idle", ["needs a value"]),
    ("idle=-1", ["all or an age", "'-1'"]),
    ("access_times=maybe", ["on or off", "'maybe'"]),
    ("recompress", ["not set up"]),
    ("recompress idle", ["KEY=VALUE", "'idle'"]),
    ("=", ["unknown command"]),
    ("\x1b[2Jreset", ["unknown command '\\x1b"]),
    ("reset=1", ["takes no value", "'1'"]),
    ("reset=", ["takes no value"]),
    ("disksize", ["needs a value", "disksize=SIZE"]),
    ("disksize=", ["needs a value", "disksize=SIZE"]),
    ("disksize=4 apples", ["'4 apples'", "unknown unit"]),
    ("disksize=-1", ["'-1' is not a size"]),
    ("disksize=0", ["above 0"]),
    ("mem_limit=2GB", ["'2GB' is ambiguous"]),
    ("mem_used_max=1", ["0 only", "'1'"]),
    ("comp_algorithm=lzo", ["'lzo'", "lz4, lz4hc, zstd, none"]),
    ("comp_algorithm=zstd:99", ["99", "22"]),
    ("compact", ["not set up"]),
])
async def test_a_wrong_line_is_refused_with_a_reason(line, words):
    device, _ = make_device()
    code, sentence = await refused(device, line)
    assert code == errno.EINVAL
    assert all(word in sentence for word in words), sentence


async def test_every_command_does_what_it_says():
    device, lane = await started()
    await device.command("comp_algorithm=zstd:7")
    await device.command("mem_limit=1000000")
    await device.command("disksize=16M")
    stats = device.stats()
    assert (stats.disksize, stats.algo, stats.level, stats.mem_limit) == (16 * MIB, "zstd", 7, 1003520)
    assert (stats.store.mem_limit, lane.store.algo, lane.store.level) == (1003520, "zstd", 7)
    assert lane.size_notified == 1 and not lane.claimed

    lane.store.write(0, os.urandom(64 * 4096))
    lane.store.zero(0, 32 * 4096)
    assert device.stats().store.mem_used_max == 64 * 4096
    await device.command("mem_used_max=0")
    assert device.stats().store.mem_used_max == device.stats().store.mem_used_total == 32 * 4096
    await device.command("mem_limit=0")
    assert (device.stats().mem_limit, device.stats().store.mem_limit) == (0, 0)

    await device.command("reset")
    stats = device.stats()
    assert (stats.disksize, stats.mem_limit, stats.store) == (0, 0, None)
    assert (stats.algo, stats.level) == ("lz4", None)
    assert lane.store is None and lane.size_notified == 2 and not lane.claimed
    await device.command("disksize=8M")
    assert device.stats().store.orig_data_size == 0
    assert lane.store.read(0, 4096) == bytes(4096)
    assert device.stats().last_error is None


async def test_compact_frees_pages_and_keeps_the_data():
    device, lane = await started(size=32 * MIB)
    pages = random.Random(1)
    written = {number: pages.randbytes(1000) + bytes(3096) for number in range(4096)}
    for number, page in written.items():
        lane.store.write(number * 4096, page)
    kept = {number: page for number, page in written.items() if pages.random() < 0.3}
    for number in written.keys() - kept.keys():
        lane.store.zero(number * 4096, 4096)
    before = device.stats().store
    await device.command("compact")
    after = device.stats().store
    freed = before.mem_used_total - after.mem_used_total
    assert freed > before.mem_used_total / 3
    assert after.pages_compacted == freed // 4096
    assert all(lane.store.read(number * 4096, 4096) == page for number, page in kept.items())


async def test_settings_of_the_start():
    device, lane = await started(size=10000, algorithms=(Algorithm("zstd", 5),), mem_limit=4097)
    stats = device.stats()
    assert (stats.disksize, stats.algo, stats.level, stats.mem_limit) == (12288, "zstd", 5, 8192)
    assert lane.store.disksize == 12288
    # The level belonged to the configured algorithm.
    await device.command("reset")
    await device.command("comp_algorithm=lz4hc")
    assert device.stats().level == 9


@pytest.mark.parametrize("config, code, word", [
    ({"algorithms": (Algorithm("zstd", 23),)}, errno.EINVAL, "23"),
    ({"algorithms": (Algorithm("lzo"),)}, errno.EINVAL, "lzo"),
    ({"size": 1 << 60}, errno.ENOMEM, str(1 << 60)),
])
async def test_a_start_that_cannot_work_says_why(config, code, word):
    device, lane = make_device(**{"size": MIB, **config})
    with pytest.raises(ZramfsError) as caught:
        await device.start()
    assert caught.value.errno == code and word in caught.value.sentence
    assert lane.store is None


async def test_size_and_algorithm_are_settled_until_reset():
    device, _ = await started(size=MIB)
    for line in ("disksize=2M", "comp_algorithm=zstd"):
        code, sentence = await refused(device, line)
        assert code == errno.EBUSY and "reset" in sentence


async def test_a_disksize_that_fails_can_be_tried_again():
    device, lane = await started()
    assert (await refused(device, f"disksize={1 << 62}"))[0] == errno.ENOMEM
    assert not lane.claimed
    await device.command("disksize=1M")
    assert device.stats().disksize == MIB


async def test_a_balloon_that_no_pool_can_hold_is_refused_in_the_users_unit():
    device, _ = await started(size=MIB)
    code, sentence = await refused(device, "balloon=99T")
    assert code == errno.EINVAL and sentence.endswith("got 99T")
    most = re.search(r"at most (\w+),", sentence)[1]
    await device.command(f"balloon={most}")
    # Eight times its size, and 64 pageblocks; the room to grow is no room for a balloon.
    assert device.memory().balloon.target * 4096 == (8 + 128) * MIB
    await device.command("resize=64M")
    await device.command("balloon=640M")
    assert "at most 640M" in (await refused(device, "balloon=641M"))[1]


async def test_an_open_disk_cannot_be_reset():
    device, lane = await started(size=MIB)
    lane.store.write(0, b"precious" * 512)
    lane.open_count = 3
    code, sentence = await refused(device, "reset")
    assert code == errno.EBUSY and "3 times" in sentence
    assert lane.store.read(0, 8) == b"precious"


async def test_the_loop_goes_on_while_a_command_works_in_its_thread():
    device, lane = await started()
    lane.kernel_answers.clear()
    order = []

    async def run(line: str) -> None:
        await device.command(line)
        order.append(line)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, "disksize=1M")
        with trio.fail_after(60):
            while not lane.size_notified:
                await trio.sleep(0.001)
        nursery.start_soon(run, "mem_limit=1G")
        await trio.sleep(0.01)
        stats = device.stats()
        assert (stats.disksize, stats.mem_limit, order) == (MIB, 0, [])
        lane.kernel_answers.set()
    assert order == ["disksize=1M", "mem_limit=1G"]
    assert device.stats().store.mem_limit == 1 << 30


async def test_the_log_has_every_refusal(caplog):
    device, _ = make_device()
    with caplog.at_level(logging.WARNING, "zramfs"):
        await refused(device, "disksize=0")
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "z0" in record.message and "disksize=0" in record.message and "EINVAL" in record.message


async def test_state_is_for_people():
    device, lane = await started(size=64 * MIB, mem_limit=32 * MIB)
    lane.store.write(0, os.urandom(8 * 4096) + b"same" * 1024 * 8 + bytes(range(256)) * 16 * 16)
    with pytest.raises(ZramfsError):
        await device.command("disksize=1M")
    text = state.control_text(device.stats())
    rows = dict(line.split(maxsplit=1) for line in text.split("\n\n")[0].splitlines())
    assert rows["device"] == "z0 on /mnt/z0"
    assert rows["size"] == "64M"
    assert rows["algorithm"] == "lz4, level 1"
    assert rows["data"] == "128K, with 8 same-filled and 8 huge (incompressible) pages"
    store = device.stats().store
    assert rows["compressed"] == format_size(store.compr_data_size)
    used = format_size(store.mem_used_total)
    assert rows["memory"] == f"{used} in the pool, at most {used}, limit 32M; 2M resident"
    assert rows["ratio"] == f"{128 * 1024 / store.mem_used_total:.2f} (data / memory)"
    assert rows["lane"].startswith("2 threads, disk is open 0 times")
    assert "disksize=1M" in text and "EBUSY" in text
    for command in commands.COMMANDS.values():
        expected = f"{command.usage} {command.summary}".split()
        assert any(line.split() == expected for line in text.splitlines())


async def test_state_of_a_device_without_a_size():
    device, lane = make_device()
    lane.alive = False
    text = state.control_text(device.stats())
    assert "not set up: write disksize=SIZE" in text and "last error   none" in text
    assert "disk does not answer" in text
