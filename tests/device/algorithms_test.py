# SPDX-License-Identifier: Apache-2.0
"""Several algorithms of a device: what its attributes take and refuse, in the kernel's order of set-up;
recompression, idle marks and block_state through its commands; work that is cut short."""
from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tests.support.fakes import FakeLane
from tests.support.page_kinds import block, hard, noise, prose
from zramfs import algorithms, postprocess
from zramfs.attributes import ATTRIBUTES
from zramfs.codecs import MAX_DICTIONARY
from zramfs.config import Algorithm, DeviceConfig
from zramfs.device import Device
from zramfs.errors import ZramfsError

MIB = 1 << 20
PAGE = 4096
BY_NAME = {a.name: a for a in ATTRIBUTES}


class Box:
    """A device, written to as through the files of zram/."""

    def __init__(self, **config: object) -> None:
        self.lane = FakeLane()
        self.device = Device(
            DeviceConfig(directory=Path("/mnt/z0"), rundir=Path("/run/z0"), name="z0", **config), self.lane)

    async def start(self) -> Box:
        await self.device.start()
        self.lane.started = True
        return self

    async def write(self, name: str, data: str | bytes) -> None:
        data = data.encode() if isinstance(data, str) else data
        await self.device.command(BY_NAME[name].parse(data))

    async def refused(self, name: str, data: str | bytes, words: str = "") -> int:
        before = self.device.stats()
        with pytest.raises(ZramfsError) as caught:
            await self.write(name, data)
        assert words in str(caught.value)
        assert self.device.stats().algorithms == before.algorithms
        return caught.value.errno

    async def outcome(self, name: str, data: str) -> int:
        """The errno of a write, 0 if it succeeds."""
        try:
            await self.write(name, data)
        except ZramfsError as error:
            return error.errno
        return 0

    def show(self, name: str) -> str:
        return BY_NAME[name].show(self.device.stats())

    @property
    def store(self):
        return self.lane.store


@pytest.fixture
async def box() -> Box:
    return await Box().start()


# ---- set-up ---------------------------------------------------------------------------------------

async def test_the_kernels_order_of_set_up(box: Box, tmp_path: Path) -> None:
    (tmp_path / "dict").write_bytes(prose(1) * 3)
    assert box.show("recomp_algorithm") == ""
    await box.write("comp_algorithm", "zstd\n")
    await box.write("algorithm_params", f"algo=zstd level=7 dict={tmp_path}/dict\n")
    await box.write("recomp_algorithm", "algo=lz4hc\n")
    await box.write("recomp_algorithm", "algo=zstd priority=3\n")
    await box.write("algorithm_params", "priority=3 level=12\n")
    assert box.show("comp_algorithm") == "lz4 lz4hc [zstd] none \n"
    assert box.show("recomp_algorithm") == "#1: lz4 [lz4hc] zstd \n#3: lz4 lz4hc [zstd] \n"
    await box.write("disksize", "64M\n")
    assert [each and (each.algo, each.level) for each in box.store.codecs] == [
        ("zstd", 7), ("lz4hc", 9), None, ("zstd", 12)]
    assert box.store.codecs[0].dictionary == prose(1) * 3
    for name, data in (("comp_algorithm", "lz4"), ("algorithm_params", "level=3"), ("algorithm_params", ""),
                       ("recomp_algorithm", "algo=zstd")):
        assert await box.refused(name, data, "while the device is set up") == errno.EBUSY
    await box.device.command("reset")
    assert box.device.stats().algorithms == (Algorithm("lz4"), None, None, None)
    assert box.show("recomp_algorithm") == ""


async def test_each_write_of_parameters_takes_the_place_of_the_last(box: Box, tmp_path: Path) -> None:
    (tmp_path / "dict").write_bytes(b"x" * 100)
    await box.write("algorithm_params", f"level=5 dict={tmp_path}/dict")
    await box.write("algorithm_params", "level=7")
    assert box.device.stats().algorithms[0] == Algorithm("lz4", 7)
    await box.write("algorithm_params", "")
    assert box.device.stats().algorithms[0] == Algorithm("lz4")
    await box.write("algorithm_params", "unknown=1 level=2 deflate.winbits=-12")
    assert box.device.stats().algorithms[0] == Algorithm("lz4", 2)


