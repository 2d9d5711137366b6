# SPDX-License-Identifier: Apache-2.0
"""A device that becomes larger and smaller while threads read and write it."""
from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.store.store_threads_test import Region, housekeeping, run, settle
from tests.support.memory_file import MemoryFile
from tests.support.page_kinds import KINDS, block
from tests.support.paths import ROOT, python_environment
from zramfs.codecs.codec import Codec
from zramfs.store.backing import Backing
from zramfs.store.block_state import lines
from zramfs.store.recompress import Recompression
from zramfs.store.resize import STEP, resize, room_to_grow
from zramfs.store.store import Store
from zramfs.store.writeback import WritebackRun

PAGE = 4096
MIB = 1 << 20
MOST = 64 * MIB


def test_threads_read_and_write_the_old_part_and_the_new_one_while_the_device_grows_and_shrinks() -> None:
    """Two threads have regions that are always there. Two write behind the smallest end, where a write is
    refused while the device is small, and a read finds what was written since the device grew, or zeros."""
    store = Store(8 * MIB, grows_to=MOST)
    store.access_times = True
    regions = [Region(store, 0, 3_000_003, 1), Region(store, 3_000_003, 5_000_000, 2)]
    contents = {kind: block(kind, 3, 20 * PAGE) for kind in KINDS}
    sizes = [8 * MIB, 10 * MIB, 24 * MIB, MOST]
    refused = grown = 0

    def guest(seed: int):
        rng = random.Random(seed)

        def job() -> None:
            nonlocal refused
            page = rng.randrange(8 * MIB // PAGE, MOST // PAGE - 20)
            data = contents[rng.choice(KINDS)][:rng.choice([PAGE, 20 * PAGE])]
            try:
                if rng.random() < 0.6:
                    store.write(page * PAGE, data)
                else:
                    store.zero(page * PAGE, len(data))
                store.read(page * PAGE, len(data))
            except OSError as error:
                assert error.errno == errno.EINVAL
                refused += 1
        return job

    def change() -> None:
        nonlocal grown
        size = random.choice(sizes)
        assert resize(store, size, discard=True) == size == store.disksize
        grown += 1
        time.sleep(0.002)

    run(*(region.job for region in regions), guest(4), guest(5), change, *housekeeping(store),
        enough=lambda: refused > 0 and grown > 5)
    # Nothing is left behind the end: what was written there is no part of a device that grows again.
    resize(store, 8 * MIB, discard=True)
    resize(store, MOST)
    assert store.seek(8 * MIB - 1, True) == 8 * MIB - 1 or store.seek(8 * MIB, True) == 8 * MIB
    with pytest.raises(OSError):
        store.seek(8 * MIB, False)
    for region in regions:
        assert store.read(region.start, len(region.data)) == region.data
    settle(store)
    store.close()


def test_a_write_that_meets_the_shrinking_end_leaves_no_page_behind_it() -> None:
    """Each write goes through four chunks of the table, while another thread cuts off all but the first."""
    store = Store(8 * MIB, grows_to=8 * MIB)
    data = block("half random", 1, 8 * MIB)
    stop = threading.Event()
    failures: list[BaseException] = []
    cut_short = 0

    def write() -> None:
        nonlocal cut_short
        while not stop.is_set():
            try:
                store.write(0, data)
            except OSError as error:
                cut_short += 0 < getattr(error, "written", 0) < len(data)
                if error.errno != errno.EINVAL:
                    failures.append(error)
                    return
                time.sleep(0.0005)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    began = time.monotonic()
    try:
        while not failures:
            lasted = time.monotonic() - began
            if lasted > 1.2 and cut_short or lasted > 60:
                break
            resize(store, 2 * MIB, discard=True)
            time.sleep(0.002)
            # What a late write had put behind the end would count, and come back with it.
            stored = store.stats().orig_data_size
            assert stored <= 2 * MIB, f"{stored} bytes in a device of 2 MiB"
            resize(store, 8 * MIB)
            end = time.monotonic() + 60
            while store.stats().orig_data_size <= 4 * MIB and time.monotonic() < end and not failures:
                time.sleep(0.0002)
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert not failures and cut_short
    settle(store)
    store.close()


def test_a_device_without_room_stays_as_it_is_and_no_size_is_taken_for_another() -> None:
    store = Store(3 * MIB)
    assert room_to_grow(store) == 3 * MIB
    for size in (0, -1, 3 * MIB + 1, 1 << 70):
        with pytest.raises(ValueError, match="1 to 3145728 bytes"):
            resize(store, size)
    assert resize(store, 3 * MIB - 1) == 3 * MIB, "the same number of pages"
    assert resize(store, 3 * MIB - PAGE) == 3 * MIB, "2 MiB is the step, and the rest is room"
    assert resize(store, 2 * MIB) == 2 * MIB == store.disksize
    assert resize(store, 2 * MIB + 1) == 3 * MIB
    store.close()
    with pytest.raises(ValueError, match="closed"):
        resize(store, MIB)


def test_pages_behind_the_new_end_stay_unless_they_are_to_be_discarded() -> None:
    store = Store(8 * MIB, grows_to=8 * MIB)
    store.write(0, b"front")
    store.write(7 * MIB, b"behind")
    with pytest.raises(OSError, match="behind 4194304") as failure:
        resize(store, 4 * MIB)
    assert failure.value.errno == errno.ENOTEMPTY
    assert store.disksize == 8 * MIB and store.read(7 * MIB, 6) == b"behind"
    assert resize(store, 4 * MIB, discard=True) == 4 * MIB
    assert store.stats().orig_data_size == PAGE
    with pytest.raises(OSError):
        store.read(7 * MIB, 6)
    assert resize(store, 8 * MIB) == 8 * MIB
    assert store.read(7 * MIB, 6) == bytes(6) and store.read(0, 5) == b"front"
    store.check(3)
    store.close()


@pytest.mark.requires("unsanitized")
def test_room_to_grow_costs_no_memory_and_what_lay_behind_the_end_is_given_back() -> None:
    store = Store(8 * MIB, grows_to=1 << 40)
    file = MemoryFile(store.migration.arena.fileno())
    small = file.resident()
    resize(store, 1 << 40)
    assert file.resident() == small
    store.write((1 << 40) - 64 * PAGE, block("random", 1, 64 * PAGE))
    assert store.seek(0, False) == (1 << 40) - 64 * PAGE
    assert file.resident() > small + 60 * PAGE
    resize(store, 8 * MIB, discard=True)
    store.check(3)
    assert file.resident() <= small + 8 * PAGE, "descriptors stay"
    store.close()


def backing_file(directory: Path) -> Backing:
    (directory / "back").touch()
    os.truncate(directory / "back", 16 * MIB)
    return Backing(str(directory / "back"))


def test_written_back_pages_behind_the_end_free_their_blocks(tmp_path: Path) -> None:
    store = Store(8 * MIB, grows_to=8 * MIB, backing=backing_file(tmp_path))
    store.write(0, block("half random", 1, 8 * MIB))
    task = WritebackRun(store)
    task.select(0, 8 * MIB // PAGE, ns=1 << 40)
    while task.left:
        task.write()
    task.finish()
    before = store.backing.stats().used
    assert store.stats().written_back == 8 * MIB // PAGE
    resize(store, 2 * MIB, discard=True)
    assert store.stats().written_back == 2 * MIB // PAGE
    assert store.backing.stats().used <= before / 4 + 2
    store.check(3)
    store.close()


def test_work_on_pages_that_are_cut_off_meanwhile_ends_in_order(tmp_path: Path) -> None:
    """Both kinds of post-processing have selected pages that the resize frees before they come to them."""
    store = Store(8 * MIB, grows_to=8 * MIB, secondary=(Codec("zstd"),), backing=backing_file(tmp_path))
    data = block("half random", 1, 8 * MIB)
    store.write(0, data)
    work = Recompression(store, 1)
    while work.select(1_000_000):
        pass
    resize(store, 4 * MIB, discard=True)
    while work.step(1_000_000):
        pass
    assert work.finish().tried <= 4 * MIB // PAGE
    resize(store, 8 * MIB)
    store.write(4 * MIB, data[4 * MIB:])
    back = WritebackRun(store)
    back.select(0, 8 * MIB // PAGE, ns=1 << 40)
    resize(store, 4 * MIB, discard=True)
    while back.left:
        back.write()
    assert back.pages == 4 * MIB // PAGE and back.passed == 4 * MIB // PAGE
    back.finish()
    assert store.read(0, 4 * MIB) == data[:4 * MIB]
    store.check(3)
    store.close()


def test_idle_pages_and_access_times_reach_into_the_new_part() -> None:
    store = Store(2 * MIB, grows_to=MOST)
    store.access_times = True
    resize(store, MOST)
    store.write(MOST - PAGE, block("half random", 1, PAGE))
    assert store.mark_idle() is None
    assert idle_pages(store) == [MOST // PAGE - 1]
    assert store.mark_idle(100) is None
    assert idle_pages(store) == []
    # A page of the part that comes back has the time at which it is written, not that of its forerunner.
    resize(store, 2 * MIB, discard=True)
    resize(store, MOST)
    store.write(MOST - PAGE, block("half random", 2, PAGE))
    store.check(3)
    store.close()


def idle_pages(store: Store) -> list[int]:
    """Those that block_state shows so."""
    text, _ = lines(store, 0, 1 << 16)
    return [int(line.split()[0]) for line in text.splitlines() if b"i" in line.split()[2]]


REFUSED = """
import resource, sys
from zramfs.store.resize import resize
from zramfs.store.store import Store
TIB = 1 << 40
store = Store(4 << 20, grows_to=TIB)
store.access_times = True
store.write(0, b"kept")
with open("/proc/self/status") as lines:
    data = next(int(line.split()[1]) for line in lines if line.startswith("VmData")) << 10
limit = data + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
try:
    resize(store, TIB)
except MemoryError as error:
    print(error)
assert store.disksize == 4 << 20 and store.read(0, 4) == b"kept"
store.check(3)
resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert resize(store, TIB) == TIB
store.write(TIB - 4096, b"the end")
store.check(3)
assert resize(store, 4 << 20, discard=True) == 4 << 20
store.check(3)
"""


@pytest.mark.requires("unsanitized")
def test_chunk_words_that_the_system_refuses_leave_the_device_as_it_was() -> None:
    """Those of a TiB take 2 MiB of private memory. What the memory file is refused: resize_kills_test.py."""
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, str(1 << 20)], capture_output=True, text=True, timeout=60, cwd=ROOT,
        env=python_environment())
    assert (done.returncode, done.stderr) == (0, "")
    assert f"the system refuses the tables of a device of {1 << 40} bytes" in done.stdout


def test_every_allocation_fails_once_while_a_device_grows_is_written_and_shrinks() -> None:
    nth, failed = 0, True
    while failed:
        nth += 1
        store = Store(2 * MIB, grows_to=8 * MIB)
        data = block("half random", nth, 2 * MIB)
        store.write(0, data)
        store.inject_failure(nth)
        assert resize(store, 8 * MIB) == 8 * MIB
        failed = False
        try:
            store.write(4 * MIB, block("random", 1, 32 * PAGE))
        except OSError as error:
            assert error.errno == errno.ENOSPC
            failed = True
        store.check(3)
        assert resize(store, 4 * MIB, discard=True) == 4 * MIB
        assert store.read(0, 2 * MIB) == data and store.stats().orig_data_size == 2 * MIB
        store.check(3)
        store.close()
    assert nth > 30


def test_one_resize_at_a_time() -> None:
    """A second one is refused, and not begun with half of the first one's sizes."""
    store = Store(4 * MIB, grows_to=MOST)
    busy = changed = 0

    def change() -> None:
        nonlocal busy, changed
        size = random.choice([4, 8, 32, 64]) * MIB
        try:
            resize(store, size, discard=True)
            changed += 1
        except OSError as error:
            assert error.errno == errno.EBUSY
            busy += 1

    run(change, change, change, seconds=0.5)
    assert changed > 20
    assert store.disksize in (4 * MIB, 8 * MIB, 32 * MIB, 64 * MIB) and store.disksize % STEP == 0
    store.check(3)
    store.close()
