# SPDX-License-Identifier: Apache-2.0
"""zsmalloc as an owner of movable pages: what moves stays whole, whatever happens half way.

The numbered parts are bugs that users of the kernel's migration series found. Another one, a page that was
not isolated and was freed twice, needs an isolate() that refuses: tests/allocator/migrate_test.py shows it.
"""
from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Callable
from types import ModuleType

import pytest

from allocator import Arena, Migration, Pool
from allocator.check import check
from tests.support import native
from tests.support.memory_file import MemoryFile
from tests.support.migration_tools import PoolScene, assert_at_rest, assert_balanced, in_threads, until
from tests.support.models import CHAIN_8, PAGEBLOCK_FRAMES, SizeClass, size_class
from tests.support.pool_tools import largest, pattern
from tests.support.scale import scaled

LONG = size_class(2500)  # 13 objects in 8 frames
HUGE = size_class(4096)
OFF_LIST = 255


@pytest.fixture(scope="module")
def probe() -> ModuleType:
    return native.load("probe")


# ---- 1: objects in every page of every class ------------------------------------------------------------

@pytest.mark.parametrize("c", CHAIN_8, ids=lambda c: str(c.size))
def test_1_every_class_and_every_page(c: SizeClass) -> None:
    """A move changes one word of the zspage: no header, no location and no link of its free chain."""
    scene = PoolScene(scattered=True)
    tags = scene.fill(c, 2)
    number = scene.pool.location(0)[0]
    mine = [tag for tag in tags if scene.pool.location(tag)[0] == number]
    for tag in random.Random(c.size).sample(mine, c.objs // 3):
        scene.free(tag)
    places = {tag: scene.pool.location(tag) for tag in scene.sizes}
    keeper = next(tag for tag in mine if tag in scene.sizes)
    for page in range(c.pages):
        before, chain = scene.memory.zspage(number), scene.chain(number)
        assert len(chain) == c.objs // 3
        assert scene.move(before.frames[page]) is None
        after = scene.memory.zspage(number)
        assert after.frames[page] not in before.frames
        assert after.frames == (*before.frames[:page], after.frames[page], *before.frames[page + 1:])
        # It has been off its list and come back, maybe with another neighbour.
        assert after._replace(frames=before.frames, next=before.next, prev=before.prev) == before
        assert scene.chain(number) == chain
        assert scene.frames(keeper) == list(after.frames[:c.pages])
        scene.settle()
    assert {tag: scene.pool.location(tag) for tag in scene.sizes} == places
    assert scene.migration.stats().migrated == c.pages
    # The free places take new objects, and no new zspage is made for them.
    for tag in range(10_000, 10_000 + c.objs // 3):
        scene.malloc(tag, largest(c))
    assert scene.pool.stats().zspages == 2
    scene.settle()
    scene.free(*list(scene.sizes))
    scene.settle()


# ---- 3: pages of free objects -------------------------------------------------------------------------

@pytest.mark.parametrize("c", [c for c in CHAIN_8 if 2 < c.pages < c.objs], ids=lambda c: str(c.size))
def test_3_a_page_of_free_objects_keeps_its_chain(c: SizeClass) -> None:
    """Nothing is pinned for such a page, and its links move with it."""
    scene = PoolScene(scattered=True)
    tags = scene.fill(c)
    number = scene.pool.location(0)[0]
    rng = random.Random(c.size)
    tags.remove(rng.choice(tags))
    scene.free(*rng.sample(tags, len(tags)))
    chain = scene.chain(number)
    assert len(chain) == c.objs - 1
    for page in range(c.pages):
        assert scene.move(scene.memory.zspage(number).frames[page]) is None
        assert scene.chain(number) == chain
        scene.settle()
    for tag, index in enumerate(chain, 10_000):
        scene.malloc(tag, largest(c))
        assert scene.pool.location(tag) == (number, index)
    scene.settle()


# ---- 4: damage is refused ---------------------------------------------------------------------------------

Damage = Callable[[MemoryFile, int, int], None]


def zspage_field(**fields: int) -> Damage:
    def damage(memory: MemoryFile, frame: int, number: int) -> None:
        memory.set_zspage(number, memory.zspage(number)._replace(**fields))
    return damage


def page_ref(ref: int) -> Damage:
    def damage(memory: MemoryFile, frame: int, number: int) -> None:
        memory.set_page(frame, memory.page(frame)._replace(ref=ref))
    return damage


def no_such_frame(memory: MemoryFile, frame: int, number: int) -> None:
    z = memory.zspage(number)
    memory.set_zspage(number, z._replace(frames=tuple(f if f != frame else f + 1 for f in z.frames)))


DAMAGES: dict[str, Damage] = {
    "no magic": zspage_field(magic=0),
    "another magic": zspage_field(magic=0x7A74),
    "no such class": zspage_field(class_idx=255),
    "the page names another zspage": page_ref(1),
    "the page names a zspage that was never made": page_ref(700),
    "the page names a zspage past the end": page_ref(4 * PAGEBLOCK_FRAMES),
    "the page names no zspage": page_ref(0xFFFFFFFF),
    "the zspage lists another frame": no_such_frame,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_4_a_damaged_page_is_refused(damage: Damage) -> None:
    scene = PoolScene()
    scene.fill(LONG, 2)
    number = scene.pool.location(0)[0]
    frame = scene.frames(0)[1]
    page, zspage, before = scene.memory.page(frame), scene.memory.zspage(number), scene.arena.stats()
    damage(scene.memory, frame, number)
    assert scene.move(frame).errno == errno.EBUSY
    assert scene.pool.stats().corrupt == 1
    assert (scene.migration.stats().isolated, scene.migration.stats().busy) == (0, 1)
    assert scene.arena.stats() == before
    scene.memory.set_page(frame, page)
    scene.memory.set_zspage(number, zspage)
    assert scene.move(frame) is None
    scene.readable()
    with pytest.raises(AssertionError, match="Z4.*1 locations named no object"):
        check(scene.pool, 2)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_4_a_page_that_is_damaged_after_isolation_is_refused(probe: ModuleType, damage: Damage) -> None:
    """migrate() and putback() look at the magic too. The zspage stays off its list then, its objects
    readable; the frames come back with the pool."""
    scene = PoolScene()
    scene.fill(HUGE)
    scene.malloc(9, 4096)
    owner = probe.ScriptedOwner(scene.arena, 2)
    helper = owner.add(5)
    number = scene.pool.location(0)[0]
    assert (scene.frames(0), scene.frames(9), owner.frame(helper)) == ([0], [1], 2)
    page, zspage = scene.memory.page(0), []

    def break_it() -> None:
        zspage.append(scene.memory.zspage(number))
        damage(scene.memory, 0, number)

    owner.script(helper, on_isolate=break_it)
    assert scene.move(0, 3).errno == errno.EBUSY
    stats = scene.migration.stats()
    assert (stats.isolated, stats.migrated, stats.refused, stats.put_back) == (3, 2, 1, 1)
    assert scene.pool.stats().corrupt == 2
    scene.memory.set_page(0, page)
    scene.memory.set_zspage(number, zspage[0])
    scene.readable()
    assert probe.isolated_zspages(scene.pool) == 1 and scene.zspage(0).fullness == OFF_LIST
    owner.close()
    assert owner.violations == 0
    del scene.pool
    assert scene.arena.stats().frames_used == 0
    check(scene.arena, 2)


# ---- 5: deferred frees and the end of a pool ---------------------------------------------------------------

def deferred(probe: ModuleType) -> tuple[PoolScene, int]:
    """A zspage whose last object was freed while somebody had one of its pages locked: that page."""
    scene = PoolScene()
    tags = scene.fill(LONG)
    frame = scene.frames(0)[2]
    assert probe.lock_page(scene.arena, frame)
    scene.free(*tags)
    assert probe.deferred_zspages(scene.pool) == [0]
    assert (scene.pool.stats().pages, scene.pool.stats().zspages) == (LONG.pages, 0)
    check(scene.pool, 2)
    # Until it is freed it can't be isolated.
    assert scene.move(scene.memory.zspage(0).frames[0]).errno == errno.EBUSY
    return scene, frame


def test_5_a_locked_page_defers_the_free(probe: ModuleType) -> None:
    scene, frame = deferred(probe)
    probe.unlock_page(scene.arena, frame)
    assert scene.pool.compact() == 0
    assert probe.deferred_zspages(scene.pool) == []
    scene.settle()
    assert scene.arena.stats().frames_used == 0


@pytest.mark.parametrize("end", ["compact", "delete"])
def test_5_the_deferred_free_waits_for_the_lock(probe: ModuleType, end: str) -> None:
    """Also with the pool's end: nobody may be at work on its pages after that."""
    scene, frame = deferred(probe)
    released = []

    def release() -> None:
        time.sleep(0.1)
        released.append(scene.arena.stats().frames_used)
        probe.unlock_page(scene.arena, frame)

    def finish() -> None:
        if end == "compact":
            scene.pool.compact()
        else:
            del scene.pool

    in_threads(finish, release)
    assert released == [LONG.pages]
    assert scene.arena.stats().frames_used == 0
    check(scene.arena, 2)


def test_5_object_compaction_defers_too(probe: ModuleType) -> None:
    scene = PoolScene()
    tags = scene.fill(LONG, 2)
    scene.free(*tags[1:LONG.objs], tags[-1])
    frame = scene.frames(tags[0])[0]
    seen = []

    def release() -> None:
        end = time.monotonic() + 60
        while scene.pool.stats().zspages > 1 and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.02)
        seen.append((scene.pool.stats().zspages, scene.pool.stats().pages))
        probe.unlock_page(scene.arena, frame)

    assert probe.lock_page(scene.arena, frame)
    in_threads(release, scene.pool.compact)
    assert seen == [(1, 2 * LONG.pages)]
    assert scene.pool.stats().pages == scene.pool.stats().pages_compacted == LONG.pages
    scene.settle()


def test_5_a_pool_ends_while_its_pages_are_moved() -> None:
    arena = Arena(0, 6)
    migration = Migration(arena)
    over = threading.Event()
    rng = random.Random(4)

    def owner() -> None:
        for seed in until(scaled(40, 12), lambda: migration.stats().migrated > 500):
            pool = Pool(arena)
            tags = list(range(1200))
            for tag in tags:
                pool.malloc(tag, pattern(tag & 63, rng.randrange(1, 4097)))
            for tag in rng.sample(tags, 700):
                pool.free(tag)
            if seed % 2:
                time.sleep(0.002)
            del pool
            check(arena, 1)
        over.set()

    def mover() -> None:
        while not over.is_set():
            migration.run()

    in_threads(owner, mover, over=over)
    assert_balanced(migration)
    assert_at_rest(arena)
