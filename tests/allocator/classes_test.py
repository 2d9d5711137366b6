# SPDX-License-Identifier: Apache-2.0
"""Size classes: the kernel's table to the letter, fullness groups, every place of every class."""
import itertools
import random
from collections import Counter

import pytest

from allocator import Arena, Pool
from allocator.check import check
from tests.support import models
from tests.support.memory_file import MemoryFile
from tests.support.models import CHAIN_8, SizeClass, size_class
from tests.support.pool_tools import FRAME, largest, pattern, scatter, used_classes

# ---- the class table ----------------------------------------------------------------------------

def test_class_table_of_the_kernel() -> None:
    classes = Pool(Arena(0, 1)).classes()
    assert [SizeClass(c.index, c.size, c.pages_per_zspage, c.objs_per_zspage) for c in classes] == CHAIN_8
    assert all(c.index == (c.size - 32) // 16 for c in classes)


@pytest.mark.parametrize(
    "chain_max, classes, watermark",
    [(4, 69, 3264), (5, 86, 3408), (6, 94, 3504), (7, 110, 3584), (8, 119, 3632)],
)
def test_number_of_classes_and_huge_watermark(chain_max: int, classes: int, watermark: int) -> None:
    pool = Pool(Arena(0, 64), chain_max)
    assert len(pool.classes()) == classes
    assert [c.size for c in pool.classes()][-2:] == [watermark, FRAME]
    assert pool.huge_size == watermark - models.OBJ_HEADER + 1


@pytest.mark.parametrize("chain_max", range(1, 9))
def test_huge_size_is_the_border(chain_max: int) -> None:
    pool = Pool(Arena(0, 64), chain_max)
    pool.malloc(1, bytes(pool.huge_size - 1))
    (shared,) = used_classes(pool).values()
    assert shared.objs_per_zspage > 1
    pool.malloc(2, bytes(pool.huge_size))
    assert used_classes(pool)[FRAME].obj_used == 1
    check(pool, 2)


@pytest.mark.parametrize("chain_max", range(1, 9))
def test_a_class_wastes_as_little_as_its_chain_allows(chain_max: int) -> None:
    for c in Pool(Arena(0, 1), chain_max).classes():
        assert 1 <= c.pages_per_zspage <= chain_max
        if c.size & (c.size - 1):
            least = min(pages * FRAME % c.size for pages in range(1, chain_max + 1))
            assert c.pages_per_zspage * FRAME % c.size == least
        assert c.objs_per_zspage == c.pages_per_zspage * FRAME // c.size <= 256


def test_every_size_goes_into_the_smallest_class_that_holds_it() -> None:
    pool = Pool(Arena(0, 8))
    for size in range(1, FRAME + 1):
        pool.malloc(size, pattern(size, size))
        (used,) = used_classes(pool)
        assert used == size_class(size).size
        assert pool.read(size) == pattern(size, size)
        assert pool.free(size) == size
    check(pool, 2)
    assert pool.stats().pages == 0


# ---- fullness -------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, objs", [(32, 128), (3264, 5), (3632, 9), (144, 199)])
def test_fullness_groups(size: int, objs: int) -> None:
    """1 of 127 objects is in the 10 % group: a group is a tenth, and what is not full is not 100 %."""
    pool = Pool(Arena(0, 8))
    for inuse in range(1, objs + 1):
        pool.malloc(inuse, bytes(size - 8))
        groups = used_classes(pool)[size].zspages_by_group
        expected = 11 if inuse == objs else 100 * inuse // objs // 10 + 1
        assert groups == tuple(int(group == expected) for group in range(12)), f"{inuse} of {objs}"
        check(pool, 1)


@pytest.mark.parametrize(
    "inuse, objs, group",
    [(1, 128, 1), (12, 128, 1), (13, 128, 2), (115, 128, 9), (116, 128, 10), (127, 128, 10), (128, 128, 11)],
)
def test_borders_of_the_groups(inuse: int, objs: int, group: int) -> None:
    pool = Pool(Arena(0, 8))
    for tag in range(inuse):
        pool.malloc(tag, b"x")
    assert used_classes(pool)[32].zspages_by_group[group] == 1


def test_objects_go_into_the_fullest_zspage() -> None:
    pool = Pool(Arena(0, 8))
    c = size_class(500)
    assert (c.size, c.objs) == (512, 8)
    for tag in range(6 * c.objs):
        pool.malloc(tag, bytes(500))
    zspages = [{tag for tag in range(6 * c.objs) if pool.location(tag)[0] == n}
               for n in {pool.location(tag)[0] for tag in range(6 * c.objs)}]
    # In use after this: 1, 4, 7, 5, 2, 6 of 8.
    for tags, inuse in zip(zspages, (1, 4, 7, 5, 2, 6), strict=True):
        for tag in sorted(tags)[inuse:]:
            pool.free(tag)
            tags.remove(tag)
    numbers = [pool.location(min(tags))[0] for tags in zspages]
    order = []
    for tag in range(1000, 1000 + 6 * c.objs - 25):
        pool.malloc(tag, bytes(500))
        order.append(pool.location(tag)[0])
    # 7 of 8 takes one, then 6 of 8 two, 5 of 8 three, and so on down to the sparsest.
    fullest_first = [(2, 1), (5, 2), (3, 3), (1, 4), (4, 6), (0, 7)]
    assert order == [numbers[n] for n, count in fullest_first for _ in range(count)]
    assert used_classes(pool)[512].zspages_by_group[11] == 6


def test_an_empty_zspage_is_freed_at_once() -> None:
    arena = Arena(0, 8)
    pool = Pool(arena)
    c = size_class(3000)
    for tag in range(2 * c.objs):
        pool.malloc(tag, bytes(3000))
    first = pool.location(0)[0]
    tags = [tag for tag in range(2 * c.objs) if pool.location(tag)[0] == first]
    for tag in tags[:-1]:
        pool.free(tag)
        assert pool.stats().pages == 2 * c.pages == arena.stats().frames_used
    pool.free(tags[-1])
    assert pool.stats().pages == c.pages == arena.stats().frames_used
    check(pool, 2)


# ---- every place of every class -------------------------------------------------------------------

@pytest.mark.parametrize("scattered", [False, True], ids=["neighbours", "scattered"])
@pytest.mark.parametrize("c", CHAIN_8, ids=lambda c: str(c.size))
def test_every_place(c: SizeClass, scattered: bool) -> None:
    arena = Arena(0, 4)
    if scattered:
        scatter(arena)
    base = arena.stats().frames_used
    pool = Pool(arena)
    size = largest(c)
    tags = list(range(2 * c.objs + 1))
    for tag in tags:
        pool.malloc(tag, pattern(tag, size))
    check(pool, 2)
    (used,) = used_classes(pool).values()
    assert (used.size, used.obj_used, used.pages_used) == (c.size, len(tags), 3 * c.pages)
    places = Counter(pool.location(tag) for tag in tags)
    assert max(places.values()) == 1
    numbers = {number for number, _ in places}
    assert Counter(index for _, index in places).total() == len(tags) and len(numbers) == 3
    assert sum(index < c.objs for _, index in places) == len(tags)
    full = [n for n in numbers if sum(number == n for number, _ in places) == c.objs]
    assert len(full) >= 2 and all((n, index) in places for n in full for index in range(c.objs))
    # The chain is longer than one frame because objects straddle its borders.
    starts = range(0, c.objs * c.size, c.size)
    straddling = sum(start // FRAME != (start + c.size - 1) // FRAME for start in starts)
    assert straddling == c.pages - 1 - sum(k * FRAME % c.size == 0 for k in range(1, c.pages))
    if scattered:
        frames = MemoryFile(arena.fileno()).zspage(min(numbers)).frames[:c.pages]
        assert all(b - a != 1 for a, b in itertools.pairwise(frames))
    shuffled = random.Random(c.size).sample(tags, len(tags))
    for tag in shuffled:
        assert pool.read(tag) == pattern(tag, size)
    for n, tag in enumerate(shuffled):
        assert pool.free(tag) == size
        if n % 64 == 0:
            check(pool, 2)
            assert all(pool.read(rest) == pattern(rest, size) for rest in shuffled[n + 1:n + 4])
    check(pool, 2)
    assert pool.stats().pages == 0 and arena.stats().frames_used == base


def test_one_byte_more_than_a_class_holds_does_not_spill() -> None:
    """Objects of every size up to the class's, side by side, keep to themselves."""
    for c in (size_class(57), size_class(1000), size_class(3600), size_class(4000)):
        pool = Pool(Arena(0, 4))
        sizes = [size for size in range(max(1, largest(c) - 15), largest(c) + 1) for _ in range(2)]
        for tag, size in enumerate(sizes):
            pool.malloc(tag, b"\xff" * size)
        for tag, size in enumerate(sizes):
            if tag % 2:
                pool.free(tag)
                pool.malloc(tag, b"\x55" * size)
        for tag, size in enumerate(sizes):
            assert pool.read(tag) == (b"\x55" if tag % 2 else b"\xff") * size
