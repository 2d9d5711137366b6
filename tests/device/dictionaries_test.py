# SPDX-License-Identifier: Apache-2.0
"""Dictionaries that a device trains by itself: when it looks, what it takes, and what becomes of old ones."""
from __future__ import annotations

import errno
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from tests.support.box import MIB, PAGE, Box
from tests.support.page_kinds import noise, prose, record
from tests.support.paths import python_environment
from zramfs.device import dictionaries, postprocess
from zramfs.device.dictionaries import DictionaryArguments, parse_dictionary
from zramfs.device.postprocess import UnitArguments
from zramfs.device.restoring import restore_image
from zramfs.device.takeover import settings_of
from zramfs.errors import ZramfsError
from zramfs.model.config import Algorithm
from zramfs.model.contents import steps_of
from zramfs.store.saving import SaveRun
from zramfs.store.secondary import count_in_units, count_priorities, set_secondary
from zramfs.store.store import Store
from zramfs.tree import metrics
from zramfs.tree.state import control_text

N = 600
rest = trio.lowlevel.checkpoint


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds for 16 MiB of pages holds for 2. Their dictionary costs more than they can win."""
    monkeypatch.setattr(dictionaries, "LEAST_FRESH", 500)
    monkeypatch.setattr(dictionaries, "TRAINED_ON", 320)
    monkeypatch.setattr(dictionaries, "JUDGED_BY", 80)
    monkeypatch.setattr(dictionaries, "WORTH", 0.1)


async def full(kind=record, first: int = 0, **more: object) -> Box:
    box = await Box(**{"size": 32 * MIB, **more}).start()
    fill(box, kind, first)
    return box


def fill(box: Box, kind=record, first: int = 0, at: int = 0) -> None:
    for number in range(N):
        box.store.write((at + number) * PAGE, kind(first + number))


def digits(seed: int) -> bytes:
    """Half of it can be saved, and nothing by what other pages have."""
    return random.Random(seed).randbytes(PAGE // 2).hex().encode()


def holds(box: Box, kind=record, first: int = 0, at: int = 0) -> bool:
    box.store.check(3)
    return box.store.read(at * PAGE, N * PAGE) == b"".join(kind(first + number) for number in range(N))


@pytest.mark.parametrize("text, wanted", [
    ("", DictionaryArguments()), ("idle=all", DictionaryArguments(marked=False)),
    ("idle=0x10 level=9", DictionaryArguments(age=16, level=9)),
])
def test_what_dictionary_takes(text: str, wanted: DictionaryArguments) -> None:
    assert parse_dictionary(text) == wanted


@pytest.mark.parametrize("text, words", [
    ("idle=soon", "all or an age"), ("level=0", "no level 0"), ("level=99", "level"),
    ("size=3", "takes idle= and level=, not"),
])
async def test_what_dictionary_refuses(text: str, words: str) -> None:
    box = await Box(size=MIB).start()
    with pytest.raises(ZramfsError, match=words):
        await box.device.command(f"dictionary {text}")
    assert box.device.stats().dictionaries.trained == 0


async def test_with_the_figures_of_a_real_device_it_is_taken_when_it_wins_twice_what_it_costs() -> None:
    box = await Box(size=64 * MIB).start()
    for number in range(6000):
        box.store.write(number * PAGE, record(number % 3000))
    before = box.store.stats().mem_used_total
    await box.device.command("dictionary idle=all")
    done = box.device.stats().dictionaries
    (generation,) = done.generations
    assert (generation.number, generation.priority, generation.level, generation.pages) == (1, 1, 3, 6000)
    assert generation.won >= 2 * generation.memory and generation.memory >= 3 * generation.size
    assert box.store.stats().mem_used_total < before - generation.won
    assert (done.trained, done.taken, done.rejected) == (1, 1, 0) and done.verdict.startswith("taken: ")
    assert 0 < done.cpu_seconds < 20
    step = steps_of(box.device.stats())["dictionaries"]
    assert step == (6000, generation.won, round(done.cpu_seconds * 1e9))
    box.store.check(3)


async def test_fewer_than_16_mib_of_cold_pages_are_not_looked_at() -> None:
    box = await full()
    with pytest.raises(ZramfsError, match="at least 4096 cold pages .* got 600") as caught:
        await box.device.command("dictionary idle=all")
    assert caught.value.errno == errno.EINVAL
    assert not await box.device.dictionaries.consider(rest, marked=False)
    assert box.device.stats().dictionaries.trained == 0


async def test_marked_pages_are_sampled_judged_and_recompressed_and_no_others(few: None) -> None:
    box = await full(access_times=True)
    fill(box, record, 5000, at=N)
    with pytest.raises(ZramfsError, match="got 0"):
        await box.device.command("dictionary")
    await box.device.command("idle=all")
    box.store.read(N * PAGE, N * PAGE)
    await box.device.command("dictionary")
    assert count_priorities(box.store) == (N, N, 0, 0)
    assert holds(box) and holds(box, record, 5000, at=N)


@pytest.mark.parametrize("kind", [noise, digits])
async def test_pages_that_have_nothing_in_common_make_no_dictionary(kind, few: None) -> None:
    box = await full(kind)
    before = box.store.stats()
    assert not await box.device.dictionaries.consider(rest, marked=False)
    done = box.device.stats().dictionaries
    assert (done.rejected, done.taken, done.generations) == (1, 0, ()) and "rejected: " in done.verdict
    assert box.store.stats() == before and holds(box, kind)


async def test_a_dictionary_that_costs_more_than_it_wins_is_rejected(
    few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dictionaries, "WORTH", 2)
    box = await full(prose)
    assert not await box.device.dictionaries.consider(rest, marked=False)
    assert box.device.stats().dictionaries.rejected == 1 and count_priorities(box.store) == (N, 0, 0, 0)


async def test_it_looks_again_only_when_much_has_changed(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    box = await full(noise)
    written = 0
    monkeypatch.setattr(box.device.dictionaries, "_written", lambda: written)
    own = box.device.dictionaries

    async def looks() -> bool:
        before = own.stats().trained
        await own.consider(rest, marked=False)
        return own.stats().trained > before

    assert await looks() and not await looks()
    written = 999 * PAGE
    assert not await looks(), "twice as much as the first time"
    fill(box, noise, 9000, at=N)  # a page more for each, without a word of what was written
    assert await looks()
    written += 1999 * PAGE
    assert not await looks(), "and twice as much again"
    written += PAGE
    assert await looks(), "although that is more than there are pages"
    await box.device.command("dictionary idle=all")
    assert own.stats().trained == 4, "a person need not wait for that"


async def test_other_data_gets_a_dictionary_of_its_own_and_the_old_one_goes_when_no_page_needs_it(
    few: None,
) -> None:
    box = await full(algorithms=(Algorithm("lz4"), Algorithm("zstd", 6)))
    await box.device.command("dictionary idle=all")
    assert [each.priority for each in box.device.stats().dictionaries.generations] == [2]
    assert box.device.stats().dictionaries.generations[0].level == 6
    first = box.store.codecs[2].dictionary

    def other(seed: int) -> bytes:
        return record(seed).upper()

    fill(box, other, at=N)
    await box.device.command("dictionary idle=all")
    assert box.store.codecs[2].dictionary == first and box.device.stats().dictionaries.taken == 2
    box.store.zero(0, N * PAGE)
    await box.device.command("dictionary idle=all")
    done = box.device.stats().dictionaries
    assert box.store.codecs[2] is None and done.dropped == 1
    assert [(each.number, each.priority) for each in done.generations] == [(2, 3)]
    assert holds(box, other, at=N)


async def test_pages_of_an_old_generation_go_to_the_newest_which_then_stands_alone(few: None) -> None:
    box = await full()
    set_secondary(box.store, 3, dictionaries.Codec("zstd", 3, prose(1)))
    post = box.device._post
    await post.recompress(box.store, 3, dictionaries.RecompressArguments())
    assert count_priorities(box.store)[3] > N // 2
    await box.device.command("dictionary idle=all")
    done = box.device.stats().dictionaries
    assert [(each.number, each.priority, each.pages) for each in done.generations] == [(2, 1, N)]
    assert done.dropped == 1 and box.device.dictionaries.newest == 1
    assert holds(box)


async def test_with_all_priorities_taken_none_is_trained(few: None) -> None:
    box = await full(algorithms=tuple(Algorithm("zstd", level) for level in (1, 2, 3, 4)))
    with pytest.raises(ZramfsError, match="free priority"):
        await box.device.command("dictionary idle=all")
    assert not await box.device.dictionaries.consider(rest, marked=False)
    assert box.device.stats().dictionaries.trained == 0


async def test_there_are_three_generations_at_most(few: None) -> None:
    box = await full()
    for priority in (1, 2, 3):
        set_secondary(box.store, priority, dictionaries.Codec("zstd", 1, prose(priority)))
        await box.device._post.recompress(
            box.store, priority, dictionaries.RecompressArguments(max_pages=100 * priority))
    assert all(count_priorities(box.store)[1:])
    with pytest.raises(ZramfsError, match="free priority"):
        await box.device.command("dictionary idle=all")
    assert len(box.device.stats().dictionaries.generations) == 3


async def test_what_is_in_use_stands_in_control_and_in_recomp_algorithm_until_reset(few: None) -> None:
    box = await full(algorithms=(Algorithm("lz4"), Algorithm("lz4hc", 9)))
    assert "dictionaries none\n" in control_text(box.device.stats())
    await box.device.command("dictionary idle=all level=9")
    assert box.show("recomp_algorithm") == "#1: lz4 [lz4hc] zstd \n#2: lz4 lz4hc [zstd] \n"
    text = control_text(box.device.stats())
    assert "dictionaries #2 zstd level 9 with 64K: 600 pages, " in text and "1 trained, 1 taken" in text
    assert "#2 zstd level 9:" in text
    figures = metrics.openmetrics_text(box.device).decode()
    for line in ('dictionaries_trained_total{device="z0"} 1.0',
                 'dictionary_pages{device="z0",priority="2"} 600.0',
                 'dictionaries_total{device="z0",result="taken"} 1.0',
                 'dictionaries_total{device="z0",result="dropped"} 0.0'):
        assert f"\nzramfs_{line}\n" in figures
    assert "zramfs_dictionary_memory_bytes{" in figures and "zramfs_dictionary_won_bytes{" in figures
    await box.device.command("reset")
    assert box.show("recomp_algorithm") == "" and box.device.stats().dictionaries.taken == 0
    assert "dictionaries" not in control_text(box.device.stats()).partition("Commands")[0]


async def test_a_device_without_a_size_a_save_and_other_post_processing_are_in_its_way(few: None) -> None:
    box = await Box().start()
    with pytest.raises(ZramfsError, match="not set up"):
        await box.device.command("dictionary")
    box = await full()
    run = SaveRun(box.store)
    with pytest.raises(ZramfsError, match="a save or other") as caught:
        await box.device.command("dictionary idle=all")
    assert caught.value.errno == errno.EBUSY
    assert not await box.device.dictionaries.consider(rest, marked=False)
    run.finish()
    await box.device.command("dictionary idle=all")
    assert box.device.stats().dictionaries.trained == 1


async def packed(box: Box) -> None:
    await box.device._post.make_units(box.store, UnitArguments(marked=False, level=9))


async def test_where_all_is_to_be_in_units_it_is_judged_by_units_and_recompresses_nothing(
    few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dictionaries, "WORTH", 0)
    box = await full()
    own = box.device.dictionaries
    assert await own.consider(rest, marked=False, level=9, in_units=True)
    assert count_priorities(box.store) == (N, 0, 0, 0)
    await packed(box)
    assert not await own.consider(rest, marked=False, level=9, in_units=True), "nothing has changed"
    (generation,) = own.stats().generations
    units = count_in_units(box.store)[1]
    assert units == box.store.stats().unit_pages > 0.9 * N
    assert (generation.level, generation.pages) == (9, units + count_priorities(box.store)[1])
    assert 0 < generation.won < generation.pages * 1000
    assert own.stats().verdict.startswith("taken: ")
    assert holds(box)


async def test_what_a_dictionary_wins_in_units_is_less_than_of_single_pages(
    few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the one that a device takes for single pages may be refused for units."""
    monkeypatch.setattr(dictionaries, "WORTH", 1000)
    won = []
    box = await full()
    for in_units in (False, True):
        assert not await box.device.dictionaries.consider(
            rest, marked=False, asked=True, in_units=in_units)
        verdict = box.device.stats().dictionaries.verdict
        won.append(int(re.search(r", (-?\d+) bytes each", verdict)[1]))
    assert 0 < won[1] < 0.8 * won[0]
    assert box.device.stats().dictionaries.rejected == 2 and holds(box)


