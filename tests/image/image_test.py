# SPDX-License-Identifier: Apache-2.0
"""Images: what the format is, and that damage never comes out as data."""
from __future__ import annotations

import errno
import os
import random
import struct
import time
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.images import ID, content, readable, restored, save
from tests.support.page_kinds import block
from zramfs.codecs.codec import Codec
from zramfs.errors import ZramfsError
from zramfs.image import layout
from zramfs.image.reader import ImageReader
from zramfs.image.writer import ImageWriter, remove_left
from zramfs.store.store import Store

PAGE = 4096
SIZE = 8 << 20


def filled(seed: int = 1, pages: int = 600, **how: object) -> tuple[Store, bytes]:
    """A store with pages of every kind here and there, and what it holds."""
    store, model = Store(SIZE, **how), bytearray(SIZE)
    rng = random.Random(seed)
    for n in rng.sample(range(SIZE // PAGE), pages):
        data = block("mixed", n, PAGE)
        store.write(n * PAGE, data)
        model[n * PAGE:n * PAGE + PAGE] = data
    return store, bytes(model)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("image") / "image"
    store, model = filled()
    save(store, path)
    store.close()
    return path, model


# ---- what an image is ------------------------------------------------------------------------------------

def test_an_image_of_two_pages_has_these_bytes(tmp_path: Path) -> None:
    """The format, written down once more: an image of today must be readable by every later version."""
    store = Store(SIZE)
    store.write(3 * PAGE, b"\x11" * PAGE)
    raw = random.Random(1).randbytes(PAGE)
    store.write(1025 * PAGE, raw)
    save(store, tmp_path / "image")
    store.close()
    data = (tmp_path / "image").read_bytes()

    def summed(*pieces: bytes) -> bytes:
        return struct.pack("<I", zlib.crc32(b"".join(pieces), zlib.crc32(ID)))

    algorithms = struct.pack("<16siI", b"lz4", 1, 0) + bytes(24 * 3)
    chunks = (struct.pack("<Q", 0) + bytes([1 << 3]) + bytes(63)
              + struct.pack("<Q", 2) + bytes([1 << 1]) + bytes(63))
    header = struct.pack(
        "<8sII16sQQQI4sQ4s32s", b"zramfsIM", 1, PAGE, ID, SIZE, 2, 1_700_000_000, 96, summed(algorithms), 144,
        summed(chunks), b"test").ljust(PAGE - 4, b"\0")
    head = (header + summed(header) + algorithms.ljust(PAGE, b"\0") + chunks.ljust(PAGE, b"\0"))
    directory = struct.pack("<QQ", 3 | 8 << 36 | 1 << 51, 1025 | PAGE << 36 | 3 << 51)
    body = directory + b"\x11" * 8 + raw
    part = struct.pack("<8s16sIII", b"zramfsPT", ID, 0, 2, 8 + PAGE) + summed(body)
    part = (part + summed(part) + body).ljust(2 * PAGE, b"\0")
    trailer = struct.pack("<8s16sQQ", b"zramfsTR", ID, len(head + part), 1).ljust(PAGE - 4, b"\0")
    assert data == head + part + head + trailer + summed(trailer)


def test_an_object_goes_in_as_it_is(tmp_path: Path) -> None:
    """With the priority, the level and the dictionary of what has compressed it."""
    words = block("text", 9, 3000)
    store = Store(SIZE, algo="zstd", level=7, dictionary=words, secondary=[Codec("lz4hc", 9)])
    page = words[100:2000] + bytes(PAGE - 1900)
    store.write(0, page)
    save(store, tmp_path / "image")
    with ImageReader(tmp_path / "image") as image:
        assert image.head.algorithms == (
            layout.SavedAlgorithm("zstd", 7, words), layout.SavedAlgorithm("lz4hc", 9), None, None)
        (directory, data), = image.parts()
    assert len(directory) == 8 and len(data) == store.stats().compr_data_size < 100
    assert Codec("zstd", 7, words).decompress(data, PAGE) == page
    store.close()


@pytest.mark.parametrize("how", [
    {}, {"algo": "zstd"}, {"algo": "none"}, {"algo": "lz4hc", "level": 4},
    {"algo": "zstd", "dictionary": b"x" * 99},
    {"algo": "zstd", "secondary": [Codec("lz4")]},
], ids=str)
def test_a_device_with_any_algorithm_takes_an_image(
    image: tuple[Path, bytes], how: dict[str, object]
) -> None:
    path, model = image
    assert content(path, **how) == model


def test_empty_pages_cost_nothing(tmp_path: Path) -> None:
    store = Store(1 << 40)
    store.write((1 << 40) - PAGE, b"last" * 1024)
    save(store, tmp_path / "image")
    store.close()
    assert (tmp_path / "image").stat().st_size == 8 * PAGE
    found, lost, damage = restored(tmp_path / "image")
    assert (lost, damage, found.read((1 << 40) - PAGE, 4)) == ([], [], b"last")
    found.close()


def test_an_image_without_a_page_is_one(tmp_path: Path) -> None:
    store = Store(SIZE)
    save(store, tmp_path / "image")
    store.close()
    assert content(tmp_path / "image") == bytes(SIZE)


# ---- damage ------------------------------------------------------------------------------------------------

def expect_harmless(data: bytes, model: bytes, path: Path) -> int | None:
    """Each page of what comes of damaged bytes is right, or cannot be read. How many are lost; None: it was
    refused."""
    path.write_bytes(data)
    try:
        store, lost, damage = restored(path)
    except ZramfsError as error:
        assert error.errno == errno.EINVAL and str(path) in str(error)
        return None
    try:
        pages = readable(store)
        assert all(data == model[n * PAGE:n * PAGE + PAGE] for n, data in pages.items())
        named = {n for first, last in lost for n in range(first, last + 1)}
        assert named == set(range(SIZE // PAGE)) - set(pages)
        assert damage or not named
        return len(named)
    finally:
        store.close()


FLIPS = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FLIPS
@given(flips=st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=6))
def test_flipped_bytes_never_come_out_as_data(
    image: tuple[Path, bytes], tmp_path: Path, flips: list[tuple[float, int]]
) -> None:
    path, model = image
    data = bytearray(path.read_bytes())
    for where, change in flips:
        data[int(where * len(data))] ^= change
    expect_harmless(bytes(data), model, tmp_path / "damaged")


@FLIPS
@given(length=st.floats(0, 1, exclude_max=True))
def test_of_an_image_that_is_cut_off_the_beginning_is_left(
    image: tuple[Path, bytes], tmp_path: Path, length: float
) -> None:
    path, model = image
    data = path.read_bytes()[:int(length * path.stat().st_size)]
    lost = expect_harmless(data, model, tmp_path / "damaged")
    assert (lost is None) == (len(data) < 3 * PAGE), "the first head is the first three blocks here"


@FLIPS
@given(pieces=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=5))
def test_blocks_that_lie_elsewhere_never_come_out_as_data(
    image: tuple[Path, bytes], tmp_path: Path, pieces: list[tuple[int, int]]
) -> None:
    path, model = image
    data = bytearray(path.read_bytes())
    for source, target in pieces:
        a, b = source * PAGE % len(data), target * PAGE % len(data)
        data[b:b + PAGE] = data[a:a + PAGE]
    expect_harmless(bytes(data), model, tmp_path / "damaged")


def test_every_part_costs_no_more_than_itself(image: tuple[Path, bytes], tmp_path: Path) -> None:
    path, model = image
    data = path.read_bytes()
    with ImageReader(path) as opened:
        counts = [len(directory) // 8 for directory, _ in opened.parts()]
    assert len(counts) >= 3
    starts = [at for at in range(0, len(data), PAGE) if data[at:at + 8] == layout.PART_MAGIC]
    assert len(starts) == len(counts)
    for start, count in zip(starts, counts, strict=True):
        for at in (start + 4, start + 40, start + layout.PART_HEADER + 8 * count + 1):
            lost = expect_harmless(data[:at] + bytes([data[at] ^ 4]) + data[at + 1:], model, tmp_path / "x")
            assert lost == count


def test_a_hole_of_any_length_is_passed_by(image: tuple[Path, bytes], tmp_path: Path) -> None:
    path, model = image
    data, long = path.read_bytes(), tmp_path / "long"
    hole, second = 1 << 43, len(data) - 4 * PAGE
    with open(long, "wb") as file:
        file.write(data[:3 * PAGE])
        file.seek(hole + 3 * PAGE)
        file.write(data[3 * PAGE:-PAGE] + layout.pack_trailer(ID, hole + second, 3))
    began = time.monotonic()
    store, lost, damage = restored(long)
    assert time.monotonic() - began < 60 and lost == [] and len(damage) == 1
    assert store.read(0, SIZE) == model
    store.close()


@pytest.mark.parametrize("block_number", [0, 1, 2])
def test_either_head_is_enough(image: tuple[Path, bytes], tmp_path: Path, block_number: int) -> None:
    path, model = image
    data = path.read_bytes()
    at = block_number * PAGE
    first = data[:at] + os.urandom(PAGE) + data[at + PAGE:]
    assert expect_harmless(first, model, tmp_path / "first") == 0
    second = len(data) - 4 * PAGE + at
    both = first[:second] + os.urandom(PAGE) + first[second + PAGE:]
    assert expect_harmless(both, model, tmp_path / "both") is None
    zeroed = data[:second] + bytes(PAGE) + data[second + PAGE:]
    assert expect_harmless(zeroed, model, tmp_path / "second") == 0


# ---- enemies
# ------------------------------------------------------------------------------------------------

def write_image(path: Path, head: layout.Head, *parts: tuple[bytes, bytes]) -> None:
    """With sums that are right."""
    writer = ImageWriter(path, force=True)
    writer.head(head)
    for directory, data in parts:
        writer.part(directory, data)
    writer.commit()
    writer.close()


def a_head(**changes: object) -> layout.Head:
    values: dict[str, object] = {
        "id": ID, "disksize": SIZE, "pages": 1, "created": 1, "algorithms": (
            layout.SavedAlgorithm("lz4", 1), None, None, None),
        "chunks": struct.pack("<Q", 0) + b"\x03" + bytes(63), **changes}
    return layout.Head(**values)


def entry(slot: int, size: int, kind: int, prio: int = 0) -> bytes:
    return struct.pack("<Q", slot | size << 36 | prio << 49 | kind << 51)


GOOD = entry(0, 8, 1), b"ABCDEFGH"


@pytest.mark.parametrize(("directory", "data"), [
    (entry(2, 8, 1), b"ABCDEFGH"), (entry(2048, 8, 1), b"ABCDEFGH"),
    (entry((1 << 36) - 1, 8, 1), b"ABCDEFGH"),
    (entry(1, 7, 1), b"ABCDEFG"), (entry(1, 9, 1), b"ABCDEFGHI"), (entry(1, 0, 2), b""),
    (entry(1, 4096, 2), bytes(4096)), (entry(1, 100, 2, 1), bytes(100)), (entry(1, 8, 1, 2), b"ABCDEFGH"),
    (entry(1, 4095, 3), bytes(4095)), (entry(1, 8191, 3), bytes(8191)), (entry(1, 8, 4), b"ABCDEFGH"),
    (entry(1, 8, 5), b"ABCDEFGH"), (entry(1, 8, 0), b"ABCDEFGH"), (entry(1, 8, 1), b"ABCDEFG"),
    (entry(1, 8, 1), b"ABCDEFGHI"), (entry(1, 8, 1 | 8), b"ABCDEFGH"),
    (entry(1, 100, 2), b"no lz4 at all" * 9),
    (entry(1, 8, 1 << 12), b"ABCDEFGH"),
])
def test_an_impossible_part_is_none(tmp_path: Path, directory: bytes, data: bytes) -> None:
    """Its pages are lost; the other part is restored."""
    path = tmp_path / "image"
    write_image(path, a_head(), GOOD, (directory, data))
    store, lost, _ = restored(path)
    assert lost == [(1, 1)] and store.read(0, 8) == b"ABCDEFGH"
    with pytest.raises(OSError) as caught:
        store.read(PAGE, 1)
    assert caught.value.errno == errno.EIO
    store.write(PAGE, bytes(PAGE))
    store.zero(0, SIZE)
    store.check(3)
    assert store.read(0, SIZE) == bytes(SIZE)
    store.close()


def test_an_object_that_is_no_page_is_lost(tmp_path: Path) -> None:
    bad = os.urandom(300)
    write_image(tmp_path / "image", a_head(), (GOOD[0] + entry(1, 300, 2), GOOD[1] + bad))
    store, lost, damage = restored(tmp_path / "image")
    assert lost == [(1, 1)] and damage == [] and store.read(0, 4) == b"ABCD"
    store.close()


def test_a_page_that_comes_twice_is_the_first(tmp_path: Path) -> None:
    twice = entry(0, 8, 1) + entry(0, 8, 1) + entry(1, 8, 1), b"1111111122222222ABCDEFGH"
    write_image(tmp_path / "image", a_head(), twice)
    store, lost, _ = restored(tmp_path / "image")
    assert lost == [] and store.read(0, 8) == b"11111111"
    store.close()


@pytest.mark.parametrize(("changes", "words"), [
    ({"disksize": 0}, "impossible lengths"), ({"disksize": 5}, "impossible lengths"),
    ({"disksize": 1 << 50}, "impossible lengths"), ({"chunks": bytes(71)}, "impossible lengths"),
    ({"chunks": bytes(72 * 5)}, "impossible lengths"),
    ({"algorithms": (layout.SavedAlgorithm("snappy", 1), None, None, None)}, "compressed with 'snappy'"),
    ({"algorithms": (None, None, None, None)}, "list of algorithms"),
    ({"algorithms": ()}, "list of algorithms"),
])
def test_an_impossible_head_is_refused(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    write_image(tmp_path / "image", a_head(**changes))
    with pytest.raises(ZramfsError, match=words) as caught:
        ImageReader(tmp_path / "image")
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("chunks", [
    struct.pack("<Q", 4) + b"\x01" + bytes(63), struct.pack("<Q", 1 << 60) + b"\x01" + bytes(63),
    (struct.pack("<Q", 1) + b"\x01" + bytes(63)) * 2,
])
def test_an_impossible_map_is_refused(tmp_path: Path, chunks: bytes) -> None:
    write_image(tmp_path / "image", a_head(chunks=chunks))
    with pytest.raises(ValueError, match="the list of pages has chunk"):
        restored(tmp_path / "image")


def test_another_version_is_refused_with_a_sentence(image: tuple[Path, bytes], tmp_path: Path) -> None:
    data = bytearray(image[0].read_bytes())
    data[8:12] = struct.pack("<I", 2)
    data[PAGE - 4:PAGE] = struct.pack("<I", zlib.crc32(data[:PAGE - 4], zlib.crc32(ID)))
    (tmp_path / "image").write_bytes(data[:-PAGE])
    with pytest.raises(ZramfsError, match=r"it has format 2 .* written by zramfs test; .* reads format 1"):
        ImageReader(tmp_path / "image")


@pytest.mark.parametrize("data", [
    b"", b"zramfsIM", bytes(PAGE), b"zramfsIM".ljust(PAGE, b"\0"), bytes(range(256)) * 400])
def test_what_is_no_image_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "image").write_bytes(data)
    with pytest.raises(ZramfsError, match="cannot be restored") as caught:
        ImageReader(tmp_path / "image")
    assert caught.value.errno == errno.EINVAL


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "missing"):
        with pytest.raises(ZramfsError):
            ImageReader(path)


# ---- where it is written
# --------------------------------------------------------------------------------------

@pytest.fixture(params=[True, False], ids=["nameless", "beside"])
def beside(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a save under way has in its directory, where the file system has files without names and where it
    has none."""
    if not request.param:
        refuse_nameless(monkeypatch)
    return [] if request.param else ["image.tmp"]


def refuse_nameless(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refusing(path: object, flags: int, *more: object, **how: object) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "refused")
        return real(path, flags, *more, **how)

    monkeypatch.setattr(os, "open", refusing)


def test_only_a_whole_image_takes_the_place_of_the_old_one(tmp_path: Path, beside: list[str]) -> None:
    path = tmp_path / "image"
    write_image(path, a_head(), GOOD)
    before = path.read_bytes()
    writer = ImageWriter(path)
    writer.head(a_head())
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["image", *beside]
    with pytest.raises(ZramfsError, match="another save is writing") as caught:
        ImageWriter(path)
    assert caught.value.errno == errno.EBUSY
    writer.close()
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["image"]
    writer = ImageWriter(path)
    writer.head(a_head())
    writer.part(*GOOD)
    writer.commit()
    writer.close()
    assert os.listdir(tmp_path) == ["image"] and path.stat().st_mode & 0o777 == 0o600
    assert path.read_bytes() == before


def test_of_two_first_saves_to_a_name_one_is_there_whole(tmp_path: Path) -> None:
    path = tmp_path / "image"
    first, second = ImageWriter(path), ImageWriter(path)
    for writer in (first, second):
        writer.head(a_head())
        writer.part(*GOOD)
    for writer in (second, first):
        writer.commit()
        writer.close()
        assert os.listdir(tmp_path) == ["image"] and restored(path)[1] == [(1, 1)]


def test_what_a_killed_save_has_left_goes_with_the_next_one(tmp_path: Path, beside: list[str]) -> None:
    (tmp_path / "image.tmp").write_bytes(b"left" * 100_000)
    (tmp_path / "image.tmp").chmod(0o644)
    writer = ImageWriter(tmp_path / "image")
    assert os.listdir(tmp_path) == beside
    writer.close()
    (tmp_path / "image.tmp").write_bytes(b"left" * 100_000)
    write_image(tmp_path / "image", a_head(), GOOD)
    assert os.listdir(tmp_path) == ["image"] and (tmp_path / "image").stat().st_mode & 0o777 == 0o600
    assert restored(tmp_path / "image")[1] == [(1, 1)]


def test_what_a_killed_save_has_left_goes_with_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove_left(tmp_path / "image")
    (tmp_path / "image.tmp").write_bytes(b"left")
    remove_left(tmp_path / "image")
    assert os.listdir(tmp_path) == []
    refuse_nameless(monkeypatch)
    writer = ImageWriter(tmp_path / "image")
    with pytest.raises(ZramfsError, match="another save is writing") as caught:
        remove_left(tmp_path / "image")
    assert caught.value.errno == errno.EBUSY and os.listdir(tmp_path) == ["image.tmp"]
    writer.close()
    with pytest.raises(ZramfsError, match="No such file"):
        remove_left(tmp_path / "no/image")


def test_a_file_that_is_no_image_stays(tmp_path: Path) -> None:
    path = tmp_path / "letter"
    path.write_text("Dear all")
    with pytest.raises(ZramfsError, match="is no image") as caught:
        ImageWriter(path)
    assert caught.value.errno == errno.EEXIST and path.read_text() == "Dear all"
    write_image(path, a_head(), GOOD)
    assert path.read_bytes()[:8] == b"zramfsIM"
    (tmp_path / "directory").mkdir()
    with pytest.raises(ZramfsError):
        ImageWriter(tmp_path / "directory", force=True)


@pytest.mark.parametrize("kind", ["link", "hard link", "directory"])
def test_what_is_in_the_way_of_the_new_file_is_not_written_to(tmp_path: Path, kind: str) -> None:
    other = tmp_path / "other"
    beside = tmp_path / "image.tmp"
    other.write_text("other")
    if kind == "link":
        beside.symlink_to(other)
    elif kind == "hard link":
        os.link(other, beside)
    else:
        beside.mkdir()
    with pytest.raises(ZramfsError):
        ImageWriter(tmp_path / "image")
    assert other.read_text() == "other"
