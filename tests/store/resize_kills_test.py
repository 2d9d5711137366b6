# SPDX-License-Identifier: Apache-2.0
"""A device that has grown or shrunk, or does so while its process is killed: what another process finds."""
from __future__ import annotations

import mmap
import os
import random
import signal
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.kill_points import copy_of
from tests.support.memory_file import RECORD, MemoryFile
from tests.support.page_kinds import hard, prose
from tests.support.scale import scaled
from tests.support.small_tmpfs import on_a_small_tmpfs
from zramfs.store.resize import resize, room_to_grow
from zramfs.store.store import Store

PAGE = 4096
MIB = 1 << 20
KILLS = scaled(30, 10)


def adopted(store: Store, **how: int) -> Store:
    copy = copy_of(store.migration.arena.fileno())
    again = Store.adopt(copy, **how)
    os.close(copy)
    again.check(3)
    return again


@pytest.mark.parametrize("size", [3 * MIB, 2 * MIB + PAGE, 5])
def test_size_and_room_are_found_again(size: int) -> None:
    for room in (0, 4 * MIB, 9 * MIB + 3 * PAGE, 1 << 40):
        store = Store(size, grows_to=room)
        again = adopted(store)
        assert (again.disksize, room_to_grow(again)) == (store.disksize, room_to_grow(store))
        assert resize(again, room_to_grow(again)) == room_to_grow(store)
        third = adopted(again)
        assert third.disksize == room_to_grow(third) == room_to_grow(store)
        for each in (store, again, third):
            each.close()


def test_a_device_that_has_grown_is_adopted_with_its_new_part() -> None:
    store = Store(2 * MIB, grows_to=64 * MIB)
    store.write(0, prose(1))
    store.access_times = True
    resize(store, 20 * MIB)
    store.write(20 * MIB - PAGE, prose(2))
    again = adopted(store)
    assert again.disksize == 20 * MIB and again.recovered.lost == 0 and again.access_times
    assert again.read(0, PAGE) == prose(1) and again.read(20 * MIB - PAGE, PAGE) == prose(2)
    assert again.stats().orig_data_size == 2 * PAGE
    again.mark_idle(3600)
    resize(again, 64 * MIB)
    again.write(64 * MIB - PAGE, prose(3))
    again.check(3)
    assert adopted(again).read(64 * MIB - PAGE, PAGE) == prose(3)


def test_what_was_cut_off_does_not_come_back_in_another_process() -> None:
    store = Store(20 * MIB, grows_to=64 * MIB)
    store.access_times = True
    for i in range(0, 20 * MIB, MIB):
        store.write(i, hard(i))
    resize(store, 4 * MIB, discard=True)
    again = adopted(store)
    assert again.disksize == 4 * MIB and again.recovered.lost == 0
    assert again.recovered.objects_freed == 0 and again.stats().orig_data_size == 4 * PAGE
    resize(again, 20 * MIB)
    assert again.read(4 * MIB, 16 * MIB) == bytes(16 * MIB)
    again.check(3)


