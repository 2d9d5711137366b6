# SPDX-License-Identifier: Apache-2.0
"""The estimate of what density would win, against what recompression, sharing and units then make of a
store."""
from __future__ import annotations

import functools
import math
import os
import random
import statistics
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.backing_tools import backed, write_back
from tests.support.memory_file import MemoryFile
from tests.support.mixed_pages import mixed
from tests.support.page_kinds import noise, prose
from tests.support.recompress_tools import recompress
from tests.support.share_tools import share
from tests.support.unit_tools import make_units
from zramfs.codecs.codec import Codec
from zramfs.model.estimate import ERRORS, LEVEL, Estimate
from zramfs.store import block_state
from zramfs.store.estimate import Estimating
from zramfs.store.secondary import drop_secondary, set_secondary
from zramfs.store.store import Store

PAGE = 4096
MIB = 1 << 20
PAGES = 2048


def estimate(store: Store, **how: object) -> Estimate:
    work = Estimating(store, **how)
    try:
        while work.step(1_000_000):
            pass
        return work.result()
    finally:
        work.finish()


@functools.cache
def contents(pages: int = PAGES, seed: int = 1) -> bytes:
    return mixed(pages, seed)


def filled(data: bytes, **how: object) -> Store:
    store = Store(len(data), **{"secondary": [Codec("zstd", 9)], **how})
    store.write(0, data)
    store.compact()
    return store


def make_dense(store: Store, priority: int | None = 1) -> int:
    """All that density does, and the memory of the pool afterwards."""
    if priority is not None:
        recompress(store, priority)
    share(store)
    make_units(store, level=LEVEL)
    store.compact()
    store.check(2)
    return store.stats().mem_used_total


def test_the_estimate_of_mixed_contents_is_what_is_then_made_of_them() -> None:
    store = filled(contents())
    before = store.stats().mem_used_total
    found = estimate(store, priority=1)
    after = make_dense(store)
    assert (found.data, found.memory, found.error) == (len(contents()), before, 0)
    assert found.sampled_groups == found.groups and after < 0.8 * before
    assert found.after == pytest.approx(after, rel=0.04)
    stats = store.stats()
    assert found.unit_pages == pytest.approx(stats.unit_pages, rel=0.02)
    assert found.shared_pages == stats.shared_pages > 100
    assert found.is_worth and found.ratio < found.ratio_after and found.cpu_ns > 0


def test_without_an_algorithm_to_recompress_with_units_and_sharing_are_what_there_is() -> None:
    store = filled(contents(), secondary=[])
    found = estimate(store)
    assert found.after == pytest.approx(make_dense(store, None), rel=0.04)


def test_a_sample_is_enough_and_its_error_is_what_it_says() -> None:
    """A quarter of the groups, chosen in 12 ways. The seeds are fixed, so the bounds hold always or never."""
    store = filled(contents())
    truth = estimate(store, priority=1)
    found = [estimate(store, priority=1, sample=2 * MIB, seed=seed) for seed in range(12)]
    assert {each.sampled_groups for each in found} == {32} and truth.sampled_groups == 128
    assert len({each.after for each in found}) > 8
    assert statistics.mean(each.after for each in found) == pytest.approx(truth.after, rel=0.05)
    assert statistics.median(abs(each.after / truth.after - 1) for each in found) < 0.1
    off = [(each.after - truth.after) / each.error for each in found]
    assert sum(abs(each) > ERRORS for each in off) <= 3
    assert 0.5 < math.sqrt(statistics.mean(each * each for each in off)) < 1.8


def test_the_same_seed_chooses_the_same_sample() -> None:
    store = filled(contents()[:4 * MIB])
    one, other, third = (estimate(store, priority=1, sample=MIB, seed=seed) for seed in (7, 7, 8))
    assert (one.after, one.error, one.unit_pages) == (other.after, other.error, other.unit_pages)
    assert (one.after, one.error) != (third.after, third.error)


def test_copies_outside_of_the_sample_are_found() -> None:
    """Each page is twice on the device, far apart, and no sample of a quarter would have many of both."""
    half = b"".join(prose(number) for number in range(768))
    store = filled(half + half)
    found = estimate(store, priority=1, sample=2 * MIB, seed=5)
    assert found.shared_pages == found.sampled_pages == 512
    assert found.after == pytest.approx(make_dense(store), rel=0.1)


def test_nothing_changes_on_the_device(tmp_path: Path) -> None:
    with backed(tmp_path / "backing", 4 * MIB, secondary=[Codec("zstd", 9)]) as store:
        store.access_times = True
        store.write(0, contents()[:2 * MIB])
        make_units(store)
        write_back(store, (0, 64))
        store.write(MIB, contents(512, 7)[:MIB])
        share(store)
        store.mark_idle()
        file = MemoryFile(store.migration.arena.fileno())
        slots = [file.slot_word(number) for number in range(1024)]
        lines, before = block_state.lines(store, 0, 1 << 20), store.stats()
        found = estimate(store, priority=1)
        assert found.sampled_pages < 512 and found.groups < 32, "pages on the backing store take no memory"
        assert [file.slot_word(number) for number in range(1024)] == slots
        assert block_state.lines(store, 0, 1 << 20) == lines
        after = store.stats()
        assert {name for name in after.__slots__ if getattr(after, name) != getattr(before, name)} <= {
            "units_unpacked"}