async def test_parameters_stay_when_another_algorithm_is_chosen(box: Box, tmp_path: Path) -> None:
    """As in the kernel, which keeps them by priority. What came with a name goes with it."""
    (tmp_path / "dict").write_bytes(prose(1))
    await box.write("algorithm_params", f"level=7 dict={tmp_path}/dict")
    await box.write("comp_algorithm", "zstd")
    await box.write("recomp_algorithm", "algo=lz4hc")
    await box.write("algorithm_params", "priority=1 level=11")
    await box.write("recomp_algorithm", "algo=zstd")
    await box.write("disksize", "1M")
    assert [each and (each.algo, each.level, each.dictionary) for each in box.store.codecs] == [
        ("zstd", 7, prose(1)), ("zstd", 11, None), None, None]
    await box.device.command("reset")
    for commands, expected in (
        (("algorithm_params=level=7", "comp_algorithm=zstd:5", "comp_algorithm=lz4hc"), ("lz4hc", 9)),
        (("algorithm_params=level=7", "comp_algorithm=none"), ("none", 0)),
        (("comp_algorithm=zstd:9", "comp_algorithm=lz4"), ("lz4", 1)),
        (("algorithm_params=level=7", "reset", "comp_algorithm=zstd"), ("zstd", 3)),
    ):
        for command in (*commands, "disksize=1M"):
            await box.device.command(command)
        assert (box.store.algo, box.store.level) == expected
        await box.device.command("reset")


@pytest.mark.parametrize("data, code, words", [
    ("algo=zstd", errno.EINVAL, "algorithms, #0 lz4 or #1 zstd; got algo='zstd"),
    ("algo=lz4 priority=1", errno.EINVAL, "priority 1 is zstd, not 'lz4'"),
    ("priority=2", errno.EINVAL, "#1 zstd; nothing has the priority 2"),
    ("priority=4", errno.EINVAL, "priority=0 to 3, got 4"),
    ("priority=-1", errno.EINVAL, "got -1"),
    ("priority=9999999999", errno.ERANGE, "priority takes a number"),
    ("priority=one", errno.EINVAL, "decimal number, not 'one'"),
    ("level=1k", errno.EINVAL, "decimal number"),
    ("level=-2147483649", errno.ERANGE, "from -2147483648"),
    ("deflate.winbits=x", errno.EINVAL, "decimal number"),
    ("level", errno.EINVAL, "KEY=VALUE"),
    ("level=", errno.EINVAL, "KEY=VALUE"),
    ("dict=relative", errno.EINVAL, "an absolute path, not 'relative'"),
    ("dict=/nonexistent/x", errno.EINVAL, "No such file"),
    ("dict=/dev/zero", errno.EINVAL, "not a regular file"),
    ("dict=/", errno.EINVAL, "not a regular file"),
    (b"dict=/\xff\xfe", errno.EINVAL, "cannot be read"),
])
async def test_parameters_that_are_refused(box: Box, data: str | bytes, code: int, words: str) -> None:
    await box.write("recomp_algorithm", "algo=zstd")
    if data == "algo=zstd":
        data = "algo=zstd1"
        words = words.replace("'zstd'", "'zstd1'")
    assert await box.refused("algorithm_params", data, words) == code


