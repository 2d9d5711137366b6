# SPDX-License-Identifier: Apache-2.0
"""The same attribute writes and the same I/O to a zram device of the live kernel and to one of ours:
the same results, errors and numbers, but for the differences of tests/machine/differences_test.py."""
from __future__ import annotations

import os
import random
import re

import pytest

from tests.support.hostile_text import IDLE, NAMES, NUMBERS, PARAMETERS, SIZES
from tests.support.lz4_lengths import kept, kernel_length, library_length
from tests.support.page_kinds import block
from tests.support.paths import ROOT
from tests.support.real_pages import real_pages
from tests.support.twins import Pair, Twin, both, mm_stat
from tests.support.whole import MIB, PAGE

pytestmark = pytest.mark.requires("fuse", "zram")

CONTROL_PAGE = ROOT / "docs/control.md"


# ---- writes to attributes --------------------------------------------------------------------------

# None of them sets a device up.
NO_SIZES = (b"0", b"junk", b"K", b" 4096", b"+4096", b"-1", b"16E", b"1E", b"15E", b"18446744073709551615",
            b"\0", b"\n")
ANYTHING = (b"1", b"anything", b"\0", b"\n", b"0")
BEFORE_SIZE = {
    "mem_limit": SIZES, "disksize": NO_SIZES, "mem_used_max": NUMBERS, "compact": ANYTHING,
    "comp_algorithm": NAMES, "reset": NUMBERS, "idle": IDLE,
}
WITH_SIZE = BEFORE_SIZE | {"disksize": SIZES}
# Parameters of a device that has a size are EBUSY since 7.1; older kernels took them, to no effect.
BEFORE_SIZE = BEFORE_SIZE | {"algorithm_params": PARAMETERS}
# Everything that a read of both must answer alike when nothing is stored.
SHOWN = ("disksize", "initstate", "mm_stat", "io_stat", "debug_stat")


def same_stores(twins: Pair, name: str, values: tuple[bytes, ...], before=None) -> None:
    """before: what to do to either in front of each of them."""
    different = {}
    for value in values:
        for twin in twins:
            if before:
                before(twin)
        theirs, ours = (
            (twin.store(name, value), *map(twin.show, SHOWN)) for twin in twins
        )
        if theirs != ours:
            different[value] = (theirs, ours)
    assert different == {}


@pytest.mark.parametrize("name", BEFORE_SIZE)
def test_a_write_before_the_device_has_a_size(twins, name):
    same_stores(twins, name, BEFORE_SIZE[name])


@pytest.mark.parametrize("name", WITH_SIZE)
def test_a_write_to_a_device_with_data(twins, name):
    page = random.Random(1).randbytes(PAGE)

    def fill(twin: Twin) -> None:
        if twin.show("initstate") == "0\n":
            twin.store("comp_algorithm", b"lz4")
            twin.store("mem_limit", b"1M")
            assert twin.store("disksize", b"64K") == 3
            assert twin.write(3, page + b"same" * 1024 * 2) == 3 * PAGE
            twin.discard(5, 2)

    same_stores(twins, name, WITH_SIZE[name], fill)


@pytest.mark.parametrize("name", WITH_SIZE)
def test_a_write_while_the_disk_is_open(twins, name):
    for twin in twins:
        assert twin.store("disksize", b"64K") == 3
        twin.hold()
    same_stores(twins, name, WITH_SIZE[name])


@pytest.mark.parametrize("value, size", [
    (b"1", PAGE), (b"4097", 2 * PAGE), (b"0x100001junk", MIB + PAGE), (b"1M\n", MIB), (b"1m", MIB),
    (b"02000000", 524288), (b"10G", 10 << 30),
])
def test_disksize(twins, value, size):
    assert both(twins, lambda twin: twin.store("disksize", value)) == len(value)
    assert both(twins, lambda twin: twin.show("disksize")) == f"{size}\n"
    assert both(twins, lambda twin: twin.store("disksize", b"1M")) == "EBUSY"


def test_modes_and_forms(twins):
    for name in os.listdir(twins[1].attributes):
        if (twins[0].attributes / name).exists():
            assert both(twins, lambda twin, name=name: oct((twin.attributes / name).stat().st_mode))
    for twin in twins:
        assert re.fullmatch(r"(\[?[a-z0-9-]+\]? )+\n", twin.show("comp_algorithm"))
        assert re.fullmatch(r" *\d+( {1,8}\d+){16}\n", twin.show("stat"))
        assert "[lz4] " in twin.show("comp_algorithm")
    both(twins, lambda twin: twin.show("stat"))


def test_reset_forgets_the_settings(twins):
    for twin in twins:
        twin.store("mem_limit", b"1M")
        twin.store("disksize", b"64K")
        twin.write(0, random.Random(2).randbytes(4 * PAGE))
    assert both(twins, lambda twin: twin.store("reset", b"1")) == 1
    for name in SHOWN:
        both(twins, lambda twin, name=name: twin.show(name))
    for twin in twins:
        assert twin.show("comp_algorithm").startswith("[")
        assert twin.store("disksize", b"64K") == 3
        assert twin.read(0, 4) == bytes(4 * PAGE)


