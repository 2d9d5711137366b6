# SPDX-License-Identifier: Apache-2.0
"""A store that a process has left in a memory file: what another one finds, and what it refuses."""
from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from allocator import Arena, Headroom
from tests.support.backing_tools import backing_file, write_back
from tests.support.kill_points import Op, apply, apply_to_model, copy_of
from tests.support.memory_file import PAGE as PAGE_DESC
from tests.support.memory_file import WORD, ZSPAGE, MemoryFile
from tests.support.page_kinds import KINDS, block, hard, noise, prose
from tests.support.scale import scaled
from zramfs.codecs.codec import Codec
from zramfs.store import block_state
from zramfs.store.backing import Backing
from zramfs.store.recompress import Recompression
from zramfs.store.record import is_kept
from zramfs.store.store import Store

PAGE = 4096
MIB = 1 << 20
KILLS = scaled(40, 12)


@contextmanager
def memory() -> Iterator[int]:
    fd = os.memfd_create("test")
    try:
        yield fd
    finally:
        os.close(fd)


def left(store: Store) -> int:
    """A copy of its memory file as a kill at this moment would leave it."""
    return copy_of(store.migration.arena.fileno())


def adopted(fd: int, **how: Any) -> Store:
    store = Store.adopt(fd, **how)
    os.close(fd)
    store.check(3)
    return store


def whole_file(store: Store) -> bytes:
    """All that the memory file holds."""
    fd, at, found = store.migration.arena.fileno(), 0, []
    with contextlib.suppress(OSError):
        while True:
            at = os.lseek(fd, at, os.SEEK_DATA)
            end = os.lseek(fd, at, os.SEEK_HOLE)
            found.append(os.pread(fd, end - at, at))
            at = end
    return b"".join(found)


def filled(seed: int = 1, **how: Any) -> tuple[Store, bytes]:
    store = Store(4 * MIB, **how)
    model = bytearray(4 * MIB)
    rng = random.Random(seed)
    for turn in range(120):
        off = rng.randrange(1000) * PAGE
        n = rng.randrange(1, 25) * PAGE
        op: Op = ["zero", off, n] if rng.random() < .3 else ["write", off, rng.choice(KINDS), turn, n]
        apply(store, op)
        apply_to_model(model, op)
    return store, bytes(model)


def test_another_process_finds_every_page_and_every_figure() -> None:
    store, model = filled(mem_limit=64 * MIB)
    store.compact()
    store.migration.run()
    for i in range(600):            # a pageblock comes and goes
        store.write(i * PAGE, noise(i))
    store.zero(0, 600 * PAGE)
    again = adopted(left(store))
    assert again.read(0, 4 * MIB) == bytes(600 * PAGE) + model[600 * PAGE:]
    before, after = store.stats(), again.stats()
    assert {name: (getattr(before, name), getattr(after, name)) for name in before.__slots__
            if getattr(before, name) != getattr(after, name)} == {"recoveries": (0, 1)}
    assert after.mem_limit == 64 * MIB and after.bytes_returned > 0 and after.notify_free > 0
    assert again.disksize == store.disksize and again.buddyinfo() == store.buddyinfo()
    assert [c for c in again.classes()] == store.classes()
    found = again.recovered
    assert (found.pages * PAGE, found.lost, found.locks) == (before.orig_data_size, 0, 0)
    assert found.objects_freed == found.zspages_freed == found.frames_freed == 0