async def test_pages_in_units_are_cold_where_they_are_to_be_made_anew(
    few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dictionaries, "WORTH", 0)
    box = await full()
    await packed(box)
    before = box.store.stats().unit_bytes
    assert not await box.device.dictionaries.consider(rest, marked=False)
    assert await box.device.dictionaries.consider(rest, marked=False, level=9, in_units=True)
    await packed(box)
    assert box.store.stats().unit_bytes < before and count_in_units(box.store)[1] > 0.9 * N
    assert holds(box)


@pytest.mark.parametrize("kind", [noise, digits])
async def test_pages_without_anything_in_common_make_none_for_units(kind, few: None) -> None:
    box = await full(kind)
    assert not await box.device.dictionaries.consider(rest, marked=False, in_units=True)
    assert box.device.stats().dictionaries.rejected == 1 and holds(box, kind)


async def test_a_generation_stays_until_no_unit_needs_it(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dictionaries, "WORTH", 0)
    box = await full()
    own = box.device.dictionaries
    assert await own.consider(rest, marked=False, level=9, in_units=True)
    await packed(box)
    box.store.zero(0, (N - 16) * PAGE)
    await own.consider(rest, marked=False, level=9, in_units=True)
    assert (own.newest, own.stats().dropped) == (1, 0)
    box.store.zero((N - 16) * PAGE, 16 * PAGE)
    await own.consider(rest, marked=False, level=9, in_units=True)
    assert (own.newest, own.stats().dropped) == (None, 1)
    box.store.check(3)


