# SPDX-License-Identifier: Apache-2.0
"""How a compressor is written: NAME:LEVEL:dict=FILE.

The rules are here, in plain Python, so that the command line and the configuration can judge what they are
given without loading the compiled codecs. codec.pyx takes its names, levels and sentences from here.
"""
from __future__ import annotations

import re
from pathlib import Path

from zramfs.model.config import ALGORITHMS, NAME_LIMIT, SECONDARY, Algorithm

PRIORITIES = 4  # of the algorithms of a device: the primary one and up to three that recompress
# The lowest and the highest level of each. lz4: the acceleration; lz4hc and zstd: the effort.
LEVELS = {"none": (0, 0), "lz4": (1, 65537), "lz4hc": (1, 12), "zstd": (-7, 22)}
DEFAULT_LEVEL = {"none": 0, "lz4": 1, "lz4hc": 9, "zstd": 3}


def level_of(algorithm: Algorithm) -> int | None:
    """The level for Codec(). For zstd, 0 is a word for its default; scripts written for the kernel use it."""
    return None if algorithm.name == "zstd" and algorithm.level == 0 else algorithm.level


def expect_algorithm(name: str) -> None:
    """ValueError with a sentence unless there is an algorithm of this name."""
    if len(name) >= NAME_LIMIT:
        raise ValueError(
            f"the name of a compressor is shorter than {NAME_LIMIT} characters; "
            f"{name[:20]!r}... has {len(name)}")
    if name not in ALGORITHMS:
        raise ValueError(f"unknown compressor {name!r}: choose one of {', '.join(ALGORITHMS)}")


def expect_level(name: str, level: int) -> None:
    """ValueError with a sentence unless the algorithm has the level."""
    lowest, highest = LEVELS[name]
    if not lowest <= level <= highest or (name == "zstd" and level == 0):
        raise ValueError(f"the level of {name} is {_levels_of(name)}, not {level}")


def _levels_of(name: str) -> str:
    lowest, highest = LEVELS[name]
    if lowest == highest:
        return f"{lowest} or left out"
    return f"a whole number from {lowest} to {highest}{' except 0' if name == 'zstd' else ''}"


def parse_level(text: str) -> tuple[str, int]:
    """The name and the level of NAME or NAME:LEVEL. ValueError with a sentence."""
    name, colon, level = text.partition(":")
    expect_algorithm(name)
    if not colon:
        return name, DEFAULT_LEVEL[name]
    if not re.fullmatch("[+-]?[0-9]{1,9}", level):
        raise ValueError(f"the level of {name} is {_levels_of(name)}, not {level[:40]!r}")
    expect_level(name, int(level))
    return name, int(level)


def parse_spec(text: str) -> Algorithm:
    """NAME[:LEVEL][:dict=/PATH], as on the command line. ValueError with a sentence."""
    head, colon, path = text.partition(":dict=")
    name, level = parse_level(head)
    if not colon:
        return Algorithm(name, level)
    if name == "none":
        raise ValueError("none takes no dictionary")
    if not path.startswith("/"):
        raise ValueError(f"dict= takes an absolute path, not {path!r}")
    return Algorithm(name, level, Path(path))


def parse_secondary(text: str) -> Algorithm:
    """The same for an algorithm of recompression."""
    algorithm = parse_spec(text)
    if algorithm.name not in SECONDARY:
        raise ValueError(f"{algorithm.name} makes nothing smaller: choose one of {', '.join(SECONDARY)}")
    return algorithm