# ---- data --------------------------------------------------------------------------------------------

def same_numbers(twins: Pair) -> dict[str, int]:
    """Columns 1, 2, 4, 6, 8 and 9 of mm_stat, and io_stat, to the byte, and column 3 within 1 %."""
    theirs, ours = map(mm_stat, twins)
    for name in ("orig_data_size", "compr_data_size", "mem_limit", "same_pages", "huge_pages",
                 "huge_pages_since"):
        assert ours[name] == theirs[name], name
    assert ours["mem_used_total"] == pytest.approx(theirs["mem_used_total"], rel=0.01)
    both(twins, lambda twin: twin.show("io_stat"))
    return theirs


def set_up(twins: Pair, size: bytes = b"1M") -> None:
    assert both(twins, lambda twin: twin.store("disksize", size)) == len(size)


def test_kinds_of_pages(twins):
    """Same-filled, compressible and not, and each put where another was."""
    set_up(twins)
    names = ("zeros", "small word", "halves", "text", "half random", "random")
    kinds = [block(name, 7, PAGE) for name in names]
    for place, page in enumerate(kinds):
        assert both(twins, lambda twin, at=place, page=page: twin.write(at, page)) == PAGE
        same_numbers(twins)
    for old in range(len(kinds)):
        for page in kinds:
            assert both(twins, lambda twin, at=old, page=page: twin.write(at, page)) == PAGE
            same_numbers(twins)
    assert both(twins, lambda twin: twin.read(0, 8)) == kinds[-1] * len(kinds) + bytes(2 * PAGE)


def test_reading_takes_nothing(twins):
    set_up(twins)
    assert both(twins, lambda twin: twin.read(0, 256)) == bytes(MIB)
    assert both(twins, lambda twin: twin.show("mm_stat")).split() == ["0"] * 9


def test_discard_and_write_zeroes(twins):
    set_up(twins)
    data = b"".join(block(kind, 8, 8 * PAGE) for kind in ("random", "text", "small word", "zeros"))
    for call in ("discard", "zero"):
        assert both(twins, lambda twin: twin.write(0, data)) == len(data)
        for at, pages in ((1, 1), (4, 8), (4, 8), (0, 2), (40, 100), (255, 1), (8, 24)):
            both(twins, lambda twin, at=at, n=pages, call=call: getattr(twin, call)(at, n))
            same_numbers(twins)
        both(twins, lambda twin: twin.read(0, 40))
        assert same_numbers(twins)["orig_data_size"] == 2 * PAGE


def test_the_end_of_the_disk(twins):
    set_up(twins)
    assert both(twins, lambda twin: twin.write(255, bytes(2 * PAGE))) == PAGE
    assert both(twins, lambda twin: twin.write(256, bytes(PAGE))) == "ENOSPC"
    assert both(twins, lambda twin: twin.read(255, 2)) == bytes(PAGE)
    assert both(twins, lambda twin: twin.read(256, 1)) == b""
    assert both(twins, lambda twin: twin.discard(256, 1)) == "EINVAL"
    assert both(twins, lambda twin: twin.zero(255, 2)) == "EINVAL"
    same_numbers(twins)


def test_a_full_pool_keeps_the_old_data(twins):
    noise = random.Random(9).randbytes(40 * PAGE)
    pages = [noise[at:at + PAGE] for at in range(0, len(noise), PAGE)]
    for twin in twins:
        twin.store("mem_limit", b"100K")
    set_up(twins)
    for place in range(25):
        assert both(twins, lambda twin, at=place: twin.write(at, pages[at])) == PAGE
    for place in (25, 26, 3):  # the last holds something already
        for twin, error in zip(twins, ("EIO", "ENOSPC"), strict=True):
            assert twin.write(place, pages[30]) == error
        same_numbers(twins)
    assert both(twins, lambda twin: twin.read(0, 27)) == noise[:25 * PAGE] + bytes(2 * PAGE)
    assert both(twins, lambda twin: twin.write(3, b"same" * 1024)) == PAGE
    both(twins, lambda twin: twin.discard(4, 1))
    for place in (25, 26):
        assert both(twins, lambda twin, at=place: twin.write(at, pages[31])) == PAGE
    assert same_numbers(twins)["mem_used_total"] == 25 * PAGE
    assert both(twins, lambda twin: twin.store("mem_limit", b"0")) == 1
    assert both(twins, lambda twin: twin.write(27, pages[32])) == PAGE
    same_numbers(twins)


