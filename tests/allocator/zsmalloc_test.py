# SPDX-License-Identifier: Apache-2.0
"""zsmalloc: compaction, the limit, shortage, and any sequence of calls against a dictionary."""
import errno
import random
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from allocator import Arena, Pool
from allocator.check import check
from tests.support import models
from tests.support.memory_file import MemoryFile
from tests.support.models import CHAIN_8, SizeClass, size_class
from tests.support.pool_tools import largest, pattern, scatter, used_classes
from tests.support.scale import scaled

# ---- compaction -------------------------------------------------------------------------------------

@pytest.mark.parametrize("c", CHAIN_8, ids=lambda c: str(c.size))
def test_compaction_frees_what_was_promised(c: SizeClass) -> None:
    pool = Pool(Arena(0, 16))
    size = largest(c)
    tags = list(range(6 * c.objs))
    for tag in tags:
        pool.malloc(tag, pattern(tag, size))
    rng = random.Random(c.size)
    for tag in rng.sample(tags, len(tags) * 2 // 3):
        pool.free(tag)
        tags.remove(tag)
    (before,) = used_classes(pool).values()
    assert before.freeable == (before.obj_allocated - before.obj_used) // c.objs * c.pages
    places = {tag: pool.location(tag) for tag in tags}
    assert pool.compact() == before.freeable
    check(pool, 2)
    (after,) = used_classes(pool).values()
    assert after.freeable == 0 and after.pages_used == -(-len(tags) // c.objs) * c.pages
    assert pool.stats().pages_compacted == before.freeable
    assert all(pool.read(tag) == pattern(tag, size) for tag in tags)
    if before.freeable:
        assert any(pool.location(tag) != place for tag, place in places.items())
    assert pool.compact() == 0
    for tag in tags:
        pool.free(tag)
    assert pool.stats().pages == 0


def test_compaction_empties_the_sparsest() -> None:
    """Of zspages with 2, 4 and 6 of 8 objects only the first one's two are moved."""
    pool = Pool(Arena(0, 16))
    for tag in range(24):
        pool.malloc(tag, pattern(tag, 500))
    zspages: dict[int, list[int]] = {}
    for tag in range(24):
        zspages.setdefault(pool.location(tag)[0], []).append(tag)
    left = {}
    for tags, inuse in zip(zspages.values(), (4, 2, 6), strict=True):
        for tag in tags[inuse:]:
            pool.free(tag)
        left.update({tag: pool.location(tag) for tag in tags[:inuse]})
    sparsest = list(zspages)[1]
    assert pool.compact() == 1
    moved = {tag for tag, place in left.items() if pool.location(tag) != place}
    assert moved == {tag for tag, (number, _) in left.items() if number == sparsest}
    assert all(pool.read(tag) == pattern(tag, 500) for tag in left)


# ---- limit and shortage -------------------------------------------------------------------------------

@pytest.mark.parametrize("c", [size_class(20), size_class(3000), size_class(3624), size_class(4096)],
                         ids=lambda c: str(c.size))
def test_the_limit_is_exact(c: SizeClass) -> None:
    pool = Pool(Arena(0, 4))
    for limit in (c.pages, 3 * c.pages, 4 * c.pages - 1):
        pool.set_limit(limit)
        assert pool.stats().limit_pages == limit
        tag = pool.stats().objects
        with pytest.raises(OSError, match=f"limit of {limit} pages") as failure:
            while True:
                pool.malloc(tag, bytes(largest(c)))
                tag += 1
        assert failure.value.errno == errno.ENOSPC
        assert pool.stats().pages == limit // c.pages * c.pages
        assert pool.stats().objects == tag == limit // c.pages * c.objs
        check(pool, 2)
    pool.free(0)
    pool.malloc(0, bytes(largest(c)))
    pool.set_limit(0)
    pool.malloc(tag, bytes(largest(c)))
    assert pool.stats().max_pages == pool.stats().pages == 4 * c.pages


def test_a_limit_below_what_is_in_use_keeps_what_is_stored() -> None:
    pool = Pool(Arena(0, 4))
    for tag in range(20):
        pool.malloc(tag, bytes(4000))
    pool.set_limit(5)
    assert all(pool.read(tag) == bytes(4000) for tag in range(20))
    with pytest.raises(OSError):
        pool.malloc(20, bytes(4000))
    for tag in range(16):
        pool.free(tag)
    pool.malloc(20, bytes(4000))
    assert pool.stats().pages == 5


def test_exhaustion_is_a_memory_error_and_changes_nothing() -> None:
    arena = Arena(0, 1)
    pool = Pool(arena)
    tag = 0
    with pytest.raises(MemoryError):
        while True:
            pool.malloc(tag, pattern(tag, 3600))
            tag += 1
    c = size_class(3600)
    assert tag == 512 // c.pages * c.objs
    assert arena.stats().frames_used == 512 // c.pages * c.pages
    check(pool, 2)
    assert all(pool.read(n) == pattern(n, 3600) for n in range(0, tag, 17))
    pool.free(0)
    pool.malloc(0, pattern(0, 3600))
    for n in range(tag):
        pool.free(n)
    check(pool, 2)
    assert arena.stats().frames_used == 0


@pytest.mark.parametrize("nth", range(1, 9))
def test_a_zspage_that_lacks_a_frame_leaves_none_behind(nth: int) -> None:
    arena = Arena(0, 2)
    pool = Pool(arena)
    assert size_class(3600).pages == 8
    arena.inject_failure(nth)
    with pytest.raises(MemoryError):
        pool.malloc(1, bytes(3600))
    check(pool, 2)
    assert pool.stats().pages == arena.stats().frames_used == pool.stats().zspages == 0
    pool.malloc(1, bytes(3600))
    assert pool.stats().pages == 8


# ---- arguments and life -------------------------------------------------------------------------------

def test_bad_arguments_change_nothing() -> None:
    arena = Arena(0, 2)
    pool = Pool(arena)
    pool.malloc(7, b"seven")
    for tag, data in ((1, b""), (1, bytes(4097)), (-1, b"x"), (1 << 48, b"x"), (7, b"x")):
        with pytest.raises(ValueError):
            pool.malloc(tag, data)
    for call in (pool.read, pool.free, pool.location):
        with pytest.raises(KeyError, match="named 8"):
            call(8)
    with pytest.raises(ValueError, match="chain of 1 to 8"):
        Pool(Arena(0, 1), 9)
    with pytest.raises(ValueError, match="chain of 1 to 8"):
        Pool(Arena(0, 1), 0)
    check(pool, 2)
    assert (pool.read(7), pool.stats().objects, pool.stats().corrupt) == (b"seven", 1, 0)


def test_the_largest_tag_and_every_buffer() -> None:
    pool = Pool(Arena(0, 2))
    pool.malloc((1 << 48) - 1, memoryview(b"abc"))
    pool.malloc(0, bytearray(b"de"))
    assert (pool.read((1 << 48) - 1), pool.read(0)) == (b"abc", b"de")
    check(pool, 2)


def test_an_arena_takes_one_pool_at_a_time() -> None:
    arena = Arena(0, 2)
    pool = Pool(arena)
    pool.malloc(1, bytes(3600))
    with pytest.raises(ValueError, match="has a pool already"):
        Pool(arena)
    pool.malloc(2, bytes(3600))
    check(pool, 2)
    del pool
    assert arena.stats().frames_used == 0, "a pool that ends gives its frames back"
    again = Pool(arena, 4)
    again.malloc(1, b"anew")
    check(again, 2)


def test_frames_of_a_pool_are_not_the_arenas_to_free() -> None:
    arena = Arena(0, 2)
    pool = Pool(arena)
    pool.malloc(1, bytes(4000))
    (frame,) = MemoryFile(arena.fileno()).zspage(pool.location(1)[0]).frames[:1]
    with pytest.raises(ValueError, match="alloc"):
        arena.free(frame)
    check(pool, 2)


def test_a_pool_ends_with_its_arena() -> None:
    arena = Arena(0, 2)
    pool = Pool(arena)
    pool.malloc(1, b"x")
    arena.close()
    for call in (lambda: pool.malloc(2, b"y"), lambda: pool.read(1), lambda: pool.free(1), pool.compact,
                 lambda: check(pool)):
        with pytest.raises(ValueError, match="closed"):
            call()
    with pytest.raises(ValueError, match="closed"):
        Pool(arena)


# ---- any sequence of calls ------------------------------------------------------------------------------

class PoolMachine(RuleBasedStateMachine):
    """Every call ends as a dictionary and the rules say, failures included; after each, every sum holds."""

    @initialize(scattered=st.booleans())
    def begin(self, scattered: bool) -> None:
        self.arena = Arena(0, 4)
        if scattered:
            scatter(self.arena)
        self.others = self.arena.stats().frames_used
        self.pool = Pool(self.arena)
        self.objects: dict[int, bytes] = {}
        self.next_tag = 0
        self.limit = 0
        self.fail_after = 0
        self.compacted = 0

    def zspages(self, c: SizeClass) -> int:
        used = used_classes(self.pool).get(c.size)
        return sum(used.zspages_by_group) if used else 0

    def needs_zspage(self, c: SizeClass) -> bool:
        in_class = sum(size_class(len(data)) == c for data in self.objects.values())
        return in_class == self.zspages(c) * c.objs

    sizes = st.one_of(
        st.sampled_from([1, 8, 24, 25, 500, 1000, 2040, 2900, 3256, 3624, 3625, 4088, 4089, 4096]),
        st.integers(1, 4096),
    )

    @rule(size=sizes, count=st.integers(1, 40))
    def malloc(self, size: int, count: int) -> None:
        c = size_class(size)
        for _ in range(count):
            tag, data = self.next_tag, pattern(self.next_tag, size)
            self.next_tag += 1
            expected: type[Exception] | None = None
            if self.needs_zspage(c):
                if self.limit and self.pool.stats().pages + c.pages > self.limit:
                    expected = OSError
                elif 0 < self.fail_after <= c.pages:
                    expected = MemoryError
                    self.fail_after = 0
                else:
                    self.fail_after = max(0, self.fail_after - c.pages)
            if expected:
                with pytest.raises(expected):
                    self.pool.malloc(tag, data)
            else:
                self.pool.malloc(tag, data)
                self.objects[tag] = data

    @precondition(lambda self: self.objects)
    @rule(seed=st.integers(0, 2**16), share=st.floats(0, 1))
    def free(self, seed: int, share: float) -> None:
        tags = sorted(self.objects)
        for tag in random.Random(seed).sample(tags, max(1, round(share * len(tags)))):
            assert self.pool.free(tag) == len(self.objects.pop(tag))

    @precondition(lambda self: self.objects)
    @rule()
    def read(self) -> None:
        for tag, data in self.objects.items():
            assert self.pool.read(tag) == data

    @rule()
    def compact(self) -> None:
        promised = sum(c.freeable for c in self.pool.classes())
        assert self.pool.compact() == promised
        self.compacted += promised
        assert self.pool.stats().pages == models.fewest_pages(map(len, self.objects.values()))
        for tag, data in self.objects.items():
            assert self.pool.read(tag) == data

    @rule(limit=st.one_of(st.just(0), st.integers(1, 100)))
    def set_limit(self, limit: int) -> None:
        self.pool.set_limit(limit)
        self.limit = limit

    @rule(after=st.integers(0, 20))
    def inject_failure(self, after: int) -> None:
        self.arena.inject_failure(after)
        self.fail_after = after

    @invariant()
    def sums_hold(self) -> None:
        check(self.pool, 2)

    @invariant()
    def counts_are_the_models(self) -> None:
        stats = self.pool.stats()
        in_class = Counter(size_class(len(data)) for data in self.objects.values())
        assert stats.objects == len(self.objects)
        assert stats.pages == self.arena.stats().frames_used - self.others
        assert stats.pages >= models.fewest_pages(map(len, self.objects.values()))
        assert stats.max_pages >= stats.pages
        assert (stats.limit_pages, stats.pages_compacted, stats.corrupt) == (self.limit, self.compacted, 0)
        for c in self.pool.classes():
            of_model = SizeClass(c.index, c.size, c.pages_per_zspage, c.objs_per_zspage)
            zspages = sum(c.zspages_by_group)
            assert c.obj_used == in_class[of_model]
            assert c.obj_allocated == zspages * of_model.objs
            assert c.pages_used == zspages * of_model.pages
            assert c.freeable == (c.obj_allocated - c.obj_used) // of_model.objs * of_model.pages


PoolMachine.TestCase.settings = settings(max_examples=scaled(40, 16), stateful_step_count=25, deadline=None)
TestPoolMachine = PoolMachine.TestCase
