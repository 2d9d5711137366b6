# SPDX-License-Identifier: Apache-2.0
"""zramfs train, on mounted devices: what it samples, what it promises and whether that is true, when it
refuses, and that it disturbs nothing."""
from __future__ import annotations

import os
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.support.page_kinds import block, hard, noise, prose
from tests.support.served import ServedDevice, served_device
from tests.support.whole import run
from zramfs.cli import zramfs
from zramfs.codecs import train
from zramfs.codecs.codec import Codec
from zramfs.errors import ZramfsError

pytestmark = pytest.mark.requires("fuse")

PAGE = 4096
WORDS = [random.Random(n).randbytes(6).hex().encode() for n in range(400)]


def record(seed: int) -> bytes:
    """A page of records that share their words with the other pages."""
    rng = random.Random(seed)
    rows = (b"INSERT INTO visits VALUES (%d, '%s', 'https://example.org/%s?id=%d');\n"
            % (rng.randrange(10**9), rng.choice(WORDS), rng.choice(WORDS), rng.randrange(10**6))
            for _ in range(60))
    return b"".join(rows)[:PAGE]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedDevice]:
    with served_device(tmp_path / "dev", size=64 << 20, access_times=True) as child:
        yield child
        assert child.stop() == 0, child.log


def fill(served: ServedDevice, pages: list[bytes], first: int = 0) -> None:
    with open(served.disk, "r+b", buffering=0) as disk:
        os.pwrite(disk.fileno(), b"".join(pages), first * PAGE)


def call(*words: object) -> Result:
    return CliRunner().invoke(zramfs, ["train", *map(str, words)])


def test_what_it_promises_is_true(served: ServedDevice, tmp_path: Path) -> None:
    fill(served, [record(n) for n in range(600)] + [bytes(PAGE)] * 100)
    served.write("zram/idle", "all")
    before = served.read("zram/block_state")
    output = tmp_path / "dict"
    done = call(served.directory, "--output", output, "--size", "16K", "--algo", "zstd:9")
    assert done.exit_code == 0, done.output
    assert served.read("zram/block_state") == before, "looking is no use"
    assert output.stat().st_mode & 0o777 == 0o600
    dictionary = output.read_bytes()
    assert 256 <= len(dictionary) <= 16384
    assert "480 pages to train on and 120 others to judge by, of about 600" in done.output
    without, with_it = (int(n) for n in re.findall(r"(\d+) bytes a page", done.output))
    fresh = [record(n) for n in range(10_000, 10_200)]
    for codec, promised in ((Codec("zstd", 9), without), (Codec("zstd", 9, dictionary), with_it)):
        mean = sum(len(codec.compress(page)) for page in fresh) / len(fresh)
        assert mean == pytest.approx(promised, rel=0.05)
    assert with_it < 0.9 * without
    assert f"zstd:9:dict={output}" in done.output
    assert set(os.listdir(tmp_path)) == {"dict", "dev"}


@pytest.mark.parametrize("algo", ["lz4", "lz4hc:12"])
def test_for_lz4(served: ServedDevice, tmp_path: Path, algo: str) -> None:
    fill(served, [record(n) for n in range(400)])
    done = call(served.directory, "--output", tmp_path / "dict", "--algo", algo)
    assert done.exit_code == 0, done.output
    dictionary = (tmp_path / "dict").read_bytes()
    name = algo.partition(":")[0]
    page = record(5000)
    assert len(Codec(name, None, dictionary).compress(page)) < 0.8 * len(Codec(name).compress(page))


@pytest.mark.parametrize(
    "make", [noise, lambda n: block("text", n, PAGE)], ids=["noise", "nothing in common"])
def test_a_dictionary_that_would_lose_is_not_written(served: ServedDevice, tmp_path: Path, make) -> None:
    fill(served, [make(n) for n in range(300)])
    done = call(served.directory, "--output", tmp_path / "dict")
    assert isinstance(done.exception, ZramfsError), done.output
    assert "would lose" in str(done.exception) or "no dictionary of 64K comes of" in str(done.exception)
    assert not (tmp_path / "dict").exists()


def test_too_few_pages(served: ServedDevice, tmp_path: Path) -> None:
    fill(served, [record(n) for n in range(50)] + [b"same" * 1024] * 200)
    done = call(served.directory, "--output", tmp_path / "dict")
    assert "at least 64 pages to train on" in str(done.exception) and "found 50" in str(done.exception)
    assert not (tmp_path / "dict").exists()