@pytest.mark.parametrize("data, code, words", [
    ("", errno.EINVAL, "needs a value: write recomp_algorithm=algo=NAME"),
    ("priority=1", errno.EINVAL, "expected algo=NAME"),
    ("algo=lzo", errno.EINVAL, "one of lz4, lz4hc, zstd, got 'lzo'"),
    ("algo=none", errno.EINVAL, "got 'none'"),
    ("algo=zstd priority=0", errno.EINVAL, "priority=1 to 3, got 0"),
    ("algo=zstd priority=4", errno.EINVAL, "got 4"),
    ("algo=zstd priority=99999999999", errno.ERANGE, "priority takes"),
    ("algo=" + "x" * 128, errno.E2BIG, "shorter than 128"),
    ("zstd", errno.EINVAL, "KEY=VALUE"),
])
async def test_secondary_algorithms_that_are_refused(box: Box, data: str, code: int, words: str) -> None:
    assert await box.refused("recomp_algorithm", data, words) == code


@pytest.mark.parametrize("algo, data, words", [
    ("lz4", "level=0", "the level of lz4"), ("lz4", "level=-3", "the level of lz4"),
    ("lz4hc", "level=17", "the level of lz4hc"), ("lz4hc", "level=0", "the level of lz4hc"),
])
async def test_a_bad_level_shows_when_the_size_is_set(box: Box, algo: str, data: str, words: str) -> None:
    await box.write("comp_algorithm", algo)
    await box.write("algorithm_params", data)
    assert await box.refused("disksize", "1M", words) == errno.EINVAL
    await box.write("algorithm_params", "")
    await box.write("disksize", "1M")


@pytest.mark.parametrize("algo, written, level", [
    ("zstd", 0, 3), ("zstd", 23, 22), ("zstd", 2**31 - 1, 22), ("zstd", -8, -7), ("zstd", -(2**31), -7),
    ("lz4hc", 13, 12), ("lz4hc", 16, 12),
])
async def test_levels_that_only_the_kernel_has(box: Box, algo: str, written: int, level: int) -> None:
    """The nearest there is."""
    await box.write("comp_algorithm", algo)
    await box.write("recomp_algorithm", f"algo={algo}")
    for priority in (0, 1):
        await box.write("algorithm_params", f"priority={priority} level={written}")
    await box.write("disksize", "1M")
    assert [box.store.level, box.store.codecs[1].level] == [level, level]


async def test_a_damaged_dictionary_of_zstd_shows_when_the_size_is_set(box: Box, tmp_path: Path) -> None:
    (tmp_path / "dict").write_bytes(b"\x37\xa4\x30\xec" + bytes(100))
    await box.write("comp_algorithm", "zstd")
    await box.write("algorithm_params", f"dict={tmp_path}/dict")
    assert await box.refused("disksize", "1M", "damaged") == errno.EINVAL


# ---- dictionary files -----------------------------------------------------------------------------------

def make_fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("make, words", [
    (lambda path: path.write_bytes(b""), "1 to 1048576 bytes; "),
    (lambda path: path.write_bytes(bytes(MAX_DICTIONARY + 1)), "has 1048577"),
    (lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 1 << 40), "has 1099511627776"),
    (make_fifo, "is not a regular file"),
    (lambda path: path.mkdir(), "is not a regular file"),
    (lambda path: path.symlink_to(path), "Too many levels"),
    (lambda path: path.symlink_to("/dev/tty"), ""),
], ids=["empty", "too large", "huge", "fifo", "directory", "loop", "terminal"])
def test_files_that_are_no_dictionary(tmp_path: Path, make: Callable[[Path], object], words: str) -> None:
    make(tmp_path / "dict")
    began = time.monotonic()
    with pytest.raises(ZramfsError) as caught:
        algorithms.read_dictionary(tmp_path / "dict")
    assert caught.value.errno == errno.EINVAL and words in str(caught.value)
    assert time.monotonic() - began < 10


def test_a_dictionary_is_read_when_it_is_set(tmp_path: Path) -> None:
    (tmp_path / "dict").write_bytes(b"x" * MAX_DICTIONARY)
    found = algorithms.entry(Algorithm("lz4", None, tmp_path / "dict"))
    (tmp_path / "dict").unlink()
    assert found.codec().dictionary == b"x" * MAX_DICTIONARY


# ---- what the command line says -----------------------------------------------------------------------

