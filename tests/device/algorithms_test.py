# SPDX-License-Identifier: Apache-2.0
"""Several algorithms of a device: what its attributes take and refuse, in the kernel's order of set-up."""
from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.box import MIB, Box
from tests.support.page_kinds import prose
from zramfs.codecs import spec
from zramfs.codecs.codec import MAX_DICTIONARY
from zramfs.device import algorithms
from zramfs.errors import ZramfsError
from zramfs.model.config import Algorithm


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

ROOT = os.geteuid() == 0  # who follows no link that another user could have made


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("make, words", [
    (lambda path: path.write_bytes(b""), "1 to 1048576 bytes; "),
    (lambda path: path.write_bytes(bytes(MAX_DICTIONARY + 1)), "has 1048577"),
    (lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 1 << 40), "has 1099511627776"),
    (make_fifo, "is not a regular file"),
    (lambda path: path.mkdir(), "is not a regular file"),
    (lambda path: path.symlink_to(path), "leads through the link" if ROOT else "Too many levels"),
    (lambda path: path.symlink_to("/dev/tty"), ""),
], ids=["empty", "too large", "huge", "fifo", "directory", "loop", "terminal"])
def test_files_that_are_no_dictionary(tmp_path: Path, make: Callable[[Path], object], words: str) -> None:
    make(tmp_path / "dict")
    began = time.monotonic()
    with pytest.raises(ZramfsError) as caught:
        algorithms.read_dictionary(tmp_path / "dict")
    assert caught.value.errno == errno.EINVAL and words in str(caught.value)
    assert time.monotonic() - began < 60


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
    assert spec.parse_spec(text) == expected


@pytest.mark.parametrize("text, words", [
    ("lzo", "unknown compressor"), ("zstd:dict=", "absolute path"), ("zstd:dict=x", "absolute path"),
    ("none:dict=/x", "none takes no dictionary"), ("zstd:99:dict=/x", "the level of zstd"),
    ("zstd:", "level"),
])
def test_parse_spec_says_what_was_expected(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        spec.parse_spec(text)


def test_none_is_no_secondary() -> None:
    with pytest.raises(ValueError, match="makes nothing smaller"):
        spec.parse_secondary("none")


async def test_a_configured_device(tmp_path: Path) -> None:
    (tmp_path / "dict").write_bytes(prose(1))
    box = await Box(
        size=MIB, access_times=True, algorithms=(
            Algorithm("lz4", 2, tmp_path / "dict"), Algorithm("lz4hc"),
            Algorithm("zstd", 9, tmp_path / "dict"))).start()
    assert [each and (each.algo, each.level, each.dictionary) for each in box.store.codecs] == [
        ("lz4", 2, prose(1)), ("lz4hc", 9, None), ("zstd", 9, prose(1)), None]
    assert box.store.access_times
    missing = (Algorithm("lz4", None, tmp_path / "none"),)
    for chosen in (missing, (Algorithm("lz4"), *(Algorithm("zstd"),) * 4)):
        with pytest.raises(ZramfsError) as caught:
            await Box(algorithms=chosen).start()
        assert caught.value.errno == errno.EINVAL