def test_an_old_file_stays_when_it_refuses_and_is_replaced_whole(
    served: ServedDevice, tmp_path: Path
) -> None:
    output = tmp_path / "dict"
    output.write_text("old")
    fill(served, [noise(n) for n in range(100)])
    assert call(served.directory, "--output", output).exit_code != 0
    assert output.read_text() == "old"
    fill(served, [record(n) for n in range(600)])
    assert call(served.directory, "--output", output).exit_code == 0
    assert len(output.read_bytes()) > 256


@pytest.mark.parametrize("words, sentence", [
    (("--algo", "none"), "zstd, lz4 or lz4hc"), (("--algo", "lzo"), "unknown compressor"),
    (("--size", "255"), "256 to 1048576 bytes"), (("--size", "2M"), "256 to 1048576"),
    (("--size", "65K", "--algo", "lz4"), "256 to 65536"), (("--sample", "63"), "range 64<=x"),
])
def test_wrong_calls(tmp_path: Path, words: tuple[str, ...], sentence: str) -> None:
    done = call(tmp_path, "--output", tmp_path / "dict", *words)
    assert done.exit_code == 2 and sentence in done.output


def test_a_place_that_cannot_be_written_shows_before_the_work(
    served: ServedDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "sample", lambda *_: pytest.fail("sampled"))
    done = call(served.directory, "--output", tmp_path / "no/dict")
    assert isinstance(done.exception, ZramfsError)
    assert str(done.exception) == (
        f"expected {tmp_path}/no/dict in a directory that can be written to; {tmp_path}/no is none")


def test_without_the_package_it_says_where_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    taken = train.Sample([os.urandom(4096)] * train.LEAST, train.LEAST)
    with pytest.raises(ZramfsError, match="apt-get install python3-zstandard, or pip install 'zramfs"):
        train.train(taken, "zstd", 3, 1024)


def test_what_is_lost_is_called_so() -> None:
    same = train.Side(1000, 1.0, 1.0)
    lines = list(train.Verdict("zstd", 3, 80, 20, 100, 4096, same, same).lines())
    assert lines[-1] == (
        "that is 0.0% less; for the whole device about 4K lost, the dictionary's own memory counted")


def test_samples_of_random_places(served: ServedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a device with more data than is worth a look at every page."""
    fill(served, [record(n) for n in range(300)])
    fill(served, [bytes(PAGE)] * 300 + [prose(n % 20) for n in range(300)], 5000)
    monkeypatch.setattr(train, "WHOLE", 100)
    taken = train.sample(served.directory, 200, random.Random(1))
    known = {record(n) for n in range(300)} | {prose(n) for n in range(20)}
    assert len(taken.pages) > 80 and set(taken.pages) <= known
    assert taken.stored == 600


def test_peek_is_no_use_of_a_page(served: ServedDevice) -> None:
    fill(served, [prose(1), hard(1), bytes(PAGE)])
    served.write("zram/idle", "all")
    with open(served.directory / "peek", "r+b", buffering=0) as file:
        def peek(pages: bytes, size: int, offset: int = 0) -> bytes:
            file.write(pages)
            return os.pread(file.fileno(), size, offset)

        assert peek(b"0", PAGE) == prose(1)
        assert peek(b"1\n", 2 * PAGE) == hard(1)
        file.write(b"1")
        # Reads begin at the page wherever the writes have moved the offset.
        assert (file.read(100), file.read(50), file.read(PAGE), file.read(1)) == (
            hard(1)[:100], hard(1)[100:150], hard(1)[150:], b"")
        assert peek(b"2", PAGE) == peek(b"90", PAGE) == bytes(PAGE)
        assert peek(b"%d" % (64 << 20 >> 12), PAGE) == b""
        file.write(b"0-2")
        assert b"".join(iter(lambda: file.read(8 * PAGE), b"")) == prose(1) + hard(1) + bytes(PAGE)
        for nonsense in (b"-1", b"\n", b"x", b"2-1", b"1-", b"9" * 16):
            with pytest.raises(OSError, match="Invalid argument"):
                file.write(nonsense)
    assert "peek: expected the number of a page, or FIRST-LAST, got" in served.read("control")
    assert served.read("zram/block_state").count("i") == 2
    assert os.stat(served.directory / "peek").st_mode & 0o777 == 0o600


def test_who_reads_every_file_does_not_read_the_device(served: ServedDevice, tmp_path: Path) -> None:
    """An indexer, `cp -a`, `grep -r`: they find nothing in peek that they have not asked for."""
    fill(served, [b"needle".ljust(PAGE, b".")])
    assert (served.directory / "peek").read_bytes() == b""
    run("cp", "-a", served.directory, tmp_path / "copy", check=False)  # some files are only for writing
    assert (tmp_path / "copy/peek").stat().st_size == 0
    assert run("grep", "-r", "-l", "needle", served.directory, check=False).stdout == ""
