# SPDX-License-Identifier: Apache-2.0
"""Every difference from the zram of the kernel that docs/control.md lists, shown on a zram device of the live
kernel and on one of ours; and no other is listed."""
from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.support.lz4_lengths import kernel_length, library_length
from tests.support.paths import ROOT
from tests.support.real_pages import real_pages
from tests.support.twins import Twin, mm_stat
from tests.support.whole import PAGE

pytestmark = pytest.mark.requires("fuse", "zram")

CONTROL_PAGE = ROOT / "docs/control.md"


@dataclass(frozen=True)
class Difference:
    """says: how its line in docs/control.md begins. show: what it is seen by, given a twin as `reset`
    and lz4 leave it. reason: why it stays."""

    says: str
    reason: str
    show: Callable[[Twin], object]
    theirs: object
    ours: object


def _two_newlines(twin: Twin) -> object:
    return twin.store("comp_algorithm", b"lz4\n\n"), "[" in twin.show("comp_algorithm")


def _without_size(twin: Twin) -> object:
    return twin.read(0, 1), twin.write(0, bytes(PAGE))


def _full(twin: Twin) -> object:
    twin.store("mem_limit", b"4K")
    twin.store("disksize", b"1M")
    return twin.write(0, os.urandom(PAGE)), twin.write(1, os.urandom(PAGE))


def _lowered_limit(twin: Twin) -> object:
    half = random.Random(11).randbytes(2048) + bytes(2048)
    twin.store("disksize", b"1M")
    twin.write(0, half + os.urandom(2 * PAGE))
    twin.store("mem_limit", b"4K")
    return twin.write(4, half), twin.write(5, b"same" * 1024)


def _peak(twin: Twin) -> object:
    _full(twin)
    return mm_stat(twin)["mem_used_max"]


def _late_parameters(twin: Twin) -> object:
    twin.store("disksize", b"1M")
    return twin.store("algorithm_params", b"level=3")


def _no_level(twin: Twin) -> object:
    return twin.store("algorithm_params", b"level=0"), twin.store("disksize", b"1M")


def _last_match(twin: Twin) -> object:
    page = next(page for page in real_pages(800) if kernel_length(page) != library_length(page))
    twin.store("disksize", b"1M")
    twin.write(0, page)
    got = mm_stat(twin)["compr_data_size"]
    return {kernel_length(page): "the kernel's", library_length(page): "the library's"}.get(got, got)


def _odd_word(twin: Twin) -> object:
    twin.store("disksize", b"1M")
    twin.write(0, b"odd word" * 512)
    stats = mm_stat(twin)
    return stats["same_pages"], stats["compr_data_size"], stats["mem_used_total"]


def _compact(twin: Twin) -> object:
    """Whether it has moved pages, not only objects."""
    rng = random.Random(12)
    twin.store("disksize", b"16M")
    twin.write(0, b"".join(real_pages(2000)))
    for page in rng.sample(range(2000), 1600):
        twin.discard(page, 1)
    twin.store("compact", b"1")
    compaction = twin.attributes.parent / "memory/compaction"
    return compaction.exists() and int(re.search(r"pages_migrated (\d+)", compaction.read_text())[1]) > 0


def _unknown_type(twin: Twin) -> object:
    twin.store("recomp_algorithm", b"algo=zstd priority=1")
    twin.store("disksize", b"1M")
    return twin.store("recompress", b"type=hueg")


def _is_file(twin: Twin) -> object:
    twin.store("disksize", b"1M")
    return twin.disk.is_file(), twin.discard(255, 2)


def _size_while_open(twin: Twin) -> object:
    twin.hold()
    return twin.store("disksize", b"1M")


DIFFERENCES = (
    Difference(
        "The compressors are lz4, lz4hc, zstd and none",
        "lzo has no maintained library to link; nobody who has zstd and lz4 misses it",
        lambda twin: (twin.store("reset", b"1"), re.search(r"\[(.*)\]", twin.show("comp_algorithm"))[1]),
        (1, "lzo-rle"), (1, "lz4")),
    Difference(
        "`comp_algorithm` refuses a name that ends with two newlines",
        "what the kernel does then is a mistake of its own", _two_newlines, (5, False), ("EINVAL", True)),
    Difference(
        "`disksize` is EBUSY while somebody has `disk` open",
        "the lane changes its store only while nobody uses it, and no kernel cache has a size to forget",
        _size_while_open, 2, "EBUSY"),
    Difference(
        "I/O on a device without a size is ENXIO",
        "an error that says what is wrong, instead of an empty file that programs take for a success",
        _without_size, (b"", "ENOSPC"), ("ENXIO", "ENXIO")),
    Difference(
        "A write that finds the pool full", "the errno that says what to do; EIO looks like damage",
        _full, (PAGE, "EIO"), (PAGE, "ENOSPC")),
    Difference(
        "A limit below what is in use", "a limit on memory, which such a write does not add to",
        _lowered_limit, ("EIO", PAGE), (PAGE, PAGE)),
    Difference(
        "`algorithm_params` is EBUSY on a device with a size",
        "as in kernels since 7.1; older ones take it, to no effect", _late_parameters, 7, "EBUSY"),
    Difference(
        "`algorithm_params` is EINVAL where `algo` and `priority` do not fit together",
        "as in kernels since 7.1; older ones go by the name",
        lambda twin: twin.store("algorithm_params", b"algo=lz4 priority=1"), 19, "EINVAL"),
    Difference(
        "`recompress` is EINVAL for an unknown `type`",
        "a slip of the pen recompresses everything; newer kernels refuse it, too", _unknown_type, 9,
        "EINVAL"),
    Difference(
        "A level of lz4 below 1", "as in kernels since 7.1; older ones take it for 1",
        _no_level, (7, 2), (7, "EINVAL")),
    Difference("The peak in `mm_stat`", "it is never above the limit", _peak, 2 * PAGE, PAGE),
    Difference(
        "lz4 is that of liblz4", "smaller pages, from a library that Debian keeps secure",
        _last_match, "the kernel's", "the library's"),
    Difference(
        "A same-filled page takes 8 bytes", "a slot has 8 bytes, half of the kernel's",
        _odd_word, (1, 0, 0), (1, 0, PAGE)),
    Difference(
        "`compact` also moves pages together", "that memory comes back is what zramfs is for",
        _compact, False, True),
    Difference(
        "`disk` is a file", "FUSE has files; a loop device makes a block device of them",
        _is_file, (False, "EINVAL"), (True, None)),
    Difference(
        "Devices are added and removed by `zramfs create`", "a device belongs to whoever made it",
        lambda twin: (twin.control / "hot_add").exists(), True, False),
)


# Write-back, which the kernels of most machines lack: tests/tree/writeback_effects_test.py shows that.
NOT_HERE = ("`backing_dev` also takes a regular file",)


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda difference: difference.says)
def test_a_listed_difference_is_there(twins, difference):
    assert [difference.show(twin) for twin in twins] == [difference.theirs, difference.ours]


def test_the_list_of_the_documentation_is_this_one():
    _, _, rest = CONTROL_PAGE.read_text().partition("## Where it differs from the kernel\n")
    section = rest.partition("\n## ")[0]
    lines = [line.removeprefix("- ") for line in section.splitlines() if line.startswith("- ")]
    lines = [line for line in lines if not line.startswith(NOT_HERE)]
    assert len(lines) == len(DIFFERENCES)
    for line, difference in zip(lines, DIFFERENCES, strict=True):
        assert line.startswith(difference.says)