def test_a_process_that_is_killed_before_it_frees_what_is_cut_off_leaves_that_to_the_next() -> None:
    store = Store(20 * MIB, grows_to=64 * MIB)
    for i in range(0, 20 * MIB, PAGE * 4):
        store.write(i, hard(i))
    copy = copy_of(store.migration.arena.fileno())
    MemoryFile(copy).set_size(6 * MIB // PAGE)
    again = Store.adopt(copy)
    again.check(3)
    assert again.disksize == 6 * MIB and again.recovered.lost == 0
    assert again.recovered.objects_freed == 14 * MIB // PAGE // 4
    assert again.stats().orig_data_size == 6 * MIB // 4
    file = MemoryFile(copy)
    with pytest.raises(OSError):
        # The next data of the slot table lies behind it.
        at = os.lseek(copy, file.slot_off(6 * MIB // PAGE), os.SEEK_DATA)
        raise OSError if at >= file.superblock.pageblock_off else AssertionError("slots keep their memory")
    assert resize(again, 20 * MIB) == 20 * MIB and not any(again.read(6 * MIB, 14 * MIB))
    os.close(copy)


def has_memory(fd: int, start: int, end: int) -> bool:
    return os.lseek(fd, start, os.SEEK_DATA) == start and os.lseek(fd, start, os.SEEK_HOLE) >= end


def test_with_a_reserve_the_new_part_of_the_tables_is_resident_before_it_is_used() -> None:
    """After another process has given the cut-off part back, too."""
    fd = os.memfd_create("reserve")
    store = Store(64 * MIB, reserve=4 * MIB, grows_to=64 * MIB, fd=fd)
    store.access_times = True
    resize(store, 4 * MIB)
    store.leave()
    store = Store.adopt(fd, reserve=4 * MIB)
    file = MemoryFile(fd)
    slots = file.superblock.user_off
    times = slots + 64 * MIB // PAGE * 8
    assert has_memory(fd, slots, slots + 2 * PAGE) and not has_memory(fd, slots, slots + 3 * PAGE)
    resize(store, 64 * MIB)
    assert has_memory(fd, slots, slots + 64 * MIB // PAGE * 8)
    assert has_memory(fd, times, times + 64 * MIB // PAGE * 4)
    store.access_times = False
    resize(store, 4 * MIB)
    resize(store, 64 * MIB)
    assert not has_memory(fd, times, times + PAGE)
    store.access_times = True
    assert has_memory(fd, times, times + 64 * MIB // PAGE * 4)
    store.check(3)
    store.close()
    os.close(fd)


GROW = """
from zramfs.store.resize import resize
from zramfs.store.store import Store
MIB, GIB = 1 << 20, 1 << 30
store = Store(4 * MIB, reserve=2 * MIB, grows_to=64 * GIB)
store.access_times = {times}
store.write(0, b"kept")
refused = 0
try:
    resize(store, {gib} * GIB)
except MemoryError as error:
    assert "the system refuses the tables" in str(error)
    refused = 1
assert store.disksize == 4 * MIB and store.read(0, 4) == b"kept"
store.check(3)
resize(store, 256 * MIB)
store.write(256 * MIB - 4096, b"the end")
store.check(3)
print(refused)
"""


@pytest.mark.requires("root", "unshare", "cc", "unsanitized")
@pytest.mark.parametrize(("gib", "times"), [(10, False), (6, True)], ids=["slots", "access times"])
def test_a_table_in_the_memory_file_that_is_refused_leaves_the_device_as_it_was(
    tmp_path: Path, gib: int, times: bool,
) -> None:
    """In 20 MiB of memory: 10 GiB have 20 MiB of slots, 6 GiB have 12 MiB and 6 MiB of access times."""
    assert on_a_small_tmpfs(tmp_path, GROW.format(gib=gib, times=times)) == [1]


# ---- kills while the size changes -----------------------------------------------------------------

# So large that a shrink takes a while to look at its chunks, twice, while pages come in the middle of them:
# after the first look has passed there, and long before the second look has come there.
SIZE = 64 << 30
FIRST = SIZE // 2 // PAGE


def _resize_under_load(fd: int, acks: mmap.mmap, seed: int) -> None:
    """Until it is killed. A writer says which of its pages have been answered and are to stay; a page that
    may be gone at any moment says 0. Pages lie there for a moment only, so that a shrink may succeed."""
    store = Store.adopt(fd)

    def zero(page: int) -> None:
        # It is refused while a shrink that will be taken back is under way.
        for _attempt in range(50):
            with suppress(OSError):
                store.zero(page * PAGE, PAGE)
                break
            time.sleep(0.0002)

    def writer(number: int) -> None:
        rng = random.Random(seed * 2 + number)
        while True:
            at = 1022 + number
            content = rng.randrange(1, 1 << 30)
            with suppress(OSError):
                store.write((FIRST + at) * PAGE, content.to_bytes(4, "little") * (PAGE // 4))
                struct.pack_into("<I", acks, at * 4, content)
                time.sleep(rng.random() * 0.002)
                struct.pack_into("<I", acks, at * 4, 0)
                zero(FIRST + at)
            time.sleep(rng.random() * 0.008)

    def resizer() -> None:
        rng = random.Random(seed)
        while True:
            with suppress(OSError):
                resize(store, rng.choice((4 * MIB, SIZE)))

    for job in (lambda: writer(0), lambda: writer(1), resizer):
        threading.Thread(target=job, daemon=True).start()
    time.sleep(60)


def sample(fd: int, acks: mmap.mmap, end: float) -> int:
    """Looks what a kill at this moment would leave, again and again. How often a page was there."""
    with mmap.mmap(fd, PAGE, prot=mmap.PROT_READ) as head:
        record = memoryview(head).cast("Q")
        answered = memoryview(acks).cast("I")
        found = 0
        while time.monotonic() < end:
            for at in (1022, 1023):
                before = answered[at]
                size = record[(RECORD + 16) // 8] & (1 << 37) - 1
                if before and before == answered[at]:
                    found += 1
                    assert size > FIRST + at, f"page {FIRST + at} is lost in {size} pages"
        record.release()
        answered.release()
    return found


def test_kills_while_a_device_grows_and_shrinks_lose_no_page_that_was_answered() -> None:
    """Nothing was to be discarded, so a page that was answered keeps the device large."""
    acks = mmap.mmap(-1, 1024 * 4)
    fd = os.memfd_create("resized")
    Store(SIZE, fd=fd).leave()
    rng = random.Random(3)
    sizes, kept, sampled, turn = set(), 0, 0, 0
    # On a busy machine so few children may not come far.
    while turn < KILLS or turn < 300 and not (len(sizes) > 1 and kept > 0 and sampled > 1000):
        turn += 1
        pid = os.fork()
        if pid == 0:
            try:
                _resize_under_load(fd, acks, turn)
            finally:
                os._exit(9)
        sampled += sample(fd, acks, time.monotonic() + 0.03 + rng.random() * 0.1)
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        store = Store.adopt(fd)
        store.check(3)
        sizes.add(store.disksize)
        for page, (content,) in enumerate(struct.iter_unpack("<I", acks[:]), FIRST):
            if content:
                assert store.disksize > page * PAGE, f"page {page} of a device of {store.disksize}"
                assert store.read(page * PAGE, PAGE) == content.to_bytes(4, "little") * (PAGE // 4)
                kept += 1
        store.zero(0, store.disksize)
        acks[:] = bytes(len(acks))
        store.leave()
    os.close(fd)
    assert len(sizes) > 1 and kept > 0 and sampled > 1000
