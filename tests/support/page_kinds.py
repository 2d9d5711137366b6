# SPDX-License-Identifier: Apache-2.0
"""Data of every kind that the store keeps differently."""
from __future__ import annotations

import functools
import random

from tests.support import models

PAGE = 4096

KINDS = ("zeros", "small word", "halves", "odd word", "text", "half random", "random", "mixed")


def block(kind: str, seed: int, n: int) -> bytes:
    """n bytes whose whole pages are of one kind; from the same seed always the same."""
    rng = random.Random(f"{kind} {seed}")
    if kind == "zeros":
        return bytes(n)
    if kind == "small word":
        return _repeat(rng.randrange(1 << 40).to_bytes(8, "little"), n)
    if kind == "halves":
        return _repeat(rng.randbytes(4) * 2, n)
    if kind == "odd word":
        return _repeat((rng.randrange(1, 1 << 24) << 40 | rng.randrange(1 << 32)).to_bytes(8, "little"), n)
    if kind == "text":
        return _repeat(rng.randbytes(rng.randrange(9, 700)), n)
    if kind == "half random":
        return b"".join(rng.randbytes(PAGE // 2) + bytes(PAGE // 2) for _ in range(-(-n // PAGE)))[:n]
    if kind == "random":
        return rng.randbytes(n)
    pages = (block(rng.choice(KINDS[:-1]), rng.randrange(1 << 16), PAGE) for _ in range(-(-n // PAGE)))
    return b"".join(pages)[:n]


def _repeat(piece: bytes, n: int) -> bytes:
    return (piece * (n // len(piece) + 1))[:n]


_KEYS = random.Random("keys")
KEYS = tuple(bytes(_KEYS.choices(b"etaoinshrdlucmfwyp", k=8)) for _ in range(160))


@functools.cache
def page_of_size(size: int) -> bytes:
    """A page that lz4 compresses to exactly `size` bytes."""
    rng = random.Random(size)
    # Random bytes cost a little more than one byte each, the rest next to nothing.
    for length in range(max(0, size - 60), size):
        page = rng.randbytes(length) + bytes(PAGE - length)
        if models.lz4_size(page) == size:
            return page
    raise AssertionError(f"no page of {size} compressed bytes found")


@functools.cache
def prose(seed: int) -> bytes:
    """A page that lz4 makes to about 2400 bytes and zstd to about 1500."""
    rng = random.Random(seed)
    words = [bytes(rng.choices(b"etaoinshrdlucmfwyp", k=rng.randrange(3, 9))) for _ in range(250)]
    return b" ".join(rng.choices(words, k=900))[:PAGE]


@functools.cache
def record(seed: int) -> bytes:
    """A page of what services log: the same keys everywhere, in each page once, and values of its own."""
    rng = random.Random(seed)
    fields = (b'"%s_%s":"%d"' % (KEYS[n], KEYS[-n], rng.randrange(10000)) for n in range(len(KEYS)))
    return b",".join(fields).ljust(PAGE, b" ")[:PAGE]


@functools.cache
def hard(seed: int) -> bytes:
    """A page that lz4 stores raw, and zstd makes to about 3200 bytes."""
    return bytes(random.Random(seed).choices(range(76), k=PAGE))


@functools.cache
def noise(seed: int) -> bytes:
    """A page that nothing makes smaller."""
    return random.Random(seed).randbytes(PAGE)
