# SPDX-License-Identifier: Apache-2.0
"""The attributes without a mount: their parsers, formats and explanations. tests/machine/differential_test.py
holds them against the kernel's."""
from __future__ import annotations

import dataclasses
import errno
import os
import re

import pytest

from allocator.stats import ClassStats
from tests.support.unmounted import device
from zramfs.errors import ZramfsError
from zramfs.text.kernel_numbers import kstrtoull, memparse, page_align
from zramfs.tree.memory_files import format_buddyinfo, format_classes

# What memparse and PAGE_ALIGN make of mem_limit on kernel 6.18; None = EINVAL.
MEM_LIMITS = {
    b"0": 0, b"4096": 4096, b"4097": 8192, b"1k": 4096, b"3K": 4096, b"2M": 2 << 20, b"1G": 1 << 30,
    b"1T": 1 << 40, b"1P": 1 << 50, b"1E": 1 << 60, b"16E": 0, b"010": 4096, b"0x10K": 16384,
    b"0X10k": 16384, b"0xg": 0, b"09": 0, b"1junk": 4096, b"5000 ": 8192, b"5000\n": 8192,
    b"8192\0junk": 8192, b"K": 0, b"99999999999999999999999": 200376420520689664,
    b"18446744073709551615": 0, b"junk": None, b" 5000": None, b"+5000": None, b"-1": None, b"\0": None,
    b"\n": None,
}
# Random bytes, which no algorithm makes smaller, then same-filled pages, of a word (two equal halves)
# that our slots hold without an object, then zeros.
FILL = os.urandom(3 * 4096) + b"zram" * 1024 * 5 + bytes(2 * 4096)


@pytest.fixture
async def ours(tmp_path):
    async with device(tmp_path) as ours:
        yield ours


async def test_algorithms_have_the_kernels_form(ours):
    assert ours.read("zram/comp_algorithm") == "[lz4] lz4hc zstd none \n"
    await ours.write("zram/comp_algorithm", b"zstd\n")
    assert ours.read("zram/comp_algorithm") == "lz4 lz4hc [zstd] none \n"
    await ours.write("zram/reset", b"1")
    assert ours.read("zram/comp_algorithm") == "[lz4] lz4hc zstd none \n"


async def test_stat_has_its_columns_in_the_kernels_order(ours):
    ours.lane.counters = dataclasses.replace(
        ours.lane.counters,
        read_ios=1, read_sectors=2, read_ms=3, write_ios=4, write_sectors=5, write_ms=6, in_flight=7, io_ms=8,
        queue_ms=9, discard_ios=10, discard_sectors=11, discard_ms=12,
        protocol_errors=15, longest_us=123456789,
    )
    columns = [1, 0, 2, 3, 4, 0, 5, 6, 7, 8, 9, 10, 0, 11, 12, 0, 0]
    assert ours.read("zram/stat") == " ".join(f"{n:8d}" for n in columns) + "\n"
    await ours.write("zram/reset", b"1")
    assert [int(word) for word in ours.read("zram/stat").split()] == [0] * 8 + [7] + [0] * 8


@pytest.mark.parametrize("text, limit", MEM_LIMITS.items())
def test_memparse(text, limit):
    value, used = memparse(text)
    assert (page_align(value) if used else None) == limit


@pytest.mark.parametrize("text, value", [
    (b"1", 1), (b"+1", 1), (b"1\n", 1), (b"007", 7), (b"65535", 65535), (b"3\0junk", 3),
    (b"65536", errno.ERANGE), (b"65536x", errno.EINVAL), (b"9" * 4096, errno.ERANGE),
    (b"18446744073709551616x", errno.ERANGE), (b"18446744073709551615x", errno.EINVAL),
    (b"0" * 4000 + b"7", 7), (b"", errno.EINVAL), (b"\n", errno.EINVAL),
    (b"1\n\n", errno.EINVAL), (b" 1", errno.EINVAL), (b"-1", errno.EINVAL), (b"++1", errno.EINVAL),
    (b"0x1", errno.EINVAL), (b"\xd9\xa1", errno.EINVAL),
])
def test_kstrtou16(text, value):
    if value in (errno.ERANGE, errno.EINVAL):
        with pytest.raises(ZramfsError) as caught:
            kstrtoull(text, 65535)
        assert caught.value.errno == value
    else:
        assert kstrtoull(text, 65535) == value


async def test_an_error_is_explained_where_people_look(ours):
    assert await ours.write("zram/disksize", b"four gigs") == "EINVAL"
    error = ours.device.stats().last_error
    assert "zram/disksize" in error and "'four gigs'" in error and "EINVAL" in error
    await ours.write("zram/disksize", b"1M")
    assert await ours.write("zram/disksize", b"2M") == "EBUSY"
    assert "1048576 bytes already" in ours.device.stats().last_error


# mm/zsmalloc.c's table, column by column: a leading space, widths 5 5, eleven of 9, 13 10 10 16 8.
CLASSES_HEADER = (
    " class  size       10%       20%       30%       40%       50%       60%       70%       80%       90%"
    "       99%      100% obj_allocated   obj_used pages_used pages_per_zspage freeable"
)


def test_classes_have_the_kernels_columns():
    groups = (0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2)
    text = format_classes([
        ClassStats(index=2, size=64, zspages_by_group=groups, obj_allocated=192, obj_used=129, pages_used=3,
                   pages_per_zspage=1, objs_per_zspage=64, freeable=0),
        ClassStats(index=254, size=4096, zspages_by_group=(0,) * 11 + (7,), obj_allocated=7, obj_used=7,
                   pages_used=7, pages_per_zspage=1, objs_per_zspage=1, freeable=1),
    ])
    header, small, huge, blank, total, end = text.split("\n")
    assert header == CLASSES_HEADER
    widths = [6, 6] + [10] * 11 + [14, 11, 11, 17, 9]
    assert blank == end == ""
    for row, values in (
        (small, [2, 64, 1, *[0] * 9, 2, 192, 129, 3, 1, 0]),
        (huge, [254, 4096, *[0] * 10, 7, 7, 7, 7, 1, 1]),
        (total, ["Total", "", 1, *[0] * 9, 9, 199, 136, 10, "", 1]),
    ):
        assert row == "".join(f"{value!s:>{width}}" for value, width in zip(values, widths, strict=True))


async def test_classes_and_buddyinfo_of_a_filled_device(ours):
    assert ours.device.classes() == []
    assert format_classes(ours.device.classes()).splitlines()[0] == CLASSES_HEADER
    assert format_buddyinfo(ours.device.buddyinfo()) == ""
    await ours.write("zram/disksize", b"16M")
    ours.store.write(0, FILL)
    rows = [line.split() for line in format_classes(ours.device.classes()).splitlines()[1:] if line]
    assert [row[-4] for row in rows if row[1] == "4096"] == ["3"]
    mem_used = int(ours.read("zram/mm_stat").split()[2])
    assert int(rows[-1][-2]) * 4096 == mem_used
    line = format_buddyinfo(ours.device.buddyinfo())
    words = re.fullmatch(r"Node 0, zone    arena ((?: *\d+ ){10})\n", line)[1].split()
    free = sum(int(blocks) << order for order, blocks in enumerate(words))
    assert free == ours.device.stats().store.frames_free
