# SPDX-License-Identifier: Apache-2.0
"""A dictionary from a device's own pages: sampled through its tree, trained with the zstandard package,
and judged on pages that it was not trained on."""
from __future__ import annotations

import errno
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from zramfs.errors import ZramfsError
from zramfs.text.sizes import PAGE, format_size

from .codec import MAX_DICTIONARY, Codec

HUGE = 3625  # bytes: what does not become smaller than this is stored raw, as a page
# Lines of block_state, 40 bytes each, up to which it is read whole; beyond, from random places.
WHOLE = 1 << 20
HELD_OUT = 5  # every fifth page is kept from the training
# The trainer needs a few pages to find what they have in common; it fails or overfits with fewer.
LEAST = 64
LZ4_REACH = 64 << 10


@dataclass(frozen=True)
class Sample:
    """stored: pages of the device with data of their own, neither same-filled nor written back; where
    block_state is too long to be read whole, those that are written back count as well."""

    pages: list[bytes]
    stored: int


def sample(directory: Path, wanted: int, rng: random.Random) -> Sample:
    """At most `wanted` pages, each as likely as any other (of a device beyond 4 GiB of data: nearly so)
    and none twice. OSError."""
    disksize, *_ = (directory / "zram/disksize").read_text().split()
    numbers = [int(word) for word in (directory / "zram/mm_stat").read_text().split()]
    stored = numbers[0] // PAGE
    with open(directory / "zram/block_state", "rb", buffering=0) as file:
        if stored <= WHOLE:
            own = list(_own_pages(_lines(file.fileno())))
            chosen, stored = rng.sample(own, min(wanted, len(own))), len(own)
        else:
            chosen = _from_random_places(file.fileno(), int(disksize) // PAGE, wanted, rng)
            stored -= numbers[5]  # same-filled
    found = []
    with open(directory / "peek", "r+b", buffering=0) as file:
        for number in chosen:
            page = _peek_at(file.fileno(), number)
            # It may have been discarded or written back since.
            if page is not None and page != page[:8] * (PAGE // 8):
                found.append(page)
    return Sample(found, stored)


def _lines(fd: int) -> Iterator[bytes]:
    while data := os.read(fd, 1 << 17):
        yield from data.splitlines()


def _own_pages(lines: Iterator[bytes] | Sequence[bytes]) -> Iterator[int]:
    for line in lines:
        number, _, flags = line.split()
        if not flags.startswith((b"s", b".w")):
            yield int(number)


def _from_random_places(fd: int, pages: int, wanted: int, rng: random.Random) -> list[int]:
    """Numbers of pages. Behind a hole one is found more often than among others."""
    chosen: set[int] = set()
    for _ in range(20 * wanted):
        if len(chosen) >= wanted:
            break
        if kept := list(_own_pages(os.pread(fd, 1280, rng.randrange(pages)).splitlines())):
            chosen.add(rng.choice(kept))
    return sorted(chosen)


def _peek_at(fd: int, number: int) -> bytes | None:
    os.write(fd, b"%d" % number)
    try:
        page = os.pread(fd, PAGE, 0)
    except OSError as error:
        if error.errno == errno.ENODATA:
            return None
        raise
    return page if len(page) == PAGE else None


@dataclass(frozen=True)
class Side:
    """What pages come to with a codec: bytes together, and nanoseconds a page."""

    nbytes: int
    compress_ns: float
    decompress_ns: float


@dataclass(frozen=True)
class Verdict:
    algo: str
    level: int
    trained_on: int
    judged_by: int
    stored: int
    size: int  # of the dictionary, bytes
    without: Side
    with_it: Side

    @property
    def won(self) -> float:
        """Share of the compressed bytes."""
        return 1 - self.with_it.nbytes / self.without.nbytes if self.without.nbytes else 0.0

    @property
    def bytes_won(self) -> int:
        """Of the whole device, with the dictionary's own memory taken off."""
        each = (self.without.nbytes - self.with_it.nbytes) / self.judged_by
        return round(each * self.stored) - self.size

    def lines(self) -> Iterator[str]:
        yield (f"{self.trained_on} pages to train on and {self.judged_by} others to judge by, "
               f"of about {self.stored} that have data of their own")
        for what, side in (("without", self.without), (f"with {format_size(self.size)}", self.with_it)):
            yield (f"{self.algo} level {self.level} {what:<10} {side.nbytes / self.judged_by:6.0f} bytes a "
                   f"page, compressed in {side.compress_ns / 1000:.1f} us, decompressed in "
                   f"{side.decompress_ns / 1000:.1f} us")
        word = "less" if self.won >= 0 else "more"
        sum_up = "won" if self.bytes_won >= 0 else "lost"
        yield (f"that is {abs(self.won):.1%} {word}; for the whole device about "
               f"{format_size(abs(self.bytes_won))} {sum_up}, the dictionary's own memory counted")


def train(taken: Sample, algo: str, level: int, size: int) -> tuple[bytes, Verdict]:
    """The dictionary, of at most size bytes, and what it is worth. ZramfsError: EINVAL (too few pages, or
    nothing in common), ENOPKG."""
    try:
        import zstandard
    except ImportError:
        raise ZramfsError(
            errno.ENOPKG, "train needs the Python package zstandard, which is not installed: apt-get install "
            "python3-zstandard, or pip install 'zramfs[train]' where pip installed zramfs") from None
    if len(taken.pages) < LEAST:
        raise ZramfsError(
            errno.EINVAL, f"expected at least {LEAST} pages to train on that are neither same-filled nor "
            f"written back, found {len(taken.pages)}")
    judges = taken.pages[::HELD_OUT]
    pages: list[bytes | bytearray | memoryview] = [page for n, page in enumerate(taken.pages) if n % HELD_OUT]
    try:
        dictionary = zstandard.train_dictionary(size, pages, level=level if algo == "zstd" else 3).as_bytes()
    except zstandard.ZstdError as error:
        raise ZramfsError(
            errno.EINVAL, f"no dictionary of {format_size(size)} comes of {len(pages)} pages ({error}): take "
            "a larger --sample or a smaller --size") from None
    verdict = Verdict(
        algo, level, len(pages), len(judges), taken.stored, len(dictionary),
        _side(Codec(algo, level), judges), _side(Codec(algo, level, dictionary), judges))
    return dictionary, verdict


def _side(codec: Codec, pages: Sequence[bytes]) -> Side:
    began = time.perf_counter_ns()
    packed = [codec.compress(page, HUGE - 1) for page in pages]
    between = time.perf_counter_ns()
    for each in packed:
        if each is not None:
            codec.decompress(each, PAGE)
    ended = time.perf_counter_ns()
    return Side(
        sum(PAGE if each is None else len(each) for each in packed),
        (between - began) / len(pages), (ended - between) / len(pages))


def expect_size(size: int, algo: str) -> None:
    """ValueError for a size that no dictionary of that algorithm can have."""
    most = MAX_DICTIONARY if algo == "zstd" else LZ4_REACH
    if not 256 <= size <= most:
        raise ValueError(f"a dictionary for {algo} has 256 to {most} bytes, not {size}")


def write(dictionary: bytes, output: Path) -> None:
    """Whole or not at all, readable for its owner only: it holds pieces of the device's data. OSError."""
    fd, name = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)
    try:
        with open(fd, "wb") as file:
            file.write(dictionary)
            file.flush()
            os.fsync(fd)
        os.replace(name, output)
    except BaseException:
        os.unlink(name)
        raise
