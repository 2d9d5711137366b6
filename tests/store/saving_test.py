# SPDX-License-Identifier: Apache-2.0
"""Saves of a store in use: what is saved is what was there at one instant."""
from __future__ import annotations

import errno
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.support.backing_tools import backed, backing_file, write_back
from tests.support.images import SLICE, content, restored, saving
from tests.support.images import save as save_store
from tests.support.page_kinds import KINDS, block, noise
from tests.support.share_tools import share
from tests.support.steps import PAGE, Writer, at_work, in_turn
from tests.support.unit_tools import make_units
from zramfs.codecs.codec import Codec
from zramfs.store.backing import Backing
from zramfs.store.recompress import Recompression
from zramfs.store.resize import resize
from zramfs.store.saving import SaveRun
from zramfs.store.store import Store

MIB = 1 << 20


def test_a_save_is_the_state_at_one_instant_whatever_goes_on(tmp_path: Path) -> None:
    """Writes and discards in one order from two threads, others in an order of their own; recompression,
    units, sharing, write-back, both compactions and the balloon beside them."""
    backing = Backing(str(backing_file(tmp_path / "backing", 16 * MIB)))
    store = Store(24 * MIB, secondary=[Codec("zstd", 3)], backing=backing)
    ordered = [Writer(store, 0, 701), Writer(store, 1024, 601)]
    alone = [Writer(store, 2048, 801), Writer(store, 3072, 901)]
    still = {n: block("mixed", n, PAGE) for n in range(4096, 6000)}
    for n, data in still.items():
        store.write(n * PAGE, data)
    for writer in ordered + alone:
        for _ in range(1000):
            writer.advance()
    step = in_turn(ordered)

    def recompress() -> None:
        run = Recompression(store, 1, max_pages=200)
        try:
            while run.select(SLICE):
                pass
            while run.step(SLICE):
                pass
        finally:
            run.finish()

    made = 0

    def post_process() -> None:
        nonlocal made
        recompress()
        share(store)
        made += make_units(store).made
        store.mark_idle()
        write_back(store, mode="idle", budget=100)

    def tidy() -> None:
        store.compact()
        store.balloon.set_target(random.randrange(400))
        store.balloon.adjust(100)
        store.migration.run()
        time.sleep(0.001)

    kept = rounds = 0
    with at_work(step, step, *(writer.advance for writer in alone), post_process, tidy):
        began = time.monotonic()
        while True:
            lasted, stats = time.monotonic() - began, store.stats()
            enough = kept > 300 and stats.written_back and stats.pages_compacted and made
            if lasted > 2.5 and rounds >= 4 and enough or lasted > 100:
                break
            path = tmp_path / f"image{rounds}"
            before = [writer.step for writer in ordered + alone]
            with saving(store, path) as rest:
                time.sleep(0.01)
                between = [writer.step for writer in ordered + alone]
                run = rest()
                kept += run.kept
            image = content(path)
            found = [writer.steps_in(image) for writer in ordered + alone]
            assert abs(found[0] - found[1]) <= 1, "the steps of both have one order"
            # A step is counted before it is taken: the last of those before may not have been.
            assert all(a - 1 <= b <= c + 1 for a, b, c in zip(before, found, between, strict=True))
            assert all(image[n * PAGE:n * PAGE + PAGE] == data for n, data in still.items())
            path.unlink()
            rounds += 1
    assert kept > 300, "pages were overwritten before their turn"
    assert store.stats().written_back and store.stats().pages_compacted and made
    store.check(3)
    store.close()


def test_writes_of_every_kind_leave_what_was_there_at_the_instant(tmp_path: Path) -> None:
    with backed(tmp_path / "backing", 8 * MIB) as store:
        model = bytearray(8 * MIB)
        for n in range(0, 1800):
            data = block(KINDS[n % len(KINDS)], n, PAGE)
            store.write(n * PAGE, data)
            model[n * PAGE:n * PAGE + PAGE] = data
        write_back(store, (300, 900))
        assert store.stats().written_back
        with saving(store, tmp_path / "image") as rest:
            for n in range(0, 2000, 3):                     # whole pages, also of the backing store
                store.write(n * PAGE, block("random", n + 7, PAGE))
            for n in range(1, 2000, 3):                     # parts of pages
                store.write(n * PAGE + 100, b"part of a page" * 20)
            store.zero(100 * PAGE, 50 * PAGE)               # discards
            store.zero(1000 * PAGE + 5, 200 * PAGE)
            run = rest()
            assert run.kept > 1000 and run.lost == 0
        assert content(tmp_path / "image") == model
        store.check(3)


def test_pages_of_units_are_saved_as_single_pages(tmp_path: Path) -> None:
    store = Store(8 * MIB, secondary=[Codec("zstd", 3)])
    for n in range(1024):
        store.write(n * PAGE, block("text", n, PAGE))
    save_store(store, tmp_path / "single")
    before = store.read(0, 8 * MIB)
    assert make_units(store).made == 64
    with saving(store, tmp_path / "image") as rest:
        for n in range(0, 1024, 5):                     # a place that becomes dead before its turn
            store.write(n * PAGE, noise(n))
        store.zero(512 * PAGE, 32 * PAGE)               # units that go
        run = rest()
        assert run.kept > 200 and run.lost == 0
    store.check(3)
    store.close()
    assert content(tmp_path / "image") == before
    single, units = ((tmp_path / name).stat().st_size for name in ("single", "image"))
    assert 0.95 < units / single < 1.05, "compressed as they were before"


