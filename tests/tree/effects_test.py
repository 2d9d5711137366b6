# SPDX-License-Identifier: Apache-2.0
"""What writes to attributes do to pages, by the kernel's rules (drivers/block/zram of 7.1): idle marks,
recompression, block_state. Their answers are in tests/tree/rules_test.py."""
from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support.page_kinds import block
from tests.support.unmounted import OK, PAGE, Ours, device, flags

SAME, SECOND = 3, "algo=zstd priority=1"
# Of a program text, which zstd makes much smaller than lz4 does; a same-filled one; one that nothing helps.
SOURCE = Path(random.__file__).read_bytes()
TEXT = [SOURCE[at:at + PAGE] for at in range(0, SAME * PAGE, PAGE)]
NOISE = random.Random(5).randbytes(PAGE)
PAGES = [*TEXT, block("small word", 1, PAGE), NOISE, *TEXT]


async def filled(ours: Ours, *setup: tuple[str, str]) -> None:
    await ours.done(*setup, ("zram/disksize", "1M"))
    ours.store.write(0, b"".join(PAGES))


def compressed(ours: Ours) -> int:
    return int(ours.read("zram/mm_stat").split()[1])


async def test_block_state_lists_stored_pages_in_order(tmp_path: Path) -> None:
    async with device(tmp_path) as ours:
        assert ours.read("zram/block_state") == "EINVAL"
        await filled(ours)
        ours.store.write(200 * PAGE, NOISE)
        ours.store.zero(PAGE, PAGE)
        assert list(flags(ours).items()) == [
            (0, ""), (2, ""), (SAME, "s"), (4, "h"), (5, ""), (6, ""), (7, ""), (200, "h"),
        ]
        await ours.done(("zram/reset", "1"))
        assert ours.read("zram/block_state") == "EINVAL"


async def test_idle_marks_all_but_same_filled_pages_until_they_are_used(tmp_path: Path) -> None:
    async with device(tmp_path) as ours:
        await filled(ours)
        for _ in range(2):
            await ours.done(("zram/idle", "all"))
            assert [page for page, marks in flags(ours).items() if "i" in marks] == [0, 1, 2, 4, 5, 6, 7]
        ours.store.read(0, 10)
        ours.store.write(PAGE, TEXT[0])
        ours.store.write(2 * PAGE + 5, b"part")
        ours.store.zero(4 * PAGE, PAGE)
        assert [page for page, marks in flags(ours).items() if "i" in marks] == [5, 6, 7]
        assert ours.read("zram/block_state")  # to look at it is no use of a page
        assert [page for page, marks in flags(ours).items() if "i" in marks] == [5, 6, 7]


async def test_recompression_makes_pages_smaller_and_keeps_what_is_in_them(tmp_path: Path) -> None:
    async with device(tmp_path) as ours:
        level = ("zram/algorithm_params", "priority=1 level=19")
        await filled(ours, ("zram/recomp_algorithm", SECOND), level)
        assert ours.read("zram/recomp_algorithm").startswith("#1: ")
        before = compressed(ours)
        await ours.done(("zram/idle", "all"), ("zram/recompress", "type=idle"))
        assert compressed(ours) < 0.9 * before
        found = flags(ours)
        assert all("r" in found[page] for page in (0, 1, 2, 5, 6, 7))
        assert found[SAME] == "s" and found[4] == "hn"
        assert not any("i" in marks for marks in found.values())
        assert ours.store.read(0, len(PAGES) * PAGE) == b"".join(PAGES)
        stats = ours.read("zram/mm_stat")
        await ours.done(("zram/recompress", ""))  # all pages, and nothing is left to do
        assert (ours.read("zram/mm_stat").split()[:2], flags(ours)) == (stats.split()[:2], found)
        ours.store.write(0, TEXT[0])
        ours.store.write(4 * PAGE, NOISE)
        assert flags(ours)[0] == "" and flags(ours)[4] == "h"
        ours.store.check(3)