MEMORY = """
import trio
from tests.device.dictionaries_test import MIB, PAGE, Box, digits
from zramfs.host import heap

def figure(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) << 10

async def main():
    heap.give_large_blocks_back()  # as each daemon does
    box = await Box(size=64 * MIB).start()
    for number in range(4096):
        box.store.write(number * PAGE, digits(number))
    before = figure("RssAnon:")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    peak = figure("VmHWM:")
    await box.device.dictionaries.consider(trio.lowlevel.checkpoint, marked=False)
    assert box.device.stats().dictionaries.rejected == 1
    print(figure("RssAnon:") - before, figure("VmHWM:") - peak)

trio.run(main)
"""


@pytest.mark.requires("unsanitized")
def test_a_round_takes_8_mib_and_gives_them_back() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], env=python_environment(), capture_output=True,
                          text=True, timeout=60, check=True)
    left, most = map(int, done.stdout.split())
    assert 4 * MIB < most <= 9 * MIB and left <= MIB


@pytest.mark.parametrize("slices", [1, 3, 12])
async def test_a_reset_cuts_a_round_short(slices: int, few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postprocess, "SLICE_NS", 1)
    box = await full()
    passed = 0

    async def counted() -> None:
        nonlocal passed
        passed += 1
        await trio.lowlevel.checkpoint()

    ended = []

    async def command() -> None:
        job = box.device.jobs.begin("dictionary", alone=True)
        try:
            await job.run(lambda: box.device.dictionaries.consider(counted, marked=False, asked=True))
        except ZramfsError as error:
            ended.append(error.errno)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(command)
        while passed < slices:
            await trio.sleep(0.001)
        await box.device.command("reset")
    assert ended == [errno.EINTR] and box.device.stats().disksize == 0


