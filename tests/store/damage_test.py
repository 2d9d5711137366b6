# SPDX-License-Identifier: Apache-2.0
"""Bits of a memory file that have changed by themselves: recovery ends, touches nothing outside, and a page
that none of them belongs to keeps its bytes.

Every damage is done to a copy of one file with pages of all kinds. `touched` says from the layout alone which
pages a changed byte may cost.
"""
from __future__ import annotations

import errno
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import pytest

from tests.support.backing_tools import backing_file, write_back
from tests.support.kill_points import copy_of
from tests.support.memory_file import FRAME, PAGE, PAGEBLOCK, RECORD, WORD, ZSPAGE, MemoryFile
from tests.support.page_kinds import KINDS, block
from tests.support.scale import scaled
from zramfs.codecs.codec import Codec
from zramfs.store.backing import Backing
from zramfs.store.recompress import Recompression
from zramfs.store.store import Store

BYTES = 4096
PAGES = 1100
OBJECTS = ("same_obj", "obj", "huge")
ROUNDS = scaled(150, 50)
OTHERS = {page: block("half random", page, 7 * BYTES) for page in range(0, PAGES - 7, 7)}


class Image:
    """A store with pages of all kinds in every state, its content, and what each part of its file is for."""

    def __init__(self, place: Path) -> None:
        self.place = backing_file(place)
        self.store = Store(PAGES * BYTES, grows_to=4096 * BYTES, secondary=[Codec("zstd")],
                           backing=Backing(str(self.place)))
        self.model = bytearray(PAGES * BYTES)
        rng = random.Random(1)
        for turn in range(900):
            page, n = rng.randrange(PAGES - 8), rng.randrange(1, 8)
            if rng.random() < .25:
                self.store.zero(page * BYTES, n * BYTES)
                self.model[page * BYTES:(page + n) * BYTES] = bytes(n * BYTES)
            else:
                self.write(page, block(rng.choice(KINDS), turn, n * BYTES))
        for page in range(0, 200):
            self.write(page, block("random" if page % 3 else "half random", page, BYTES))
        write_back(self.store, (0, 120))
        job = Recompression(self.store, 1, max_pages=100)
        while job.select(1 << 30) or job.step(1 << 30):
            pass
        job.finish()
        self.store.access_times = True
        self.store.balloon.set_target(60)
        self.store.balloon.adjust(60)
        self.store.compact()
        self.store.check(3)
        self.fd = self.store.migration.arena.fileno()
        self.file = MemoryFile(self.fd)
        self.slots = [self.file.slot(n) for n in range(PAGES)]
        self.pages_of: dict[int, set[int]] = {}
        for page, slot in enumerate(self.slots):
            if slot.type in OBJECTS:
                self.pages_of.setdefault(slot.location >> 8, set()).add(page)
        self.zspages = {n: self.file.zspage(n) for n in range(max(self.pages_of) + 40)}
        self.nr_frames = struct.unpack("<I", os.pread(self.fd, 4, 104))[0] * 512
        pages = ((frame, self.file.page(frame)) for frame in range(self.nr_frames))
        self.frames = {frame: page.ref for frame, page in pages if page.flags & 2 and page.owner == 1}

    def write(self, page: int, data: bytes) -> None:
        self.store.write(page * BYTES, data)
        self.model[page * BYTES:page * BYTES + len(data)] = data

    def adopted(self, fd: int) -> Store:
        opened = os.open(self.place, os.O_RDWR)
        try:
            return Store.adopt(fd, backing=Backing(str(self.place), kept=opened))
        finally:
            os.close(opened)

    def touched(self, off: int) -> set[int]:
        """The pages that a byte of the slot table, of a zspage's descriptor or of a frame belongs to."""
        sb = self.file.superblock
        if sb.user_off <= off < sb.pageblock_off:
            return {(off - sb.user_off) // 8}
        if sb.zspage_off <= off < sb.frames_off:
            return self.pages_of.get((off - sb.zspage_off) // ZSPAGE.size, set())
        if off >= sb.frames_off:
            return self.pages_of.get(self.frames.get((off - sb.frames_off) // FRAME, -1), set())
        return set()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return Image(tmp_path_factory.mktemp("damage") / "backing")


def examine(image: Image, fd: int, touched: set[int]) -> int:
    """Adopts a damaged copy, reads every page, and works with the store. How many pages are lost."""
    store = image.adopted(fd)
    try:
        store.check(2)
        assert store.disksize == PAGES * BYTES
        unreadable = set()
        for page in range(PAGES):
            expected = image.model[page * BYTES:(page + 1) * BYTES]
            try:
                found = store.read(page * BYTES, BYTES)
            except OSError as error:
                assert error.errno == errno.EIO
                unreadable.add(page)
                found = b""
            assert page in touched or found == expected, f"page {page} was not touched"
        # What was lost is counted. What its own bytes show to be wrong is found when it is read.
        assert store.stats().pages_lost == store.recovered.lost <= len(unreadable) <= len(touched)
        store.compact()
        store.migration.run()
        store.mark_idle()
        for page in range(0, PAGES - 7, 7):
            store.write(page * BYTES, OTHERS[page])
        store.zero(300 * BYTES, 500 * BYTES)
        store.check(2)
        return store.recovered.lost
    finally:
        store.leave()


def flip(image: Image, fd: int, off: int, rng: random.Random) -> set[int]:
    """One bit, one byte, or a word that another place of the same kind has."""
    how = rng.random()
    if how < .6:
        os.pwrite(fd, bytes([os.pread(fd, 1, off)[0] ^ 1 << rng.randrange(8)]), off)
        return image.touched(off)
    if how < .8:
        os.pwrite(fd, rng.randbytes(1), off)
        return image.touched(off)
    off &= -8
    os.pwrite(fd, rng.choice((bytes(8), b"\xff" * 8, rng.randbytes(8))), off)
    return image.touched(off)


def places(image: Image, rng: random.Random, what: str) -> int:
    """The offset of a byte of one kind."""
    file = image.file
    if what == "slots":
        return file.slot_off(rng.randrange(PAGES)) + rng.randrange(8)
    if what == "zspages":
        # Most of them of one that exists, but for what is rebuilt anyway.
        n = rng.choice(list(image.pages_of)) if rng.random() < .9 else rng.randrange(len(image.zspages))
        return file.zspage_off(n) + rng.choice((rng.randrange(12), rng.randrange(44, 47), rng.randrange(64)))
    if what == "pages":
        return file.page_off(rng.randrange(image.nr_frames)) + rng.randrange(PAGE.size)
    if what == "pageblocks":
        return file.pageblock_off(rng.randrange(image.nr_frames // 512)) + rng.randrange(PAGEBLOCK.size)
    frame = rng.choice(list(image.frames)) if rng.random() < .8 else rng.randrange(image.nr_frames)
    return file.frame_off(frame) + rng.randrange(FRAME)


@pytest.mark.parametrize("what", ["slots", "zspages", "pages", "pageblocks", "frames"])
def test_a_change_costs_the_pages_that_it_belongs_to_and_no_other(image: Image, what: str) -> None:
    rng = random.Random(what)
    lost = 0
    for _round in range(ROUNDS):
        fd = copy_of(image.fd)
        touched: set[int] = set()
        for _flip in range(rng.choice((1, 1, 1, 2, 5))):
            touched |= flip(image, fd, places(image, rng, what), rng)
        lost += examine(image, fd, touched)
        os.close(fd)
    assert lost > 20 or what not in ("slots", "zspages")


def test_many_changes_everywhere_end_in_a_store_that_works(image: Image) -> None:
    """Which pages they cost is not told: a page descriptor decides between two zspages with one frame."""
    rng = random.Random(7)
    kinds = ("slots", "zspages", "pages", "pageblocks", "frames")
    for _round in range(60):
        fd = copy_of(image.fd)
        for _flip in range(400):
            flip(image, fd, places(image, rng, rng.choice(kinds)), rng)
        examine(image, fd, set(range(PAGES)))
        os.close(fd)


def test_a_zspage_that_lists_the_frames_of_another_costs_its_own_pages(image: Image) -> None:
    """Whichever comes first in the array: a copy of a descriptor, or one frame of it."""
    rng = random.Random(2)
    numbers = sorted(image.pages_of)
    dead = [n for n, zspage in image.zspages.items() if zspage.magic != 0x7A73 and n not in image.pages_of]
    for turn in range(40):
        one, other = rng.sample(numbers, 2)
        if turn % 4 == 0:
            one = rng.choice(dead)
        fd = copy_of(image.fd)
        file = MemoryFile(fd)
        if turn % 2:
            first, kept = image.zspages[other].frames[0], image.zspages[one].frames[1:]
            file.set_zspage(one, image.zspages[one]._replace(frames=(first, *kept)))
        else:
            file.set_zspage(one, image.zspages[other])
        assert examine(image, fd, image.pages_of.get(one, set())) == len(image.pages_of.get(one, ()))
        os.close(fd)


# ---- superblock and record ------------------------------------------------------------------------

COUNTS = {"fresh": 104, "described": 108, "next_number": 112, "numbers_described": 116}


@pytest.mark.parametrize("name", COUNTS)
def test_how_far_the_arrays_reach_is_found_without_the_counters(image: Image, name: str) -> None:
    true = struct.unpack("<I", os.pread(image.fd, 4, COUNTS[name]))[0]
    for value in (0, 1, true - 1, true + 1, true // 2, 1 << 20, 0xFFFFFFFF):
        fd = copy_of(image.fd)
        os.pwrite(fd, struct.pack("<I", max(value, 0)), COUNTS[name])
        held = os.fstat(fd).st_blocks
        assert examine(image, fd, set()) == 0
        # What lies behind the end was not touched.
        assert os.fstat(fd).st_blocks <= held + (8 << 20 >> 9)
        os.close(fd)


def bytes_of_the_superblock() -> Iterator[tuple[int, int]]:
    for off in (*range(0, 320), *range(RECORD, RECORD + 144)):
        for bit in range(8):
            yield off, bit


def test_a_change_of_the_superblock_or_the_record_is_refused_with_a_sentence_or_costs_nothing(
        image: Image) -> None:
    refused = 0
    rng = random.Random(4)
    for off, bit in rng.sample(list(bytes_of_the_superblock()), 600):
        fd = copy_of(image.fd)
        os.pwrite(fd, bytes([os.pread(fd, 1, off)[0] ^ 1 << bit]), off)
        before = os.pread(fd, BYTES, 0)
        try:
            store = image.adopted(fd)
        except ValueError as error:
            assert "expected" in str(error) and "got" in str(error)
            assert os.pread(fd, BYTES, 0) == before, "refused, and touched all the same"
            refused += 1
        else:
            store.check(2)
            assert store.recovered.lost == 0 and store.read(0, PAGES * BYTES) == image.model, off
            store.balloon.adjust(20)
            store.leave()
        os.close(fd)
    assert 100 < refused < 500


@pytest.mark.parametrize("off", [*range(0, 32, 8), RECORD + 96, RECORD + 104])
def test_a_record_of_any_bytes_is_refused_with_a_sentence(image: Image, off: int) -> None:
    rng = random.Random(off)
    at = off if off >= RECORD else RECORD + off
    # That word of a store of this version, and of the one before, which is read as well.
    (now,) = struct.unpack("<Q", os.pread(image.fd, 8, at))
    sound = {now, now - 1} if off == 8 else {now}
    for word in (0, 1, 1 << 36, 1 << 37, (1 << 64) - 1, *(rng.getrandbits(64) for _ in range(20))):
        fd = copy_of(image.fd)
        if word not in sound:
            os.pwrite(fd, struct.pack("<Q", word), at)
            if at == RECORD + 104:
                image.adopted(fd).leave()       # the reach of the backing store is found anew
            else:
                with pytest.raises(ValueError, match="expected .* got"):
                    image.adopted(fd)
        os.close(fd)


def note_off(image: Image) -> tuple[int, int]:
    """Where note 0 lies, and how long it is."""
    (start,) = struct.unpack("<Q", os.pread(image.fd, 8, 80))
    (word,) = struct.unpack("<Q", os.pread(image.fd, 8, 88))
    return start + (5 << 20) * (word & 1), word >> 1


@pytest.mark.parametrize("text", [
    b"", b"x", b"[]\n", b"{}\n", b"null\n", b"[null, null, null, null]\n", b'[["lz4", 1, 0]]\n',
    b"[" * 100000,
    b'[["lz4", 1, 0], 5, null, null]\n', b'[["lz4", "1", 0], null, null, null]\n', b"\xff\xfe\n",
    b'[["lz4", 1, "0"], null, null, null]\n', b'[[1, 1, 0], null, null, null]\n', b"9" * 5000 + b"\n",
    b'[["lz5", 1, 0], null, null, null]\n', b'[["lz4", 1e99, 0], null, null, null]\n',
    b'[["zstd", 3, 5000000], null, null, null]\n' + bytes(4_000_000),
    b'[["lz4", null, 0], null, null, null]\n',
], ids=lambda text: repr(text[:24]))
@pytest.mark.parametrize("sealed", [False, True], ids=["plain", "with its sum"])
def test_algorithms_of_any_bytes_are_refused_with_a_sentence(image: Image, text: bytes, sealed: bool) -> None:
    start, _ = note_off(image)
    fd = copy_of(image.fd)
    note = b"%08x " % crc32(text) + text if sealed else text
    os.pwrite(fd, note, start)
    (word,) = WORD.unpack(os.pread(fd, 8, 88))
    os.pwrite(fd, WORD.pack(len(note) << 1 | word & 1), 88)
    with pytest.raises(ValueError, match="expected|choose one|is a whole number|dictionary"):
        image.adopted(fd)
    os.close(fd)


def test_a_note_that_has_changed_is_refused(image: Image) -> None:
    start, n = note_off(image)
    for at in range(n):
        fd = copy_of(image.fd)
        os.pwrite(fd, bytes([os.pread(fd, 1, start + at)[0] ^ 4]), start + at)
        with pytest.raises(ValueError, match="expected the algorithms"):
            image.adopted(fd)
        os.close(fd)


def test_what_lies_behind_the_reach_of_the_backing_store_is_not_overwritten(image: Image) -> None:
    fd = copy_of(image.fd)
    os.pwrite(fd, WORD.pack(1), RECORD + 104)
    place = image.place.with_name("copy")
    place.write_bytes(image.place.read_bytes())
    opened = os.open(place, os.O_RDWR)
    store = Store.adopt(fd, backing=Backing(str(place), kept=opened))
    os.close(opened)
    os.close(fd)
    for page in range(200, 260):
        store.write(page * BYTES, block("random", page, BYTES))
    assert write_back(store, (200, 260)).pages == 60
    store.check(3)
    assert store.read(0, 120 * BYTES) == image.model[:120 * BYTES]
    store.leave()
