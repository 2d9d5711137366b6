# SPDX-License-Identifier: Apache-2.0
"""A migration that fails half way, or that is disturbed by others, leaves every object readable.

Pages of a scripted owner lie between the pool's pages. When the core comes to one of them, it is exactly
between two steps, and there the test does what another thread could do.
"""
from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from types import ModuleType

import pytest

from allocator import Arena, Migration
from tests.support import native
from tests.support.migration_tools import PoolScene, assert_at_rest, fill, in_threads, until
from tests.support.models import PAGEBLOCK_FRAMES, SizeClass, size_class
from tests.support.scale import scaled

PASSES = 10
BATCH = 32  # pages isolated at a time; the first batch that fails is the last
HUGE = size_class(4096)
LONG = size_class(2500)  # 13 objects in 8 frames
TWO = size_class(1150)  # 7 objects in 2 frames


@pytest.fixture(scope="module")
def probe() -> ModuleType:
    return native.load("probe")


class Between(PoolScene):
    """Frames 0, 2, 4 ... are the pool's; 1, 3, 5 ... have a scripted owner. Migration goes up."""

    def __init__(self, probe: ModuleType, c: SizeClass, zspages: int = 1) -> None:
        super().__init__()
        n = 2 * c.pages * zspages
        places = [self.arena.alloc() for _ in range(n)]
        assert places == list(range(n))
        self.probe = probe
        self.owner = probe.ScriptedOwner(self.arena, 2)
        self.span = n
        for frame in places[1::2]:
            self.arena.free(frame)
            self.owner.add(frame)
        for frame in reversed(places[::2]):
            self.arena.free(frame)
        assert [self.owner.frame(i) for i in range(n // 2)] == places[1::2]
        self.tags = self.fill(c, zspages)
        assert sorted(frame for tag in self.tags[::c.objs] for frame in self.frames(tag)) == places[::2]
        self.number = self.pool.location(self.tags[0])[0]

    def empty(self) -> OSError | MemoryError | None:
        return self.move(0, self.span)

    def finish(self) -> None:
        """Deferred zspages go, and everything is at rest and readable."""
        self.pool.compact()
        self.settle(others=len(self.owner))
        assert self.owner.violations == 0
        assert all(self.owner.intact(i) for i in range(self.span // 2))


# ---- the last object goes -------------------------------------------------------------------------------

def test_an_object_freed_after_isolation(probe: ModuleType) -> None:
    """The zspage moves on, and goes back to the list of its present fullness, which check() knows."""
    scene = Between(probe, LONG)
    scene.owner.script(7, on_isolate=lambda: scene.free(*scene.tags[3:9]))
    assert scene.empty() is None
    assert scene.migration.stats().migrated == scene.span
    scene.finish()


@pytest.mark.parametrize("step", ["isolate", "migrate"])
@pytest.mark.parametrize("c", [HUGE, TWO, LONG], ids=lambda c: str(c.size))
def test_all_objects_freed_after_isolation(probe: ModuleType, c: SizeClass, step: str) -> None:
    """Free leaves the zspage to the migration, which can't move what is empty, and can't free it either
    while the page is locked: it is put back, and queued."""
    scene = Between(probe, c)
    last = scene.span // 2 - 1
    hook: Callable[[], None] = lambda: scene.free(*scene.tags)  # noqa: E731
    if step == "isolate":
        scene.owner.script(last, on_isolate=hook)
        stay = c.pages
    else:
        # The first of the pool's pages has moved already.
        scene.owner.script(0, on_migrate=hook)
        stay = c.pages - 1
    failure = scene.empty()
    assert failure is None if stay == 0 else failure.errno == errno.EBUSY
    stats = scene.migration.stats()
    assert (stats.refused, stats.put_back, stats.again) == (stay, stay, 0)
    assert stats.migrated == scene.span - stay
    if stay:
        assert probe.deferred_zspages(scene.pool) == [scene.number]
    elif step == "migrate":
        assert probe.deferred_zspages(scene.pool) == []
    scene.finish()
    assert scene.pool.stats().pages == 0


def test_all_objects_freed_before_a_page_is_put_back(probe: ModuleType) -> None:
    """Nothing was tried to be moved: putback alone finds the zspage empty."""
    scene = Between(probe, LONG)
    scene.owner.script(5, refuse=1, on_isolate=lambda: scene.free(*scene.tags))
    assert scene.empty().errno == errno.EBUSY
    assert scene.migration.stats().migrated == 0
    assert probe.deferred_zspages(scene.pool) == [scene.number]
    scene.finish()
    assert scene.pool.stats().pages == 0


# ---- others at work meanwhile -----------------------------------------------------------------------------

def test_no_object_comes_into_an_isolated_zspage(probe: ModuleType) -> None:
    scene = Between(probe, LONG)
    scene.free(*scene.tags[:4])

    def allocate() -> None:
        for tag in range(100, 104):
            scene.malloc(tag, 2500)

    scene.owner.script(0, on_isolate=allocate)
    assert scene.empty() is None
    assert {scene.pool.location(tag)[0] for tag in range(100, 104)}.isdisjoint({scene.number})
    # Back on its list it takes objects again.
    before = scene.pool.stats().zspages
    for tag in range(200, 204):
        scene.malloc(tag, 2500)
    assert scene.pool.stats().zspages == before
    scene.finish()


def test_object_compaction_leaves_an_isolated_zspage_alone(probe: ModuleType) -> None:
    scene = Between(probe, LONG, 2)
    sparse = scene.tags[:LONG.objs]
    scene.free(*sparse[2:], *scene.tags[-4:])
    places = {tag: scene.pool.location(tag) for tag in scene.sizes}
    freed = []
    scene.owner.script(7, on_isolate=lambda: freed.append(scene.pool.compact()))
    assert scene.empty() is None
    assert freed == [0]
    assert {tag: scene.pool.location(tag) for tag in scene.sizes} == places
    # And now it is emptied.
    assert scene.pool.compact() == LONG.pages
    scene.finish()


def test_an_object_read_at_its_new_place_while_its_neighbour_waits(probe: ModuleType) -> None:
    """Objects that straddle a moved and an unmoved page."""
    scene = Between(probe, LONG)
    for i in range(scene.span // 2):
        scene.owner.script(i, on_migrate=scene.readable)
    assert scene.empty() is None
    scene.finish()


def test_a_zspage_of_which_one_page_was_isolated(probe: ModuleType) -> None:
    """The others are in another pageblock, or freed and used otherwise; it counts pages, not zspages."""
    scene = Between(probe, LONG)
    seen = []
    scene.owner.script(0, on_isolate=lambda: seen.append(scene.memory.zspage(scene.number).isolated))
    scene.owner.script(4, on_isolate=lambda: seen.append(scene.memory.zspage(scene.number).isolated))
    assert scene.move(0, 2) is None
    assert seen == [1]
    assert scene.move(4, 6) is None
    assert seen == [1, 3]
    assert probe.isolated_zspages(scene.pool) == 0
    scene.finish()


# ---- readers --------------------------------------------------------------------------------------------

def test_a_reader_is_never_waited_for(probe: ModuleType) -> None:
    """All pages of a zspage in the hands of a reader are busy, ten times over, and stay."""
    scene = Between(probe, LONG)
    before = scene.memory.zspage(scene.number)
    loc = probe.read_begin(scene.pool, scene.tags[5])
    assert scene.memory.zspage(scene.number).rwlock == 1
    assert scene.empty().errno == errno.EBUSY
    stats = scene.migration.stats()
    assert (stats.again, stats.put_back, stats.migrated) == (LONG.pages, LONG.pages, LONG.pages)
    scene.readable()
    probe.read_end(scene.pool, loc)
    assert scene.memory.zspage(scene.number) == before
    scene.finish()
    # There is one zspage in the pool, and it is on its list: the pages move now.
    assert scene.empty() is None
    scene.finish()


@pytest.mark.parametrize("leaves", [1, 5, PASSES - 1])
def test_a_reader_that_leaves_between_two_passes(probe: ModuleType, leaves: int) -> None:
    scene = Between(probe, TWO)
    loc = probe.read_begin(scene.pool, scene.tags[3])
    passes = []

    def end_of_pass() -> None:
        passes.append(len(passes))
        if len(passes) == leaves:
            probe.read_end(scene.pool, loc)
            scene.owner.script(1)
        else:
            scene.owner.script(1, again=1, on_migrate=end_of_pass)

    # The last page of the range; the pool's come before it, and are tried again in the next pass.
    scene.owner.script(1, again=1, on_migrate=end_of_pass)
    assert scene.empty() is None
    assert scene.owner.asked(1) == (1, leaves, 0)
    assert scene.migration.stats().migrated == scene.span
    scene.finish()


def test_a_reader_who_comes_when_a_page_has_moved(probe: ModuleType) -> None:
    """One page at its new place, the other one kept at its old by a reader."""
    scene = Between(probe, TWO)
    held = []
    scene.owner.script(0, on_migrate=lambda: held.append(probe.read_begin(scene.pool, scene.tags[2])))
    assert scene.empty().errno == errno.EBUSY
    frames = scene.frames(scene.tags[0])
    assert (frames[0] in range(scene.span), frames[1] in range(scene.span)) == (False, True)
    scene.readable()
    probe.read_end(scene.pool, *held)
    scene.finish()
    assert scene.empty() is None
    scene.finish()


# ---- memory is short ----------------------------------------------------------------------------------

@pytest.mark.parametrize("nth", range(1, 2 * LONG.pages + 3))
@pytest.mark.parametrize("call", ["alloc_contig_range", "alloc_contig", "run"])
def test_the_nth_allocation_fails(probe: ModuleType, call: str, nth: int) -> None:
    """Every frame but 16 pages of the zspage and the owner, and 20 places to move them to, is in use."""
    scene = Between(probe, LONG)
    rest = fill(scene.arena)
    in_the_way = [frame for frame in rest if frame < PAGEBLOCK_FRAMES] if call == "run" else []
    for frame in in_the_way + [frame for frame in rest if frame > PAGEBLOCK_FRAMES][:40:2]:
        scene.arena.free(frame)
        rest.remove(frame)
    scene.arena.inject_failure(nth)
    # Besides the targets there are the claim and, in alloc_contig(), the look for a free block.
    others = {"run": 0, "alloc_contig_range": 1, "alloc_contig": 2}[call]
    enough = scene.span + others
    try:
        if call == "run":
            assert scene.migration.run() == (nth > enough)
        elif call == "alloc_contig":
            scene.arena.free(scene.migration.alloc_contig(4), 4)
        else:
            assert (scene.move(0, scene.span) is None) == (nth > enough)
    except MemoryError:
        assert call == "alloc_contig"
    scene.arena.inject_failure(0)
    for frame in rest:
        scene.arena.free(frame)
    scene.finish()


def test_a_full_arena_moves_nothing_and_loses_nothing() -> None:
    scene = PoolScene(1)
    tags = list(range(PAGEBLOCK_FRAMES))
    for tag in tags:
        scene.malloc(tag, 4096)
    assert isinstance(scene.move(0, PAGEBLOCK_FRAMES), MemoryError)
    assert isinstance(scene.move(7, 1), MemoryError)
    stats = scene.migration.stats()
    assert stats.no_target == stats.put_back == BATCH + 1
    assert scene.migration.run() == 0
    scene.settle()


# ---- two cores ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("nr_pageblocks", [6, 40])
def test_many_threads_at_once(nr_pageblocks: int) -> None:
    """Objects of all sizes, read and rewritten without the GIL, while both compactions and contiguous
    allocation go on. In the small arena memory is short all the time."""
    arena = Arena(0, nr_pageblocks)
    crowd = native.load("crowd").Crowd(arena, 3000 if nr_pageblocks > 6 else 1200)
    migrations = [Migration(arena), Migration(arena)]
    over = threading.Event()

    def worker(seed: int) -> None:
        def reached() -> bool:
            migrated = sum(migration.stats().migrated for migration in migrations)
            return migrated > 100 and crowd.operations > 10_000

        for n in until(scaled(20, 8), reached):
            crowd.work(0.05, seed + 2 * n)
        over.set()

    def compactor() -> None:
        while not over.is_set():
            crowd.compact()
            migrations[0].run()

    def contiguous() -> None:
        order = 0
        while not over.is_set():
            order = (order + 1) % 10
            try:
                frame = migrations[1].alloc_contig(order)
            except MemoryError:
                continue
            arena.free(frame, order)

    in_threads(lambda: worker(1), lambda: worker(2), compactor, contiguous, over=over)
    crowd.compact()
    assert crowd.operations > 10_000
    assert crowd.isolated == 0
    crowd.verify()
    crowd.check(2)
    crowd.empty()
    crowd.compact()
    assert_at_rest(arena)
