# SPDX-License-Identifier: Apache-2.0
"""What write-back does to pages, by the kernel's rules (drivers/block/zram of 7.1). Its answers are in
tests/tree/rules_test.py. Ours packs compressed pages into the blocks of the store, so it
uses fewer blocks.
"""
from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support.page_kinds import block
from tests.support.unmounted import PAGE, Ours, device, flags
from zramfs.model.stats import WritebackStats

NOISE = [random.Random(seed).randbytes(PAGE) for seed in range(4)]
# 0 to 3 compressible, 4 same-filled, 5 to 8 huge; 0, 1, 5 and 6 are idle.
PAGES = [*(block("text", seed, PAGE) for seed in range(4)), block("small word", 1, PAGE), *NOISE]
OBJECTS = [0, 1, 2, 3, 5, 6, 7, 8]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "store").write_bytes(bytes(1 << 20))
    return tmp_path / "store"


async def filled(ours: Ours, store: Path, *setup: tuple[str, str]) -> None:
    await ours.done(("zram/backing_dev", str(store)), *setup, ("zram/disksize", "1M"))
    ours.store.write(0, b"".join(PAGES))
    await ours.done(("zram/idle", "all"))
    ours.store.read(2 * PAGE, 2 * PAGE)
    ours.store.read(7 * PAGE, 2 * PAGE)


def numbers(ours: Ours, name: str) -> list[int]:
    return [int(word) for word in ours.read(f"zram/{name}").split()]


def written(ours: Ours) -> list[int]:
    return [page for page, marks in flags(ours).items() if "w" in marks]


@pytest.mark.parametrize("text, pages", [
    ("idle", [0, 1, 5, 6]), ("type=idle", [0, 1, 5, 6]), ("huge", [5, 6, 7, 8]), ("huge_idle", [5, 6]),
    ("incompressible", []), ("page_index=2", [2]), ("page_indexes=1-6", [1, 2, 3, 5, 6]),
    ("page_index=8 page_indexes=0-0 page_index=3", [0, 3, 8]), ("page_index=4", []), ("page_index=100", []),
    ("page_indexes=0-255", OBJECTS), ("page_index=3 page_indexes=5-7 type=idle", [3, 5, 6, 7]),
    ("page_indexes=1-2 huge page_index=7", [1, 2]),
])
async def test_which_pages_are_written(tmp_path: Path, store: Path, text: str, pages: list[int]) -> None:
    async with device(tmp_path) as ours:
        await filled(ours, store)
        assert ours.read("zram/bd_stat") == f"{0:8} {0:8} {0:8}\n"
        before, huge = numbers(ours, "mm_stat"), {page for page, marks in flags(ours).items() if "h" in marks}
        await ours.done(("zram/writeback", text))
        assert written(ours) == pages
        count, reads, writes = numbers(ours, "bd_stat")
        assert reads == 0 and count <= len(pages) and (count > 0) == bool(pages) and writes >= count
        after = numbers(ours, "mm_stat")
        assert after[0] == before[0] and after[5] == before[5]
        assert (after[1] < before[1]) == bool(pages)
        assert after[7] == before[7] - len([page for page in pages if page > 4])
        assert not any("i" in marks for page, marks in flags(ours).items() if page in pages)
        # As in the kernel a huge page is shown as one wherever it is; it counts while it takes memory.
        assert {page for page, marks in flags(ours).items() if "h" in marks} == huge == {5, 6, 7, 8}


async def test_what_was_written_back_is_read_stays_there_and_is_freed(tmp_path: Path, store: Path) -> None:
    async with device(tmp_path) as ours:
        await filled(ours, store)
        await ours.done(("zram/writeback", "page_indexes=0-8"))
        assert numbers(ours, "mm_stat")[1:3] == [0, 0]
        assert ours.store.read(0, len(PAGES) * PAGE) == b"".join(PAGES)
        assert numbers(ours, "bd_stat")[1] >= 1
        assert written(ours) == OBJECTS
        await ours.done(("zram/idle", "all"))
        assert not any("i" in marks for marks in flags(ours).values())
        ours.store.write(0, NOISE[0])
        ours.store.write(5 * PAGE + 7, b"part")
        ours.store.zero(6 * PAGE, PAGE)
        assert written(ours) == [1, 2, 3, 7, 8]
        changed = NOISE[0][:7] + b"part" + NOISE[0][11:]
        expected = b"".join([NOISE[0], *PAGES[1:5], changed, bytes(PAGE), *NOISE[2:]])
        assert ours.store.read(0, len(PAGES) * PAGE) == expected
        ours.store.zero(0, 1 << 20)
        assert numbers(ours, "bd_stat")[0] == 0
        ours.store.check(3)