def test_a_device_that_is_dense_has_nothing_to_win() -> None:
    store = filled(contents())
    assert estimate(store, priority=1).is_worth
    memory = make_dense(store)
    found = estimate(store, priority=1)
    assert not found.is_worth and found.after == pytest.approx(memory, rel=0.03)
    assert found.saved < 0.02 * memory


def test_noise_has_nothing_to_win_and_an_empty_device_neither() -> None:
    store = filled(b"".join(noise(number) for number in range(256)))
    found = estimate(store, priority=1)
    assert (found.is_worth, found.after, found.saved) == (False, found.memory, 0)
    empty = estimate(Store(MIB))
    assert (empty.data, empty.memory, empty.after, empty.groups, empty.sampled_pages) == (0, 0, 0, 0, 0)
    assert empty.ratio is None and not empty.is_worth


def test_a_device_that_wipes_makes_no_units() -> None:
    data = contents()[:4 * MIB]
    store = filled(data, wipe=True)
    found = estimate(store, priority=1)
    assert found.unit_pages == 0
    recompress(store)
    share(store)
    store.compact()
    assert found.after == pytest.approx(store.stats().mem_used_total, rel=0.04)


def test_a_sparse_device_is_looked_through_quickly_and_bounded_samples_stay_bounded() -> None:
    store = Store(1 << 40, secondary=[Codec("zstd", 9)])
    for number in range(0, 64 * 512, 512):
        store.write((number << 20) % (1 << 40), prose(number % 50))
    found = estimate(store, priority=1, sample=MIB)
    assert found.sampled_groups == 16 and 16 < found.groups <= 64
    assert found.sampled_pages == 16


def test_it_goes_on_beside_writes_discards_and_other_post_processing() -> None:
    store = filled(contents())
    work = Estimating(store, priority=1, sample=4 * MIB, seed=1)
    rounds = 0
    while work.step(1):
        at = rounds * 7 % PAGES
        store.write(at * PAGE, os.urandom(PAGE) if rounds % 3 else prose(rounds % 50))
        store.zero((rounds * 11 % PAGES) * PAGE, PAGE)
        if rounds == 5:
            make_units(store)
        if rounds == 40:
            share(store)
        rounds += 1
    found = work.result()
    work.finish()
    assert rounds > 50 and 0 < found.after <= found.memory
    store.check(3)


def test_estimates_beside_a_thread_that_writes_reads_and_discards_change_nothing_of_what_is_there() -> None:
    pages = 512
    store = filled(contents()[:pages * PAGE])
    model = [contents()[number * PAGE:(number + 1) * PAGE] for number in range(pages)]
    make_units(store)
    share(store)
    wrong: list[int] = []

    def use() -> None:
        rng = random.Random(8)
        for turn in range(3000):
            number = rng.randrange(pages)
            if turn % 3 == 0:
                model[number] = model[rng.randrange(pages)]
                store.write(number * PAGE, model[number])
            elif turn % 3 == 1:
                wrong.extend([number] * (store.read(number * PAGE, PAGE) != model[number]))
            elif turn % 30 == 2:
                model[number] = bytes(PAGE)
                store.zero(number * PAGE, PAGE)

    thread = threading.Thread(target=use)
    thread.start()
    rounds = 0
    while thread.is_alive() or not rounds:
        assert 0 < estimate(store, priority=1, sample=MIB).after <= 2 * pages * PAGE
        rounds += 1
    thread.join()
    assert not wrong
    store.check(3)
    assert store.read(0, pages * PAGE) == b"".join(model)


def test_what_it_refuses_and_that_it_can_end_at_any_step() -> None:
    store = filled(contents()[:MIB])
    with pytest.raises(ValueError, match="priority 2"):
        Estimating(store, priority=2)
    for steps in range(8):
        work = Estimating(store, priority=1)
        for _ in range(steps):
            work.step(1)
        with pytest.raises(ValueError, match="not yet at its end"):
            work.result()
        work.finish()
        with pytest.raises(ValueError, match="finished"):
            work.step(1)
    store.close()


def test_an_estimate_holds_on_to_its_algorithm_which_the_store_may_give_up_meanwhile() -> None:
    store = filled(contents()[:MIB])
    codec = Codec("zstd", 9, b"".join(map(prose, range(16))))
    set_secondary(store, 2, codec)
    first = estimate(store, priority=2, seed=1)
    work = Estimating(store, priority=2, seed=1)
    assert drop_secondary(store, 2)
    while work.step(1):
        pass
    assert replace(work.result(), cpu_ns=0, own_ns=0) == replace(first, cpu_ns=0, own_ns=0)
    work.finish()
