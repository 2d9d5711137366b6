# SPDX-License-Identifier: Apache-2.0
"""The movable-page core, with an owner whose answers are laid down beforehand: it knows nothing of
what is in a page, asks in the promised order, and loses no page whatever it is told."""
from __future__ import annotations

import errno
import random
import threading
from types import ModuleType

import pytest

from allocator import Arena, Balloon, Migration, Pool
from allocator.stats import CompactionStats
from tests.support import native
from tests.support.memory_file import MemoryFile
from tests.support.migration_tools import assert_at_rest, assert_balanced, in_threads, until
from tests.support.models import PAGEBLOCK_FRAMES

PASSES = 10
# Numbers in layout.h; the owner of the test takes either, since nobody else is on its arena.
OWNERS = {"zsmalloc's number": 1, "the balloon's number": 2}


@pytest.fixture(scope="module")
def probe() -> ModuleType:
    return native.load("probe")


class Scene:
    """One pageblock with n pages of a scripted owner in its first frames, and a second one that has
    room, both in use."""

    def __init__(self, probe: ModuleType, n: int, number: int = 1) -> None:
        self.arena = Arena(0, 2)
        self.migration = Migration(self.arena)
        self.owner = probe.ScriptedOwner(self.arena, number)
        self.pages = [self.owner.add(0x0101010101010101 * i + 7) for i in range(n)]
        assert [self.owner.frame(i) for i in self.pages] == list(range(n))
        self.anchor = self.arena.alloc(9)
        self.arena.free(self.anchor + 8, 3)
        self.anchored = PAGEBLOCK_FRAMES - 8
        self.before = self.arena.stats()

    def move(self, first: int = 0, n: int | None = None) -> OSError | MemoryError | None:
        """Empties a range and frees it; what hindered it."""
        count = len(self.pages) if n is None else n
        try:
            self.migration.alloc_contig_range(first, count)
        except (OSError, MemoryError) as error:
            return error
        for frame in range(first, first + count):
            self.arena.free(frame)
        return None

    def take_room(self, n: int) -> list[int]:
        """So many of the 8 frames that pages could move to."""
        frames = [self.arena.alloc() for _ in range(n)]
        assert all(frame >= PAGEBLOCK_FRAMES for frame in frames)
        return frames

    def settle(self, **expected: int) -> CompactionStats:
        """Nothing is lost, no promise was broken, and of the causes of failure only these are counted."""
        stats = self.migration.stats()
        causes = ("owner_gone", "unmovable", "busy", "again", "refused", "no_target", "put_back")
        assert {name: getattr(stats, name) for name in causes} == dict.fromkeys(causes, 0) | expected
        assert self.owner.violations == 0
        assert_balanced(self.migration)
        assert_at_rest(self.arena, others=len(self.owner) + self.anchored)
        assert all(self.owner.intact(i) for i in self.pages if self.owner.frame(i) is not None)
        return stats

    def unmoved(self) -> bool:
        return [self.owner.frame(i) for i in self.pages] == list(range(len(self.pages)))


# ---- an owner of any kind ---------------------------------------------------------------------------

@pytest.mark.parametrize("number", OWNERS.values(), ids=OWNERS)
def test_pages_move_and_nobody_loses_one(probe: ModuleType, number: int) -> None:
    scene = Scene(probe, 8, number)
    assert scene.move() is None
    stats = scene.settle()
    assert (stats.isolated, stats.migrated, stats.scanned) == (8, 8, 8)
    assert all(scene.owner.frame(i) >= PAGEBLOCK_FRAMES for i in scene.pages)
    assert all(scene.owner.asked(i) == (1, 1, 0) for i in scene.pages)
    scene.owner.close()
    assert scene.arena.stats().frames_used == scene.anchored


def test_a_number_has_one_owner_at_a_time(probe: ModuleType) -> None:
    arena = Arena(0, 2)
    owner = probe.ScriptedOwner(arena, 2)
    with pytest.raises(ValueError):
        probe.ScriptedOwner(arena, 2)
    with pytest.raises(ValueError, match="has a balloon already"):
        Balloon(arena)
    owner.close()
    balloon = Balloon(arena)
    with pytest.raises(ValueError, match="has a balloon already"):
        Balloon(arena)
    # The one that was refused has not ended the other's ownership.
    balloon.set_target(3)
    assert balloon.adjust(10) == 3
    pool = Pool(arena)
    for tag in range(PAGEBLOCK_FRAMES):
        pool.malloc(tag, bytes(4096))
    assert Migration(arena).alloc_contig_range(0, 3) is None
    assert balloon.stats().migrated == 3