async def test_the_limit_counts_what_is_written(tmp_path: Path, store: Path) -> None:
    async with device(tmp_path) as ours:
        await filled(ours, store, ("zram/writeback_limit", "2"), ("zram/writeback_limit_enable", "1"))
        answer = await ours.write("zram/writeback", "huge")
        assert answer == "EIO" and len(written(ours)) == 2
        assert ours.read("zram/writeback_limit") == "0\n"
        assert numbers(ours, "bd_stat")[2] == 2
        assert await ours.write("zram/writeback", "huge") == "EIO"
        await ours.done(("zram/writeback_limit", "100"), ("zram/writeback", "huge"))
        assert ours.read("zram/writeback_limit") == "98\n"
        await ours.done(("zram/writeback_limit_enable", "0"), ("zram/writeback", "idle"))
        assert ours.read("zram/writeback_limit") == "98\n"
        assert written(ours) == [0, 1, 5, 6, 7, 8]


async def test_incompressible_are_those_that_recompression_gave_up(tmp_path: Path, store: Path) -> None:
    async with device(tmp_path) as ours:
        await filled(ours, store, ("zram/recomp_algorithm", "algo=zstd"))
        await ours.done(("zram/recompress", "type=huge"), ("zram/writeback", "incompressible"))
        assert written(ours) == [5, 6, 7, 8]
        before = flags(ours)
        await ours.done(("zram/recompress", "type=huge"))
        assert {page: marks for page, marks in flags(ours).items() if "w" in marks} == {
            page: marks for page, marks in before.items() if "w" in marks}


async def test_what_reset_forgets_and_what_it_keeps(tmp_path: Path, store: Path) -> None:
    async with device(tmp_path) as ours:
        assert ours.read("zram/backing_dev") == "none\n"
        assert [ours.read(f"zram/{name}") for name in (
            "writeback_limit", "writeback_limit_enable", "writeback_batch_size", "compressed_writeback",
        )] == ["0\n", "0\n", "32\n", "0\n"]
        kept = {"writeback_limit": "7", "writeback_limit_enable": "1", "writeback_batch_size": "5",
                "compressed_writeback": "1"}
        await filled(ours, store, *((f"zram/{name}", value) for name, value in kept.items()))
        assert ours.read("zram/backing_dev") == f"{store}\n"
        await ours.done(("zram/writeback", "page_index=5"))
        assert ours.device.stats().writeback == WritebackStats(runs=1, pages=1)
        await ours.done(("zram/reset", "1"))
        assert ours.device.stats().writeback == WritebackStats()
        assert ours.read("zram/backing_dev") == "none\n"
        kept["writeback_limit"] = "6"
        assert {name: ours.read(f"zram/{name}").strip() for name in kept} == kept
        assert ours.read("zram/bd_stat") == f"{0:8} {0:8} {0:8}\n"
        await ours.done(("zram/disksize", "1M"))
        assert await ours.write("zram/writeback", "huge") == "ENODEV"


@pytest.mark.parametrize("compressed", ["0", "1"])
async def test_compressed_pages_come_back_either_way(tmp_path: Path, store: Path, compressed: str) -> None:
    async with device(tmp_path) as ours:
        await filled(ours, store, ("zram/compressed_writeback", compressed))
        await ours.done(("zram/writeback", "page_indexes=0-8"))
        assert ours.store.read(0, len(PAGES) * PAGE) == b"".join(PAGES)


async def test_two_devices_do_not_share_a_store(tmp_path: Path, store: Path) -> None:
    async with device(tmp_path) as one, device(tmp_path) as other:
        await one.done(("zram/backing_dev", str(store)))
        assert await other.write("zram/backing_dev", str(store)) == "EBUSY"
        await one.done(("zram/reset", "1"))
        await other.done(("zram/backing_dev", str(store)))


async def test_a_full_store_keeps_pages_in_memory(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(bytes(3 * PAGE))
    async with device(tmp_path) as ours:
        await filled(ours, small)
        assert await ours.write("zram/writeback", "huge") == "ENOSPC"
        assert 1 <= len(written(ours)) <= 3
        assert ours.store.read(0, len(PAGES) * PAGE) == b"".join(PAGES)
        ours.store.check(3)