def test_peak_and_compaction(twins):
    rng = random.Random(10)
    set_up(twins, b"16M")
    pages = real_pages(2000)
    for at in range(0, len(pages), 100):
        assert both(twins, lambda twin, at=at: twin.write(at, b"".join(pages[at:at + 100]))) == 100 * PAGE
    peaks = [mm_stat(twin)["mem_used_max"] for twin in twins]
    for at in rng.sample(range(len(pages)), len(pages) // 2):
        both(twins, lambda twin, at=at: twin.discard(at, 1))
    for twin, peak in zip(twins, peaks, strict=True):
        before = mm_stat(twin)
        assert before["mem_used_max"] == peak > before["mem_used_total"]
        assert twin.store("compact", b"1") == 1
        after = mm_stat(twin)
        assert after["pages_compacted"] * PAGE == before["mem_used_total"] - after["mem_used_total"] > MIB
        assert after["mem_used_max"] == peak
        assert twin.store("mem_used_max", b"0") == 1
        assert mm_stat(twin)["mem_used_max"] == after["mem_used_total"]
    theirs, ours = map(mm_stat, twins)
    # Which objects share a zspage that is left half empty is chance: 1.1 % of so small a pool was seen.
    assert ours["mem_used_total"] == pytest.approx(theirs["mem_used_total"], rel=0.03)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)
    assert ours["pages_compacted"] == pytest.approx(theirs["pages_compacted"], rel=0.05)


# ---- real files ----------------------------------------------------------------------------------------

def test_pages_of_real_files(twins):
    """Column 2 to the byte: each side's own LZ4, which differ in one rule (see lz4_lengths), says it."""
    pages = real_pages(1200)
    set_up(twins, b"8M")
    for at in range(0, len(pages), 100):
        assert both(twins, lambda twin, at=at: twin.write(at, b"".join(pages[at:at + 100]))) == 100 * PAGE
    theirs, ours = map(mm_stat, twins)
    assert theirs["compr_data_size"] == sum(kept(page, kernel_length) for page in pages)
    assert ours["compr_data_size"] == sum(kept(page, library_length) for page in pages)
    for name in ("orig_data_size", "same_pages"):
        assert ours[name] == theirs[name]
    for stats, length in ((theirs, kernel_length), (ours, library_length)):
        huge = sum(kept(page, length) == PAGE for page in pages)
        assert stats["huge_pages"] == stats["huge_pages_since"] == huge
    assert ours["mem_used_total"] == pytest.approx(theirs["mem_used_total"], rel=0.01)
    for at in range(0, len(pages), 100):
        both(twins, lambda twin, at=at: twin.read(at, 100))


def test_pages_that_both_lz4_make_alike_are_counted_alike_to_the_byte(twins):
    pages = [page for page in real_pages(800) if kernel_length(page) == library_length(page)]
    assert len(pages) > 600
    set_up(twins, b"8M")
    for at in range(0, len(pages), 100):
        piece = b"".join(pages[at:at + 100])
        assert both(twins, lambda twin, at=at, piece=piece: twin.write(at, piece)) == len(piece)
    assert same_numbers(twins)["orig_data_size"] == len(pages) * PAGE


@pytest.mark.parametrize("level", [2, 16, 300])
def test_the_level_of_lz4_is_its_acceleration(twins, level):
    pages = real_pages(200)
    assert isinstance(both(twins, lambda twin: twin.store("algorithm_params", b"level=%d" % level)), int)
    set_up(twins)
    both(twins, lambda twin: twin.write(0, b"".join(pages)))
    for twin, length in zip(twins, (kernel_length, library_length), strict=True):
        expected = sum(kept(page, lambda page, length=length: length(page, level)) for page in pages)
        assert mm_stat(twin)["compr_data_size"] == expected
    assert both(twins, lambda twin: twin.read(0, 200)) == b"".join(pages)


def test_parameters_last_until_the_next_write_of_some(twins):
    """Every write of parameters puts back what it does not name."""
    pages = real_pages(50)
    for parameters in (b"level=64", b"priority=0"):
        both(twins, lambda twin, text=parameters: twin.store("algorithm_params", text))
    set_up(twins)
    both(twins, lambda twin: twin.write(0, b"".join(pages)))
    for twin, length in zip(twins, (kernel_length, library_length), strict=True):
        assert mm_stat(twin)["compr_data_size"] == sum(kept(page, length) for page in pages)


@pytest.mark.parametrize(
    "order", [("algorithm_params", "comp_algorithm"), ("comp_algorithm", "algorithm_params")])
def test_the_order_of_algorithm_and_parameters_makes_no_difference(twins, order):
    pages, values = real_pages(50), {"algorithm_params": b"level=64", "comp_algorithm": b"lz4"}
    for name in order:
        both(twins, lambda twin, name=name: twin.store(name, values[name]))
    set_up(twins)
    both(twins, lambda twin: twin.write(0, b"".join(pages)))
    for twin, length in zip(twins, (kernel_length, library_length), strict=True):
        expected = sum(kept(page, lambda page, length=length: length(page, 64)) for page in pages)
        assert mm_stat(twin)["compr_data_size"] == expected