@pytest.mark.parametrize(("algo", "level", "dictionary"), [
    ("lz4", 7, None), ("lz4hc", 3, b"words of a dictionary " * 40), ("zstd", -3, bytes(range(256)) * 100),
    ("none", None, None),
])
def test_algorithms_levels_and_dictionaries_are_kept(algo: str, level: int | None, dictionary: bytes) -> None:
    secondary = [Codec("zstd", 5, b"another dictionary " * 99), None, Codec("lz4hc", 4)]
    store = Store(MIB, algo=algo, level=level, dictionary=dictionary, secondary=secondary, wipe=True)
    pages = [prose(i) for i in range(20)]
    for i, page in enumerate(pages):
        store.write(i * PAGE, page)
    job = Recompression(store, 1, max_pages=9)
    while job.select(1 << 30) or job.step(1 << 30):
        pass
    assert job.finish().won == 9
    again = adopted(left(store))
    assert [(c.algo, c.level, c.dictionary) if c else None for c in again.codecs] == [
        (c.algo, c.level, c.dictionary) if c else None for c in store.codecs]
    assert (again.algo, again.level) == (store.algo, store.level)
    assert [again.read(i * PAGE, PAGE) for i in range(20)] == pages
    # The wish to wipe is kept as well: what is discarded is gone from the file.
    if algo == "none":
        assert prose(3)[:40] in whole_file(again)
        again.zero(0, MIB)
        assert prose(3)[:40] not in whole_file(again)


def test_a_balloon_and_what_compaction_has_counted_are_kept() -> None:
    store, model = filled()
    store.balloon.set_target(300)
    assert store.balloon.adjust(200) == 200
    store.migration.run()
    before = store.migration.stats()
    again = adopted(left(store))
    assert again.balloon.stats() == store.balloon.stats() and again.balloon.target == 300
    assert again.migration.stats() == before and before.runs == 1
    assert again.balloon.adjust(200) == 100 and again.read(0, 4 * MIB) == model
    again.balloon.set_target(0)
    assert again.balloon.adjust(1000) == -300
    again.check(3)
    assert adopted(left(again)).balloon.stats().pages == 0


def test_idle_marks_and_access_times_are_kept() -> None:
    store = Store(MIB)
    store.write(0, prose(1) + prose(2))
    store.access_times = True
    store.mark_idle()
    store.read(PAGE, PAGE)
    before = block_state.lines(store, 0, MIB)
    assert b"i" in before[0].splitlines()[0] and b"i" not in before[0].splitlines()[1]
    time.sleep(1.1)
    again = adopted(left(store))
    assert again.access_times and block_state.lines(again, 0, MIB) == before
    again.write(200 * PAGE, prose(3))
    again.mark_idle(3600)
    assert b"i" not in block_state.lines(again, 0, MIB)[0]
    again.access_times = False
    third = adopted(left(again))
    assert not third.access_times


def test_the_note_is_the_old_one_or_the_new_one() -> None:
    with memory() as fd:
        store = Store(MIB, fd=fd)
        assert store.note == b""
        for content in (b"first", b"second" * 1000, b"", b"x" * (5 * MIB)):
            store.note = content
            assert store.note == content and Store.adopt(fd).note == content
        with pytest.raises(ValueError, match="at most 5242880 bytes"):
            store.note = b"x" * (5 * MIB + 1)
        assert len(store.note) == 5 * MIB
        store.leave()


def test_a_memory_file_is_empty_after_close_and_full_after_leave() -> None:
    with memory() as fd:
        assert not is_kept(fd)
        store = Store(MIB, fd=fd)
        store.write(0, b"kept" * 1024)
        assert is_kept(fd)
        with pytest.raises(ValueError, match="with a store in it"):
            Store(MIB, fd=fd)
        store.leave()
        again = Store.adopt(fd)
        assert again.read(0, PAGE) == b"kept" * 1024
        del again                                   # as at the end of a process
        again = Store.adopt(fd)
        assert again.read(0, PAGE) == b"kept" * 1024
        again.close()
        assert os.fstat(fd).st_size == 0 and not is_kept(fd)
        with pytest.raises(ValueError, match="got something else"):
            Store.adopt(fd)
        Store(2 * MIB, fd=fd).close()


def test_a_store_whose_making_was_cut_short_is_none() -> None:
    with memory() as fd:
        Arena(PAGE, 5, fd=fd).leave()
        assert not is_kept(fd)
        with pytest.raises(ValueError, match="without"):
            Store.adopt(fd)
        store = Store(MIB, fd=fd)
        assert store.read(0, MIB) == bytes(MIB)
        store.close()