def test_pages_without_an_owner_any_more_stay(probe: ModuleType) -> None:
    """Between the end of an ownership and the return of its last page."""
    scene = Scene(probe, 4)
    pages = [scene.owner.frame(i) for i in scene.pages]
    scene.owner.close()
    assert pages == [0, 1, 2, 3] and scene.arena.stats().frames_used == scene.anchored


# ---- what the owner answers -----------------------------------------------------------------------------

def test_isolate_says_no(probe: ModuleType) -> None:
    """A page that was not isolated is put on no list and freed by nobody (the kernel freed one twice),
    and those isolated before it go back unmoved."""
    scene = Scene(probe, 8)
    scene.owner.script(5, refuse=1)
    assert scene.move().errno == errno.EBUSY
    assert scene.unmoved()
    scene.settle(busy=1, put_back=5)
    assert [scene.owner.asked(i) for i in scene.pages] == [(1, 0, 1)] * 5 + [(1, 0, 0)] + [(0, 0, 0)] * 2
    assert scene.arena.stats() == scene.before
    # Now it says yes.
    assert scene.move() is None
    scene.settle(busy=1, put_back=5)


@pytest.mark.parametrize("times", [1, PASSES - 1])
def test_again_is_tried_again(probe: ModuleType, times: int) -> None:
    scene = Scene(probe, 8)
    scene.owner.script(3, again=times)
    scene.owner.script(6, again=1)
    assert scene.move() is None
    scene.settle()
    assert scene.owner.asked(3) == (1, times + 1, 0)
    assert scene.owner.asked(6) == (1, 2, 0)


@pytest.mark.parametrize("times", [PASSES, None])
def test_after_ten_passes_a_busy_page_is_put_back(probe: ModuleType, times: int | None) -> None:
    scene = Scene(probe, 8)
    scene.owner.script(3, again=probe.FOR_EVER if times is None else times)
    assert scene.move().errno == errno.EBUSY
    scene.settle(again=1, put_back=1)
    assert scene.owner.asked(3) == (1, PASSES, 1)
    assert scene.owner.frame(3) == 3
    assert all(scene.owner.asked(i) == (1, 1, 0) for i in scene.pages if i != 3)
    # It is not lost: when it is busy no longer it moves like any other.
    scene.owner.script(3)
    assert scene.move() is None
    assert scene.owner.asked(3) == (2, PASSES + 1, 1)


@pytest.mark.parametrize("error", [errno.EBUSY, errno.EIO, errno.ENOMEM, errno.EINVAL])
def test_another_error_is_given_up_at_once(probe: ModuleType, error: int) -> None:
    """Whatever the errno: an owner's ENOMEM is not the core's."""
    scene = Scene(probe, 8)
    scene.owner.script(2, error=error)
    scene.owner.script(4, again=2, error=error)
    failure = scene.move()
    assert isinstance(failure, OSError) and failure.errno == errno.EBUSY
    scene.settle(refused=2, put_back=2)
    assert scene.owner.asked(2) == (1, 1, 1) and scene.owner.asked(4) == (1, 3, 1)


def test_freed_after_isolation_counts_as_success(probe: ModuleType) -> None:
    """The owner frees one page while the core moves another: nothing is left to move, and the core
    frees it."""
    scene = Scene(probe, 8)
    scene.owner.script(1, on_migrate=lambda: scene.owner.free(6))
    assert scene.move() is None
    stats = scene.settle(owner_gone=1)
    assert (stats.isolated, stats.migrated) == (8, 7)
    assert scene.owner.asked(6) == (1, 0, 0) and scene.owner.frame(6) is None


def test_freed_after_isolation_and_then_put_back(probe: ModuleType) -> None:
    scene = Scene(probe, 8)
    scene.owner.script(5, refuse=1, on_isolate=lambda: scene.owner.free(2))
    assert scene.move().errno == errno.EBUSY
    scene.settle(busy=1, owner_gone=1, put_back=4)
    assert scene.owner.asked(2) == (1, 0, 0)


def test_freed_after_it_was_busy(probe: ModuleType) -> None:
    """Between two passes."""
    scene = Scene(probe, 8)
    scene.owner.script(0, again=2)
    scene.owner.script(7, again=1, on_migrate=lambda: scene.owner.free(0))
    assert scene.move() is None
    scene.settle(owner_gone=1)
    assert scene.owner.asked(0) == (1, 1, 0)


def test_freed_before_isolation(probe: ModuleType) -> None:
    """Between the core's look at a page and its isolation."""
    scene = Scene(probe, 8)
    scene.owner.script(3, on_isolate=lambda: scene.owner.free(4))
    assert scene.move() is None
    scene.settle()
    assert scene.owner.asked(4) == (0, 0, 0)


