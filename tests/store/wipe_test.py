# SPDX-License-Identifier: Apache-2.0
"""A store that wipes: what was discarded, overwritten or moved is nowhere in the memory file any more, nor on
the backing store."""
from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

from tests.support.backing_tools import backing_file, write_back
from zramfs.codecs.codec import Codec
from zramfs.store.backing import Backing
from zramfs.store.recompress import Recompression
from zramfs.store.store import Store

PAGE = 4096
MIB = 1 << 20
SECRET = b"key_under+doormat/42:AXz."


def page_of(size: int, n: int = 0) -> bytes:
    """A page that takes about so many bytes; the secret stands in it as it is."""
    dice = random.Random(size * 1000 + n)
    noise = dice.randbytes(max(size - 64, 0))
    return (SECRET + noise + bytes(PAGE))[:PAGE] if size < PAGE else (SECRET + dice.randbytes(PAGE))[:PAGE]


SIZES = (100, 700, 1500, 2100, 3000, 3500, PAGE)


def found(store: Store, what: bytes = SECRET) -> int:
    """How often it stands in the memory file, wherever that has data."""
    fd, end, count = store.migration.arena.fileno(), 0, 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:
            return count
        end = os.lseek(fd, start, os.SEEK_HOLE)
        count += os.pread(fd, end - start, start).count(what)


def filled(pages: int = 700, **how: object) -> Store:
    store = Store(16 * MIB, algo="lz4", **how)
    for n in range(pages):
        store.write(n * PAGE, page_of(SIZES[n % len(SIZES)], n))
    assert found(store) == pages, "lz4 keeps the first bytes of a page as they are"
    return store


def test_without_it_what_was_discarded_stays() -> None:
    store = filled()
    store.zero(0, 500 * PAGE)
    assert found(store) > 500


@pytest.mark.parametrize("change", ["discard", "overwrite", "same", "part"])
def test_what_is_gone_is_wiped(change: str) -> None:
    store = filled(wipe=True)
    other = random.Random(1)
    for n in range(0, 700, 2):
        if change == "discard":
            store.zero(n * PAGE, PAGE)
        elif change == "overwrite":
            store.write(n * PAGE, other.randbytes(PAGE))
        elif change == "same":
            store.write(n * PAGE, b"8 bytes!" * 512)
        else:
            store.write(n * PAGE, bytes(len(SECRET)))
    assert found(store) == 350
    store.check(3)
    for n in range(1, 700, 2):
        assert store.read(n * PAGE, PAGE) == page_of(SIZES[n % len(SIZES)], n)
    store.zero(0, 16 * MIB)
    assert found(store) == 0
    store.check(3)


def test_the_word_of_a_same_filled_page_is_wiped() -> None:
    store = Store(MIB, wipe=True)
    word = b"\xf1secret\xf2"  # too large for a slot
    store.write(0, word * 512)
    assert found(store, word) == 1
    store.zero(0, PAGE)
    assert found(store, word) == 0


@pytest.mark.parametrize("wipe", [True, False])
def test_compaction_and_migration_leave_no_copy(wipe: bool) -> None:
    store = filled(3500, wipe=wipe)
    kept = random.Random(3).sample(range(3500), 900)
    for n in set(range(3500)) - set(kept):
        store.zero(n * PAGE, PAGE)
    store.compact()
    store.migration.run()
    assert store.migration.stats().migrated > 0
    if not wipe:
        assert found(store) > 900
        return
    assert found(store) == 900
    for n in kept:
        assert store.read(n * PAGE, PAGE) == page_of(SIZES[n % len(SIZES)], n)
    store.check(3)


def test_recompression_leaves_no_copy() -> None:
    store = filled(200, wipe=True, secondary=(Codec("zstd", 3),))
    job = Recompression(store, 1)
    while job.select(1 << 30) or job.step(1 << 30):
        pass
    assert job.finish().won > 0
    assert found(store) <= 200
    store.zero(0, 16 * MIB)
    assert found(store) == 0
    store.check(3)


# ---- the backing store ----------------------------------------------------------------------------------

def on_disk(path: Path) -> int:
    return path.read_bytes().count(SECRET)


def trim_all(store: Store) -> None:
    while store.backing.trim():
        pass


def test_blocks_are_zeroed_when_their_last_page_is_gone(tmp_path: Path) -> None:
    path = backing_file(tmp_path / "store")
    store = Store(16 * MIB, wipe=True, backing=Backing(str(path), wipe=True))
    for n in range(700):
        store.write(n * PAGE, page_of(SIZES[n % len(SIZES)], n))
    write_back(store)
    assert found(store) == 0 and on_disk(path) == 700
    store.zero(0, 16 * MIB)
    assert on_disk(path) == 700
    assert store.backing.trims
    trim_all(store)
    assert on_disk(path) == 0
    assert store.backing.stats().stale == store.backing.stats().used == 0
    store.check(3)
    store.close()


@pytest.mark.requires("root", "loop")
@pytest.mark.parametrize("wipe", [True, False])
def test_the_end_zeroes_what_is_still_used_on_a_device(wipe: bool, tmp_path: Path) -> None:
    path = backing_file(tmp_path / "store")
    device = subprocess.run(
        ["losetup", "--find", "--show", "--direct-io=off", path], check=True, capture_output=True, text=True,
        timeout=60).stdout.strip()
    try:
        store = Store(16 * MIB, wipe=wipe, backing=Backing(device, wipe=wipe))
        try:
            for n in range(300):
                store.write(n * PAGE, page_of(SIZES[n % len(SIZES)], n))
            write_back(store)
            store.zero(0, 30 * PAGE)
            trims, before = store.backing.trims, on_disk(Path(device))
        finally:
            store.close()
        assert (trims, before, on_disk(Path(device))) == (wipe, 300, 0 if wipe else 300)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True, timeout=60)