@pytest.mark.parametrize(("off", "form", "value", "sentence"), [
    (0, "Q", 7, "got something else"),
    (8, "I", 2, "got layout 2: the version of zramfs that made it"),
    (8, "I", 4, "got layout 4"),
    (40, "Q", 12345, "a damaged superblock"),
    (64, "Q", 1 << 40, "a damaged superblock"),
    (80, "Q", 1 << 40, "a damaged superblock"),
    (1008 + 8, "I", 3, "expected a store with record 1 to 2, got 3"),
    (1008 + 8, "I", 0, "expected a store with record 1 to 2, got 0"),
    (1008 + 16, "Q", 512, "expected the record of a store, got one that is damaged"),
    (1008 + 24, "Q", 1 << 30, "expected the record of a store, got one that is damaged"),
])
def test_another_layout_is_refused_before_anything_is_touched(off: int, form: str, value: int,
                                                              sentence: str) -> None:
    store, _ = filled()
    fd = left(store)
    os.pwrite(fd, struct.pack("<" + form, value), off)
    before = os.pread(fd, 1 << 20, 0)
    with pytest.raises(ValueError, match=sentence):
        Store.adopt(fd)
    assert os.pread(fd, 1 << 20, 0) == before
    os.close(fd)


def test_a_store_of_the_version_before_is_adopted_and_stays_one_at_first() -> None:
    """So that its own version can go on with it, if this one does not hold after an upgrade."""
    store, model = filled()
    fd = left(store)
    os.pwrite(fd, struct.pack("<I", 1), 1008 + 8)
    again = Store.adopt(fd)
    assert again.recovered.lost == 0 and struct.unpack("<I", os.pread(fd, 4, 1008 + 8)) == (1,)
    assert again.read(0, len(model)) == model
    again.close()
    os.close(fd)


def test_a_file_that_was_cut_is_refused() -> None:
    store, _ = filled()
    fd = left(store)
    os.ftruncate(fd, os.fstat(fd).st_size - PAGE)
    with pytest.raises(ValueError, match="a damaged superblock"):
        Store.adopt(fd)
    os.close(fd)


# ---- what was under way ---------------------------------------------------------------------------

def test_locks_and_marks_of_a_killed_process_are_cleared() -> None:
    store, model = filled()
    fd = left(store)
    file = MemoryFile(fd)
    locked = 0
    for slot in range(0, 1024, 3):
        (word,) = WORD.unpack(os.pread(fd, 8, file.slot_off(slot)))
        # Post-processing selects objects only.
        file.put(WORD, file.slot_off(slot), (word | 1 | (1 << 8 if word >> 1 & 7 in (3, 4) else 0),))
        locked += 1
    for number in range(file.superblock.nr_pageblocks):
        zspage = file.zspage(number)
        if zspage.magic == 0x7A73:
            file.put(ZSPAGE, file.zspage_off(number), (
                *zspage.frames, 17, 4, 3, 900, *zspage[5:7], 255, -1, 2, zspage.huge_header))
    for frame in range(300):
        page = file.page(frame)
        file.put(PAGE_DESC, file.page_off(frame), (page.flags | 0x18, 3, page.owner, 5, 6, 7))
    again = adopted(fd)
    assert again.recovered.locks == locked and again.recovered.lost == 0
    assert again.read(0, 4 * MIB) == model


def damage_object(file: MemoryFile, location: int) -> None:
    number, index = location >> 8, location & 255
    assert file.zspage(number).class_idx != 254 and index == 0
    off = file.frame_off(file.zspage(number).frames[0])
    os.pwrite(file.fd, bytes(8), off)


