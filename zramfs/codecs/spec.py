# SPDX-License-Identifier: Apache-2.0
"""How a compressor is written: NAME:LEVEL:dict=FILE. PRIORITIES is how many a device may have."""
from __future__ import annotations

from pathlib import Path

from zramfs.codecs import codec as codecs
from zramfs.model.config import ALGORITHMS, Algorithm

PRIORITIES = 4
SECONDARY = tuple(name for name in ALGORITHMS if name != "none")


def level_of(algorithm: Algorithm) -> int | None:
    # For zstd, 0 is a word for its default; scripts written for the kernel use it.
    return None if algorithm.name == "zstd" and algorithm.level == 0 else algorithm.level


def parse_spec(text: str) -> Algorithm:
    """NAME[:LEVEL][:dict=/PATH], as on the command line. ValueError with a sentence."""
    head, colon, path = text.partition(":dict=")
    codec = codecs.parse(head)
    if not colon:
        return Algorithm(codec.algo, codec.level)
    if codec.algo == "none":
        raise ValueError("none takes no dictionary")
    if not path.startswith("/"):
        raise ValueError(f"dict= takes an absolute path, not {path!r}")
    return Algorithm(codec.algo, codec.level, Path(path))


def parse_secondary(text: str) -> Algorithm:
    """The same for an algorithm of recompression."""
    algorithm = parse_spec(text)
    if algorithm.name not in SECONDARY:
        raise ValueError(f"{algorithm.name} makes nothing smaller: choose one of {', '.join(SECONDARY)}")
    return algorithm
