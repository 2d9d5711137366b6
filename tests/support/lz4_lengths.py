# SPDX-License-Identifier: Apache-2.0
"""How long LZ4 makes a page: the fast compressor of liblz4 and that of the kernel, told apart.

Both walk over the page with a table of 8192 positions by the hash of 4 bytes, take the first match
that they meet, and look for matches in growing steps where they meet none. They differ in one rule:
when the step leads to the last byte at which a match may begin (12 from the end), the kernel's
(lib/lz4, of 2017) gives up without a look at the present byte, and liblz4 since 1.9 looks. So liblz4
finds a last match more in about one page of twenty, and is never longer.
"""
from __future__ import annotations

import functools
from collections.abc import Callable

from tests.support import models

PAGE = 4096
MATCH = 4  # the shortest
LAST_START = 12  # bytes before the end: no match begins later
LAST_LITERALS = 5  # and ends before these
SKIP = 6  # after every 2^SKIP misses the step grows by one


def kernel_length(page: bytes, acceleration: int = 1) -> int:
    """Bytes that the kernel's LZ4_compress_fast makes of a page."""
    return _length(page, acceleration, len(page) - LAST_START)


def library_length(page: bytes, acceleration: int = 1) -> int:
    """Bytes that LZ4_compress_fast of liblz4 1.9 makes of a page."""
    return _length(page, acceleration, len(page) - LAST_START + 1)


def kept(page: bytes, length: Callable[[bytes], int]) -> int:
    """Bytes of a page that zram counts as compressed data."""
    if page == page[:8] * (PAGE // 8):
        return 0
    size = length(page)
    return size if size < models.HUGE else PAGE


@functools.lru_cache(maxsize=1 << 14)
def _length(page: bytes, acceleration: int, furthest: int) -> int:
    """furthest: the search ends when its next position lies behind this one."""
    table: dict[int, int] = {}
    matchable = len(page) - LAST_LITERALS
    length = done = match = 0
    table[_hash(page, 0)] = 0
    at = 1
    while True:
        ahead, tries = at, acceleration << SKIP
        step = 1
        while True:
            at, ahead = ahead, ahead + step
            step = tries >> SKIP
            tries += 1
            if ahead > furthest:
                return length + _run(len(page) - done)
            key = _hash(page, at)
            match, table[key] = table.get(key, 0), at
            if page[match:match + MATCH] == page[at:at + MATCH]:
                break
        while at > done and match > 0 and page[at - 1] == page[match - 1]:
            at, match = at - 1, match - 1
        length += _run(at - done)
        while True:
            end = at + MATCH
            while end < matchable and page[end] == page[match + end - at]:
                end += 1
            length += 2 + _more(end - at - MATCH)
            at = done = end
            if at > len(page) - LAST_START:
                return length + _run(len(page) - done)
            table[_hash(page, at - 2)] = at - 2
            key = _hash(page, at)
            match, table[key] = table.get(key, 0), at
            if page[match:match + MATCH] != page[at:at + MATCH]:
                break
            length += 1
        at += 1


def _hash(page: bytes, at: int) -> int:
    return (int.from_bytes(page[at:at + MATCH], "little") * 2654435761 & 0xFFFFFFFF) >> 19


def _run(literals: int) -> int:
    """A token and its literals."""
    return 1 + literals + _more(literals)


def _more(number: int) -> int:
    """Bytes for what does not fit into half a token."""
    return 0 if number < 15 else 1 + (number - 15) // 255