def test_a_slot_whose_object_is_gone_costs_its_page_and_no_more() -> None:
    store, model = filled()
    fd = left(store)
    file = MemoryFile(fd)
    lost = []
    for slot in range(1024):
        found = file.slot(slot)
        if found.type == "obj" and found.location & 255 == 0 and len(lost) < 4:
            damage_object(file, found.location)
            lost.append(slot)
    again = Store.adopt(fd)
    os.close(fd)
    assert again.recovered.lost == len(lost) == 4
    again.check(3)
    for page in range(1024):
        if page in lost:
            with pytest.raises(OSError) as caught:
                again.read(page * PAGE, PAGE)
            assert caught.value.errno == errno.EIO
            with pytest.raises(OSError):
                again.write(page * PAGE + 1, b"a part")
        else:
            assert again.read(page * PAGE, PAGE) == model[page * PAGE:(page + 1) * PAGE]
    assert again.stats().pages_lost == 4
    assert again.stats().failed_reads == store.stats().failed_reads + 4 and again.stats().corrupt == 0
    # They stay lost, and nothing else is, when the store is adopted once more.
    third = adopted(left(again))
    assert third.recovered.lost == 0
    with pytest.raises(OSError):
        third.read(lost[0] * PAGE, PAGE)
    # Post-processing passes them by. A write heals one, a discard the others.
    third.mark_idle()
    third.compact()
    third.check(3)
    third.write(lost[0] * PAGE, prose(1))
    third.zero(lost[1] * PAGE, PAGE)
    assert third.read(lost[0] * PAGE, PAGE) == prose(1) and third.read(lost[1] * PAGE, PAGE) == bytes(PAGE)
    third.zero(0, 4 * MIB)
    third.check(3)
    assert third.stats().orig_data_size == 0


@pytest.mark.parametrize("word", [
    1 << 24 | 6 << 1, 7 << 1, 0xffff << 24, 5 << 1 | 77 << 24 | 90 << 10, 3 << 1 | 2 << 4 | 1 << 24,
    4 << 1 | 1 << 4, 3 << 1 | 0xfffffff << 32, 4 << 1 | 0xffffffff << 32 | 255 << 24, 1 << 1 | 1 << 6,
], ids=hex)
def test_a_slot_of_nonsense_costs_its_page_and_no_more(word: int) -> None:
    store, model = filled()
    fd = left(store)
    file = MemoryFile(fd)
    slot = next(n for n in range(1024) if file.slot(n).type == "same")
    file.put(WORD, file.slot_off(slot), (word,))
    again = adopted(fd)
    assert again.recovered.lost == 1
    with pytest.raises(OSError):
        again.read(slot * PAGE, PAGE)
    rest = again.read((slot + 1) * PAGE, (1023 - slot) * PAGE)
    assert rest == model[(slot + 1) * PAGE:]


def test_what_lies_behind_the_end_of_the_device_is_emptied() -> None:
    store = Store(520 * PAGE)
    store.write(0, prose(1))
    store.write(519 * PAGE, prose(2))
    fd = left(store)
    file = MemoryFile(fd)
    file.put(WORD, file.slot_off(520), (os.pread(fd, 8, file.slot_off(0))[0] | 3 << 1,))
    again = adopted(fd)
    assert again.recovered.lost == 0 and again.recovered.pages == 2
    assert MemoryFile(again.migration.arena.fileno()).slot(520).type == "empty"
    assert again.read(0, PAGE) == prose(1) and again.read(519 * PAGE, PAGE) == prose(2)


