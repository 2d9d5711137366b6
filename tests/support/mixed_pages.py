# SPDX-License-Identifier: Apache-2.0
"""A device's contents of many kinds, with neighbours that are alike, as files are."""
from __future__ import annotations

import functools
import random

from tests.support.page_kinds import block, hard, noise

PAGE = 4096
KINDS, SHARES = ("text", "copy", "records", "hard", "noise", "half", "same"), (6, 2, 4, 1, 1, 1, 1)


def region(seed: int, pages: int) -> bytes:
    """Text of one vocabulary, like a file: a page by itself is made to half by lz4, its neighbours help."""
    rng = random.Random(seed)
    words = [bytes(rng.choices(b"etaoinshrdlucmfwyp", k=rng.randrange(3, 10))) for _ in range(800)]
    out = bytearray()
    while len(out) < pages * PAGE:
        out += rng.choice(words) + b" %d " % rng.randrange(1 << rng.randrange(4, 20))
    return bytes(out[:pages * PAGE])


@functools.cache
def mixed(pages: int, seed: int = 0) -> bytes:
    """Regions of 8 to 64 pages: text, a second copy of an earlier region, records, bytes that hardly compress
    or not at all, one repeated word."""
    rng = random.Random(seed)
    out: list[bytes] = []
    texts: list[bytes] = []
    while sum(map(len, out)) < pages * PAGE:
        n = rng.randrange(8, 64)
        kind = rng.choices(KINDS, SHARES)[0]
        if kind == "text" or kind == "copy" and not texts:
            texts.append(region(rng.randrange(1 << 30), n))
            out.append(texts[-1])
        elif kind == "copy":
            out.append(rng.choice(texts))
        elif kind == "records":
            rows = (b"%08x|%06d|%s|open|2026-11-%02d\n" % (
                rng.randrange(1 << 32), i, rng.choice((b"alpha", b"beta", b"gamma")), rng.randrange(1, 30))
                for i in range(n * PAGE // 30))
            out.append(b"".join(rows)[:n * PAGE].ljust(n * PAGE, b"."))
        elif kind == "half":
            out.append(block("half random", rng.randrange(1 << 30), n * PAGE))
        elif kind == "same":
            out.append(block("odd word", rng.randrange(1 << 30), n * PAGE))
        else:
            make = hard if kind == "hard" else noise
            out.append(b"".join(make(rng.randrange(1 << 30)) for _ in range(n)))
    return b"".join(out)[:pages * PAGE]