@pytest.mark.parametrize("arguments, touched", [
    ("type=idle", [0, 1]), ("type=huge", []), ("type=huge_idle", []), ("max_pages=2", None),
    ("threshold=3624", []), ("type=idle max_pages=1", None), ("algo=zstd", [0, 1, 2, 5, 6, 7]),
])
async def test_recompression_takes_what_it_was_told(
    tmp_path: Path, arguments: str, touched: list[int] | None
) -> None:
    """touched None: as many pages as max_pages, whichever they are."""
    async with device(tmp_path) as ours:
        await filled(ours, ("zram/recomp_algorithm", SECOND))
        await ours.done(("zram/idle", "all"))
        ours.store.read(2 * PAGE, 6 * PAGE)
        await ours.done(("zram/recompress", arguments))
        tried = [page for page, marks in flags(ours).items() if "r" in marks or "n" in marks]
        if touched is None:
            assert 1 <= len(tried) <= int(arguments[-1])
        elif arguments == "type=huge":
            assert tried == [4] and "n" in flags(ours)[4]
        else:
            assert [page for page in tried if page != 4] == touched


async def test_the_algorithm_of_a_priority_with_its_own_parameters(tmp_path: Path) -> None:
    sizes = {}
    for level in ("1", "19"):
        async with device(tmp_path) as ours:
            await filled(
                ours, ("zram/recomp_algorithm", "algo=lz4hc priority=1"),
                ("zram/recomp_algorithm", "algo=zstd priority=3"),
                ("zram/algorithm_params", f"priority=3 level={level}"),
            )
            lines = ours.read("zram/recomp_algorithm").splitlines()
            assert [line[:4] for line in lines] == ["#1: ", "#3: "]
            assert "[lz4hc] " in lines[0] and "[zstd] " in lines[1] and lines[0].endswith(" ")
            await ours.done(("zram/recompress", "priority=3"))
            sizes[level] = compressed(ours)
            assert await ours.write("zram/recompress", "priority=2") == "EINVAL"
    assert sizes["19"] < sizes["1"]


async def test_reset_forgets_algorithms_and_their_parameters(tmp_path: Path) -> None:
    async with device(tmp_path) as ours:
        for _ in range(2):
            assert (ours.read("zram/comp_algorithm"), ours.read("zram/recomp_algorithm")) == (
                "[lz4] lz4hc zstd none \n", "")
            await ours.done(("zram/comp_algorithm", "zstd"), ("zram/recomp_algorithm", "algo=lz4hc"),
                            ("zram/algorithm_params", "level=19"), ("zram/disksize", "1M"),
                            ("zram/reset", "1"))
        await ours.done(("zram/comp_algorithm", "zstd"), ("zram/disksize", "1M"))
        assert ours.store.level == 3


async def test_a_level_that_the_algorithm_lacks_is_refused_when_the_size_is_set(tmp_path: Path) -> None:
    async with device(tmp_path) as ours:
        for name, level in (("lz4", "0"), ("lz4", "-1"), ("lz4hc", "99")):
            await ours.done(("zram/comp_algorithm", name), ("zram/algorithm_params", f"level={level}"))
            assert await ours.write("zram/disksize", "1M") == "EINVAL"
            assert (ours.read("zram/initstate"), ours.read("zram/disksize")) == ("0\n", "0\n")
            await ours.done(("zram/algorithm_params", "priority=0"), ("zram/disksize", "1M"),
                            ("zram/reset", "1"))


async def test_a_dictionary_is_read_when_it_is_named(tmp_path: Path) -> None:
    """What its file becomes afterwards makes no difference to the pages."""
    dictionary = tmp_path / "pages of mine"
    dictionary.write_bytes(b"".join(TEXT))
    sizes = {}
    for parameters in ("level=3", f'level=3 dict="{dictionary}"', f'"dict={dictionary}"'):
        async with device(tmp_path) as ours:
            await ours.done(("zram/comp_algorithm", "zstd"), ("zram/algorithm_params", parameters))
            dictionary.write_bytes(b"something else")
            await filled(ours)
            sizes[parameters] = compressed(ours)
            assert ours.store.read(0, len(PAGES) * PAGE) == b"".join(PAGES)
            dictionary.write_bytes(b"".join(TEXT))
    plain, *with_one = sizes.values()
    assert all(size < plain / 2 for size in with_one)


async def test_debug_stat(tmp_path: Path) -> None:
    async with device(tmp_path) as ours:
        assert ours.read("zram/debug_stat") == "version: 1\n0        0\n"
        await filled(ours)
        assert ours.read("zram/debug_stat") == "version: 1\n0        0\n"
    assert await ours.write("zram/compact", "1") != OK