async def test_a_successor_finds_the_dictionaries_and_what_they_were_worth(few: None) -> None:
    box = await full()
    await box.device.command("dictionary idle=all")
    saved = json.loads(json.dumps(settings_of(box.device)))
    before = box.device.stats().dictionaries
    other = await full()
    set_secondary(other.store, 1, box.store.codecs[1])
    other.device.dictionaries.inherit(saved["dictionaries"])
    after = other.device.stats().dictionaries
    assert (after.taken, after.verdict) == (1, before.verdict)
    assert after.generations[0].memory == before.generations[0].memory
    fill(other)
    assert await other.device.dictionaries.consider(rest, marked=False)
    done = other.device.stats().dictionaries
    assert (done.dropped, done.taken) == (1, 2), "no page needed the first one"


async def test_pages_of_an_image_keep_their_dictionary(few: None, tmp_path: Path) -> None:
    box = await full()
    await box.device.command("dictionary idle=all")
    box.store.write(N * PAGE, prose(1))
    await box.device.command(f"save={tmp_path / 'image'}")
    for secondary, generations in ((), (0, 1, 0, 0)), ((dictionaries.Codec("zstd"),), (0, 0, 1, 0)):
        store = Store(32 * MIB, secondary=secondary)
        restore_image(store, tmp_path / "image", whole=True)
        assert store.generations == generations
        assert count_priorities(store)[generations.index(1)] == N
        assert store.read(0, N * PAGE) == b"".join(map(record, range(N)))
        store.check(3)
        store.close()


async def test_an_image_whose_dictionary_no_page_needs_brings_none(few: None, tmp_path: Path) -> None:
    box = await full()
    set_secondary(box.store, 2, dictionaries.Codec("zstd", 3, prose(1)))
    await box.device.command(f"save={tmp_path / 'image'}")
    store = Store(32 * MIB)
    restore_image(store, tmp_path / "image", whole=True)
    assert store.codecs[1:] == (None, None, None) and count_priorities(store) == (N, 0, 0, 0)
    store.close()