def test_the_end_of_the_device_that_is_cut_off_meanwhile_is_saved(tmp_path: Path) -> None:
    store = Store(8 * MIB, grows_to=16 * MIB)
    for n in range(2048):
        store.write(n * PAGE, block("text", n, PAGE))
    before = store.read(0, 8 * MIB)
    with saving(store, tmp_path / "smaller") as rest:
        resize(store, 4 * MIB, discard=True)
        rest()
    with saving(store, tmp_path / "larger") as rest:
        resize(store, 12 * MIB)
        store.write(11 * MIB, b"new")
        rest()
    store.check(3)
    store.close()
    assert content(tmp_path / "smaller") == before
    assert content(tmp_path / "larger") == before[:4 * MIB]


def test_a_writer_without_room_waits_for_the_save(tmp_path: Path) -> None:
    """It overwrites twice what both buffers have room for, and the save begins to take pages only then."""
    store = Store(64 * MIB)
    old = noise(1) * 8192
    store.write(0, old)
    done = threading.Event()

    def overwrite() -> None:
        store.write(0, noise(2) * 8192)
        done.set()

    with saving(store, tmp_path / "image") as rest:
        thread = threading.Thread(target=overwrite, daemon=True)
        thread.start()
        assert not done.wait(1), "it must wait: there is room for 16 MiB"
        run = rest()
        thread.join(100)
        assert run.kept > 4096 - 100
    assert store.read(0, 32 * MIB) == noise(2) * 8192
    assert content(tmp_path / "image")[:32 * MIB] == old
    store.check(3)
    store.close()


def test_a_save_that_takes_nothing_fails_and_the_writer_goes_on(tmp_path: Path) -> None:
    store = Store(64 * MIB)
    store.write(0, noise(1) * 8192)
    with saving(store, tmp_path / "image") as rest:
        began = time.monotonic()
        store.write(0, noise(2) * 8192)
        # 8192 pages: if each waited it would be hours.
        assert 4.5 < time.monotonic() - began < 200, "it waits five seconds, and only once"
        with pytest.raises(OSError, match="overwritten faster than they could be saved") as caught:
            rest()
        assert caught.value.errno == errno.ENOSPC
    assert store.read(0, 32 * MIB) == noise(2) * 8192
    assert not (tmp_path / "image").exists()
    save_store(store, tmp_path / "image")
    assert content(tmp_path / "image")[:32 * MIB] == noise(2) * 8192
    store.check(3)
    store.close()


def test_a_page_that_cannot_be_read_is_lost_in_the_image_too(tmp_path: Path) -> None:
    with backed(tmp_path / "backing") as store:
        for n in range(64):
            store.write(n * PAGE, noise(n))
        write_back(store, (10, 20))
        with open(tmp_path / "backing", "r+b") as file:
            file.write(bytes(PAGE * 10))
        save_store(store, tmp_path / "image")
        made, lost, damage = restored(tmp_path / "image")
        assert lost == [(10, 19)] and damage == []
        assert made.read(0, 10 * PAGE) == b"".join(noise(n) for n in range(10))
        save_store(made, tmp_path / "again")
        made.close()
        again, lost, _ = restored(tmp_path / "again")
        assert lost == [(10, 19)], "and in an image of that"
        again.close()


def test_a_full_device_takes_no_more_than_it_has_room_for(tmp_path: Path) -> None:
    store = Store(8 * MIB)
    store.write(0, noise(3) * 1024)
    save_store(store, tmp_path / "image")
    store.close()
    with pytest.raises(OSError, match="do not fit") as caught:
        restored(tmp_path / "image", mem_limit=2 * MIB)
    assert caught.value.errno == errno.ENOSPC


def test_a_store_whose_process_is_killed_during_a_save_goes_on_without_it() -> None:
    fd = os.memfd_create("store")
    pid = os.fork()
    if pid == 0:
        store = Store(8 * MIB, fd=fd)
        store.write(0, noise(1) * 1000)
        run = SaveRun(store)
        run.start()
        while run.scan(SLICE):
            pass
        run.fill(SLICE)
        store.write(100 * PAGE, noise(2) * 800)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    store = Store.adopt(fd)
    store.check(3)
    assert store.recovered.lost == 0
    assert store.read(0, 1000 * PAGE) == noise(1) * 100 + noise(2) * 800 + noise(1) * 100
    store.zero(0, 8 * MIB)
    SaveRun(store).finish()
    store.close()
    os.close(fd)


def test_one_save_at_a_time(tmp_path: Path) -> None:
    store = Store(MIB)
    run = SaveRun(store)
    with pytest.raises(OSError, match="another save") as caught:
        SaveRun(store)
    assert caught.value.errno == errno.EBUSY
    run.finish()
    for call in (run.start, run.chunks, lambda: run.scan(1), lambda: run.fill(1), run.take):
        with pytest.raises(ValueError, match="finished"):
            call()
    SaveRun(store).finish()
    store.close()


def test_a_device_for_swap_is_not_saved() -> None:
    store = Store(MIB, reserve=2 * MIB)
    with pytest.raises(ValueError, match="swap"):
        SaveRun(store)
    store.close()