@pytest.mark.parametrize("damage", ["class", "no frame", "frame of another", "huge frame"])
def test_a_damaged_zspage_costs_its_pages_and_no_more(damage: str) -> None:
    store, model = filled()
    fd = left(store)
    file = MemoryFile(fd)
    numbers = [n for n in range(file.superblock.nr_pageblocks) if file.zspage(n).magic == 0x7A73]
    one, other = numbers[3], numbers[9]
    zspage = list(file.zspage(one))
    frames = list(zspage[0])
    if damage == "class":
        zspage[6] = 255
    elif damage == "no frame":
        frames[0] = 0xffffffff
    elif damage == "huge frame":
        frames[0] = 512 * 512
    else:
        frames[0] = file.zspage(other).frames[0]
    file.put(ZSPAGE, file.zspage_off(one), (*frames, *zspage[1:]))
    again = adopted(fd)
    assert again.recovered.zspages_damaged == 1 and again.recovered.lost > 0
    read = 0
    for page in range(1024):
        try:
            assert again.read(page * PAGE, PAGE) == model[page * PAGE:(page + 1) * PAGE]
            read += 1
        except OSError as error:
            assert error.errno == errno.EIO
    assert read == 1024 - again.recovered.lost
    again.write(0, model)
    again.check(3)


# ---- backing store --------------------------------------------------------------------------------

def test_pages_on_the_backing_store_are_found_again(tmp_path: Path) -> None:
    place = backing_file(tmp_path / "backing", 8 * MIB)
    store = Store(4 * MIB, backing=Backing(str(place)))
    pages = [hard(i) if i % 2 else prose(i) for i in range(200)]
    for i, page in enumerate(pages):
        store.write(i * PAGE, page)
    assert write_back(store, (0, 150)).pages == 150
    store.zero(20 * PAGE, 30 * PAGE)
    pages[20:50] = [bytes(PAGE)] * 30
    fd = left(store)
    with pytest.raises(ValueError, match="expected the backing store"):
        Store.adopt(fd)
    # A refused adoption ends no data: neither here nor on the device.
    file = MemoryFile(fd)
    (magic,) = WORD.unpack(os.pread(fd, 8, 1008))
    os.pwrite(fd, bytes(8), 1008)
    with pytest.raises(ValueError, match="without"):
        Store.adopt(fd, backing=Backing(str(place), kept=store.backing.fileno()))
    file.put(WORD, 1008, (magic,))
    again = adopted(fd, backing=Backing(str(place), kept=store.backing.fileno()))
    before, after = store.backing.stats(), again.backing.stats()
    assert (after.used, after.writes) == (before.used, before.writes) and again.stats().written_back == 120
    assert again.backing.trim(1 << 20) >= before.stale
    assert [again.read(i * PAGE, PAGE) for i in range(200)] == pages
    # New pages go where nothing lies.
    for i in range(300, 400):
        again.write(i * PAGE, hard(i))
    assert write_back(again, (300, 400)).pages == 100
    assert [again.read(i * PAGE, PAGE) for i in range(200)] == pages
    assert [again.read(i * PAGE, PAGE) for i in range(300, 400)] == [hard(i) for i in range(300, 400)]
    again.check(3)
    again.leave()
    store.leave()


# ---- with a reserve, and with the host's memory in view ---------------------------------------------

def test_the_reserve_keeps_its_memory() -> None:
    with memory() as fd:
        store = Store(16 * MIB, reserve=8 * MIB, fd=fd)
        for i in range(400):
            store.write(i * PAGE, noise(i))
        store.zero(0, 350 * PAGE)
        end = time.monotonic() + 60
        while store.stats().reserve < 8 * MIB and time.monotonic() < end:
            time.sleep(0.01)        # its thread is filling it
        held = os.fstat(fd).st_blocks
        again = Store.adopt(copy := copy_of(fd), reserve=8 * MIB)
        again.check(3)
        stats = again.stats()
        assert stats.reserve == stats.reserve_target == 8 * MIB
        # Not more memory than before, but for the access to the copy itself.
        assert os.fstat(copy).st_blocks <= held + (MIB >> 9)
        for i in range(400):
            again.write(i * PAGE, noise(i))
        again.check(3)
        os.close(copy)
        again.close()
        store.close()


def test_a_headroom_is_asked_by_an_adopted_store() -> None:
    store, model = filled()
    headroom = Headroom()
    again = adopted(left(store), headroom=headroom)
    looks = headroom.stats().looks
    assert looks > 0 and again.read(0, 4 * MIB) == model


# ---- real kills -----------------------------------------------------------------------------------