@pytest.mark.parametrize("text, expected", [
    ("lz4", Algorithm("lz4", 1)), ("zstd:-3", Algorithm("zstd", -3)),
    ("zstd:9:dict=/a:b,c=d", Algorithm("zstd", 9, Path("/a:b,c=d"))),
    ("lz4hc:dict=/x", Algorithm("lz4hc", 9, Path("/x"))),
])
def test_parse_spec(text: str, expected: Algorithm) -> None:
    assert algorithms.parse_spec(text) == expected


@pytest.mark.parametrize("text, words", [
    ("lzo", "unknown compressor"), ("zstd:dict=", "absolute path"), ("zstd:dict=x", "absolute path"),
    ("none:dict=/x", "none takes no dictionary"), ("zstd:99:dict=/x", "the level of zstd"),
    ("zstd:", "level"),
])
def test_parse_spec_says_what_was_expected(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        algorithms.parse_spec(text)


def test_none_is_no_secondary() -> None:
    with pytest.raises(ValueError, match="makes nothing smaller"):
        algorithms.parse_secondary("none")


async def test_a_configured_device(tmp_path: Path) -> None:
    (tmp_path / "dict").write_bytes(prose(1))
    box = await Box(
        size=MIB, algo="lz4", level=2, dictionary=tmp_path / "dict", access_times=True,
        secondary=(Algorithm("lz4hc"), Algorithm("zstd", 9, tmp_path / "dict"))).start()
    assert [each and (each.algo, each.level, each.dictionary) for each in box.store.codecs] == [
        ("lz4", 2, prose(1)), ("lz4hc", 9, None), ("zstd", 9, prose(1)), None]
    assert box.store.access_times
    for config in ({"dictionary": tmp_path / "none"}, {"secondary": (Algorithm("zstd"),) * 4}):
        with pytest.raises(ZramfsError) as caught:
            await Box(**config).start()
        assert caught.value.errno == errno.EINVAL


# ---- recompress and idle ----------------------------------------------------------------------------------

async def three(**more: object) -> Box:
    box = await Box(size=8 * MIB, secondary=(Algorithm("lz4hc"), Algorithm("zstd", 9)), **more).start()
    box.store.write(0, b"".join([prose(1), hard(1), noise(1), bytes(PAGE)]))
    return box


@pytest.mark.parametrize("data, won", [
    ("", 1), ("priority=2", 2), ("algo=zstd", 2), ("algo=zstd priority=2", 2), ("type=huge algo=zstd", 1),
    ("type=idle", 0), ("type=nonsense algo=zstd", 2), ("threshold=3000 algo=zstd", 0),
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
    ("idle", errno.EINVAL, "KEY=VALUE"), ("type=", errno.EINVAL, "KEY=VALUE"),
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
    assert time.monotonic() - began < 10


# ---- cut short --------------------------------------------------------------------------------------------

async def busy_box() -> Box:
    """With 16 MiB that take zstd 19 some seconds."""
    box = await Box(size=16 * MIB, secondary=(Algorithm("zstd", 19),)).start()
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
        with trio.fail_after(20):
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
        with trio.fail_after(20):
            await box.device.close()
    assert sorted(outcome) in ([errno.EINTR, errno.EINTR], [errno.EINTR, errno.EINVAL])


async def test_the_loop_goes_on_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    box = await busy_box()
    monkeypatch.setattr(postprocess, "SLICE_NS", 500_000_000)
    turns = 0

    async def look() -> None:
        nonlocal turns
        while True:
            await trio.sleep(0.001)
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        with trio.move_on_after(0.5):
            await box.write("recompress", "")
        nursery.cancel_scope.cancel()
    assert box.device.stats().recompression.tried > 3
    # Of several hundred on two idle CPUs; with slices on the loop it has one or two.
    assert turns > 20


async def test_a_full_pool_says_what_to_do() -> None:
    box = await Box(size=4 * MIB, secondary=(Algorithm("zstd"),)).start()
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