def test_a_locked_page_is_not_waited_for(probe: ModuleType) -> None:
    scene = Scene(probe, 8)
    assert probe.lock_page(scene.arena, 4)
    assert not probe.lock_page(scene.arena, 4)
    assert scene.move().errno == errno.EBUSY
    assert scene.unmoved() and scene.owner.asked(4) == (0, 0, 0)
    probe.unlock_page(scene.arena, 4)
    scene.settle(busy=1, put_back=4)


def test_an_unmovable_frame_is_seen_before_anything_is_isolated(probe: ModuleType) -> None:
    scene = Scene(probe, 8)
    taken = scene.take_room(8)
    frame = scene.arena.alloc()
    assert frame == 8
    assert scene.move(0, 9).errno == errno.EBUSY
    assert scene.unmoved() and all(scene.owner.asked(i) == (0, 0, 0) for i in scene.pages)
    for other in (frame, *taken):
        scene.arena.free(other)
    scene.settle(unmovable=1)


@pytest.mark.parametrize("number", [3, 77, 255])
def test_an_owner_that_does_not_exist_is_not_called(probe: ModuleType, number: int) -> None:
    scene = Scene(probe, 8)
    memory = MemoryFile(scene.arena.fileno())
    page = memory.page(5)
    memory.set_page(5, page._replace(owner=number))
    assert scene.move().errno == errno.EBUSY
    memory.set_page(5, page)
    scene.settle(busy=1, put_back=5)


# ---- no room ------------------------------------------------------------------------------------------

def test_without_a_target_everything_goes_back(probe: ModuleType) -> None:
    scene = Scene(probe, 8)
    room = scene.take_room(8)
    assert isinstance(scene.move(), MemoryError)
    assert scene.unmoved()
    for frame in room:
        scene.arena.free(frame)
    scene.settle(no_target=8, put_back=8)
    assert scene.arena.stats() == scene.before


@pytest.mark.parametrize("nth", range(1, 11))
def test_the_nth_target_fails(probe: ModuleType, nth: int) -> None:
    """When a migration fails half way, every page is whole, at its old or its new place. The ninth
    allocation is the claim of the emptied range; the tenth does not happen."""
    scene = Scene(probe, 8)
    scene.arena.inject_failure(nth)
    failure = scene.move()
    scene.arena.inject_failure(0)
    moved = [scene.owner.frame(i) >= PAGEBLOCK_FRAMES for i in scene.pages]
    if nth <= 8:
        assert isinstance(failure, MemoryError)
        assert moved == [i != nth - 1 for i in range(8)]
        scene.settle(no_target=1, put_back=1)
    else:
        assert all(moved) and (failure is None) == (nth == 10)
        scene.settle()


def test_the_first_cause_is_told(probe: ModuleType) -> None:
    scene = Scene(probe, 8)
    scene.owner.script(2, again=probe.FOR_EVER)
    scene.arena.inject_failure(1)
    assert isinstance(scene.move(), MemoryError)
    scene.settle(no_target=1, again=1, put_back=2)


# ---- threads -------------------------------------------------------------------------------------------

def test_owners_free_while_the_core_isolates_and_moves(probe: ModuleType) -> None:
    """Pages are freed and made in one thread while two others empty ranges."""
    arena = Arena(0, 8)
    owner = probe.ScriptedOwner(arena, 2)
    migrations = [Migration(arena), Migration(arena)]
    rng = random.Random(5)
    live: list[int] = []
    over = threading.Event()

    def owner_at_work() -> None:
        for n in until(20_000, lambda: all(migration.stats().migrated > 100 for migration in migrations)):
            live.append(owner.add(n))
            if len(live) > 700:
                owner.free(live.pop(rng.randrange(len(live))))
        over.set()

    def mover(migration: Migration, seed: int) -> None:
        own = random.Random(seed)
        while not over.is_set():
            first = own.randrange(4) * PAGEBLOCK_FRAMES + own.randrange(500)
            try:
                migration.alloc_contig_range(first, 12)
            except (OSError, MemoryError):
                continue
            for frame in range(first, first + 12):
                arena.free(frame)

    in_threads(owner_at_work, lambda: mover(migrations[0], 1), lambda: mover(migrations[1], 2), over=over)
    assert owner.violations == 0
    for migration in migrations:
        assert_balanced(migration)
    assert_at_rest(arena, others=len(live))
    assert all(owner.intact(i) for i in live)
    owner.close()
    assert arena.stats().pageblocks_in_use == 0