SEEDS = 4


def stamped(page: int, seed: int) -> bytes:
    """A page that says which it is, and whose every part depends on both."""
    rng = random.Random(page * SEEDS + seed)
    stamp = page.to_bytes(4, "little") + seed.to_bytes(4, "little")
    size = rng.choice((8, 200, 1500, 2600, 4096))
    return (stamp + rng.randbytes(size - 8) + stamp * 512)[:PAGE]


def _work(store: Store, seed: int, devices: list[bytes], began: int) -> None:
    """Until it is killed. began: a pipe that is told when all are at work."""
    def writer(number: int) -> None:
        rng = random.Random(seed * 8 + number)
        while True:
            off, n = rng.randrange(900) * PAGE, rng.randrange(1, 120) * PAGE
            if rng.random() < .3:
                store.zero(off, n)
            else:
                store.write(off, memoryview(devices[rng.randrange(SEEDS)])[off:off + n])

    def mover() -> None:
        while True:
            store.compact()
            store.migration.run()
            store.mark_idle()

    threads = [threading.Thread(target=writer, args=(n,), daemon=True) for n in range(3)]
    threads.append(threading.Thread(target=mover, daemon=True))
    for thread in threads:
        thread.start()
    os.write(began, b"!")
    time.sleep(60)


@pytest.mark.parametrize("how", [{}, {"wipe": True}, {"reserve": 4 * MIB}], ids=["plain", "wiped", "reserve"])
def test_kills_under_load_lose_no_page(how: dict[str, Any]) -> None:
    keep = {"reserve": how["reserve"]} if "reserve" in how else {}
    rng = random.Random(5)
    devices = [b"".join(stamped(page, seed) for page in range(1024)) for seed in range(SEEDS)]
    locks = freed = 0
    began, begin = os.pipe()
    with memory() as fd, open(began, "rb", buffering=0) as said, open(begin, "wb", buffering=0):
        Store(4 * MIB, fd=fd, **how).leave()
        for turn in range(400):
            if turn >= KILLS and locks + freed > 3:
                break
            pid = os.fork()
            if pid == 0:
                try:
                    _work(Store.adopt(fd, **keep), turn, devices, begin)
                finally:
                    os._exit(9)
            assert said.read(1) == b"!"
            time.sleep(rng.random() * 0.08)
            os.kill(pid, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
            store = Store.adopt(fd, **keep)
            found = store.recovered
            assert found.lost == found.zspages_damaged == 0
            locks += found.locks
            freed += found.objects_freed + found.frames_freed
            store.check(3)
            data = store.read(0, 4 * MIB)
            for at in range(0, 4 * MIB, PAGE):
                page = data[at:at + PAGE]
                assert page == bytes(PAGE) or page in [device[at:at + PAGE] for device in devices], at // PAGE
            store.leave()
    assert locks + freed > 3, "no kill hit anything"


# ---- what it costs ----------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "kinds", [("text", "half random", "zeros", "random"), ("random",)], ids=["mixed", "huge"])
@pytest.mark.requires("unsanitized")
def test_recovery_of_a_mapped_file_takes_under_a_hundred_nanoseconds_of_cpu_a_page(
        kinds: tuple[str, ...]) -> None:
    """34 ns on the machine where it was written, with 512 MiB stored."""
    pages = 128 * MIB // PAGE
    with memory() as fd:
        store = Store(pages * PAGE, fd=fd)
        for page in range(0, pages, 8):
            store.write(page * PAGE, block(kinds[page // 8 % len(kinds)], page % 320, 8 * PAGE))
        store.leave()
        costs = []
        for _turn in range(8):
            arena = Arena.adopt(fd)
            arena.map_resident()
            began = time.thread_time_ns()
            store = Store.adopt(arena)
            costs.append((time.thread_time_ns() - began) / pages)
            assert store.recovered.pages == pages and store.recovered.lost == 0
            store.leave()
    assert min(costs) < 100, costs
