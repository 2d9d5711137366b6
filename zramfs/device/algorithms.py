# SPDX-License-Identifier: Apache-2.0
"""What a device compresses with: up to four algorithms by priority, their levels and dictionaries.

Priority 0 is the primary one, which writes use; 1 to 3 are those of recompression. The rules of
recomp_algorithm and algorithm_params are the kernel's: a level is judged only when the device is set
up, and each write of parameters takes the place of all of a priority's former ones.
"""
from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zramfs.codecs.codec import MAX_DICTIONARY, Codec
from zramfs.codecs.spec import DEFAULT_LEVEL, LEVELS, PRIORITIES, level_of
from zramfs.errors import ZramfsError
from zramfs.host import safe_paths
from zramfs.model.config import NAME_LIMIT, SECONDARY, Algorithm
from zramfs.model.density import LEVELS as LEVELS_OF_DENSITY
from zramfs.model.density import Density
from zramfs.text.key_values import number, pairs, shown

KERNEL_LZ4HC = 16  # its highest level
INT_MIN, INT_MAX = -(1 << 31), (1 << 31) - 1


@dataclass(frozen=True)
class Entry:
    """An algorithm with the bytes of its dictionary, as they were when it was set. written: its parameters
    came by algorithm_params, and so hold for whatever algorithm takes its place."""

    algorithm: Algorithm
    content: bytes | None = field(default=None, repr=False)
    written: bool = False

    @property
    def level(self) -> int | None:
        """For Codec; None = its default."""
        name, level = self.algorithm.name, level_of(self.algorithm)
        if level is None or not self.written:
            return level
        lowest, highest = LEVELS[name]
        # The kernel's take more, and scripts for it may write them.
        kernels = name == "zstd" or name == "lz4hc" and highest < level <= KERNEL_LZ4HC
        return max(lowest, min(level, highest)) if kernels else level

    def codec(self) -> Codec:
        """ValueError for a level or a dictionary that the algorithm does not take; MemoryError."""
        return Codec(self.algorithm.name, self.level, self.content)


Table = tuple[Entry | None, ...]  # by priority, PRIORITIES of them; the first is never None


def unread(primary: Algorithm, secondary: Sequence[Algorithm] = ()) -> Table:
    """Without the dictionaries, which table() reads."""
    found = [Entry(algorithm) for algorithm in (primary, *secondary)]
    return (*found, *[None] * (PRIORITIES - len(found)))


def table(primary: Algorithm, secondary: Sequence[Algorithm] = ()) -> Table:
    """Reads the dictionaries, so it may block. ZramfsError(EINVAL)."""
    if len(secondary) >= PRIORITIES:
        raise ZramfsError(
            errno.EINVAL, f"expected at most {PRIORITIES - 1} secondary algorithms, got {len(secondary)}")
    found = [entry(algorithm) for algorithm in (primary, *secondary)]
    return (*found, *[None] * (PRIORITIES - len(found)))


def entry(algorithm: Algorithm, written: bool = False) -> Entry:
    content = read_dictionary(algorithm.dictionary) if algorithm.dictionary else None
    return Entry(algorithm, content, written)


def successor(old: Entry | None, chosen: Algorithm) -> Entry:
    """What choosing an algorithm by its name alone makes of a priority. As in the kernel, parameters that
    were written there stay."""
    if old is None or not old.written or chosen.name == "none":  # which takes no parameters
        return Entry(chosen)
    return replace(old, algorithm=replace(old.algorithm, name=chosen.name))


def with_entry(old: Table, priority: int, new: Entry) -> Table:
    return (*old[:priority], new, *old[priority + 1:])


def highest(entries: Table) -> int | None:
    """The secondary priority that makes pages smallest; None: there is none."""
    return max((priority for priority, each in enumerate(entries) if priority and each), default=None)


def with_density(old: Table, wanted: Density) -> Table:
    """For a store that is to be made. Where nobody has chosen a secondary algorithm, density brings one,
    unless the primary one is as good."""
    level = LEVELS_OF_DENSITY.get(wanted.mode)
    primary = old[0]
    assert primary is not None
    if level is None or highest(old) is not None:
        return old
    own = DEFAULT_LEVEL["zstd"] if primary.level is None else primary.level
    if primary.algorithm.name == "zstd" and own >= level:
        return old
    return with_entry(old, 1, Entry(Algorithm("zstd", level)))


def store_arguments(entries: Table) -> dict[str, Any]:
    """For Store(). ValueError as Entry.codec(), naming the algorithm; MemoryError."""
    primary = entries[0]
    assert primary is not None
    return {
        "algo": primary.algorithm.name, "level": primary.level, "dictionary": primary.content,
        "secondary": [each and each.codec() for each in entries[1:]],
    }


def read_dictionary(path: Path) -> bytes:
    """The bytes of a regular file of 1 to MAX_DICTIONARY bytes, under an absolute path. Never waits for
    a writer. ZramfsError(EINVAL), as the kernel answers whatever is wrong with it."""
    if not path.is_absolute() or "\0" in str(path):
        raise ZramfsError(errno.EINVAL, f"dict= takes an absolute path, not {shown(str(path))}")
    try:
        # A FIFO or a terminal is opened without waiting, and then refused.
        fd = safe_paths.open_path(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise ZramfsError(errno.EINVAL, f"the dictionary {shown(str(path))} is not a regular file")
            with open(fd, "rb", closefd=False) as file:
                content = file.read(MAX_DICTIONARY + 1)
        finally:
            os.close(fd)
    except ZramfsError as error:
        raise ZramfsError(errno.EINVAL, error.sentence) from None
    except OSError as error:
        raise ZramfsError(
            errno.EINVAL, f"the dictionary {shown(str(path))} cannot be read: {error.strerror}") from None
    if not 1 <= len(content) <= MAX_DICTIONARY:
        size = found.st_size if len(content) > MAX_DICTIONARY else 0
        raise ZramfsError(
            errno.EINVAL,
            f"a dictionary has 1 to {MAX_DICTIONARY} bytes; {shown(str(path))} has {size}")
    return content


def expect_name(name: str, known: Sequence[str]) -> str:
    if len(name.encode("utf-8", "surrogateescape")) >= NAME_LIMIT:
        raise ZramfsError(
            errno.E2BIG, f"expected a name shorter than {NAME_LIMIT} bytes, got {len(name)}: {shown(name)}")
    if name not in known:
        raise ZramfsError(errno.EINVAL, f"expected one of {', '.join(known)}, got {shown(name)}")
    return name


def priority_of(entries: Table, algo: str | None, priority: int | None, standard: int) -> int:
    """The configured priority that algo=, priority= or both mean. ZramfsError(EINVAL)."""
    if priority is None:
        named = [n for n in range(standard, PRIORITIES) if (e := entries[n]) and e.algorithm.name == algo]
        if algo is not None and not named:
            raise ZramfsError(
                errno.EINVAL, f"expected {_listed(entries, standard)}; got algo={shown(algo)}")
        priority = named[0] if named else standard
    found = entries[priority]
    if found is None:
        raise ZramfsError(
            errno.EINVAL, f"expected {_listed(entries, standard)}; nothing has the priority {priority}")
    if algo is not None and found.algorithm.name != algo:
        raise ZramfsError(
            errno.EINVAL,
            f"the algorithm with priority {priority} is {found.algorithm.name}, not {shown(algo)}")
    return priority


def _listed(entries: Table, first: int) -> str:
    names = [f"#{n} {e.algorithm.name}" for n, e in enumerate(entries) if e and n >= first]
    if not names:
        return "a secondary algorithm, and there is none: write recomp_algorithm before disksize"
    return f"one of the chosen algorithms, {' or '.join(names)}"


def parse_secondary_choice(text: str) -> tuple[int, Algorithm]:
    """What is written to recomp_algorithm: priority and algorithm. ZramfsError: EINVAL, ERANGE, E2BIG."""
    algo, priority = None, 1
    for key, value in pairs(text):
        if key == "algo":
            algo = value
        elif key == "priority":
            priority = number(key, value, INT_MIN, INT_MAX)
    if not 1 <= priority < PRIORITIES:
        raise ZramfsError(errno.EINVAL, f"expected priority=1 to {PRIORITIES - 1}, got {priority}")
    if algo is None:
        raise ZramfsError(errno.EINVAL, "expected algo=NAME, with priority=1 to 3 if you like")
    return priority, Algorithm(expect_name(algo, SECONDARY))


def parse_parameters(text: str, entries: Table) -> tuple[int, Algorithm]:
    """What is written to algorithm_params: the priority meant, and its algorithm with the new level and
    dictionary (not read yet). ZramfsError: EINVAL, ERANGE."""
    algo = dictionary = level = priority = None
    for key, value in pairs(text):
        match key:
            case "algo":
                algo = value
            case "priority":
                priority = number(key, value, INT_MIN, INT_MAX)
                if not 0 <= priority < PRIORITIES:
                    raise ZramfsError(
                        errno.EINVAL, f"expected priority=0 to {PRIORITIES - 1}, got {priority}")
            case "level":
                level = number(key, value, INT_MIN, INT_MAX)
            case "dict":
                dictionary = Path(value)
            case "deflate.winbits":
                number(key, value, INT_MIN, INT_MAX)
    meant = priority_of(entries, algo, priority, 0)
    found = entries[meant]
    assert found is not None
    return meant, replace(found.algorithm, level=level, dictionary=dictionary)


@dataclass(frozen=True)
class RecompressArguments:
    """priority None: that of algo, or 1. threshold in bytes, 0 = none; max_pages in tries, None = all. older:
    only pages that were not used for more than so many seconds; None = any."""

    idle: bool = False
    huge: bool = False
    threshold: int = 0
    max_pages: int | None = None
    older: int | None = None
    algo: str | None = None
    priority: int | None = None


def parse_recompress(text: str) -> RecompressArguments:
    """What is written to recompress. ZramfsError: EINVAL, ERANGE."""
    found = RecompressArguments()
    for key, value in pairs(text):
        match key:
            case "type":
                if value not in ("idle", "huge", "huge_idle"):
                    raise ZramfsError(
                        errno.EINVAL, f"expected type=idle, huge or huge_idle, got {shown(value)}")
                found = replace(found, idle="idle" in value, huge="huge" in value)
            case "threshold":
                found = replace(found, threshold=number(key, value, 0, (1 << 32) - 1))
            case "max_pages":
                found = replace(found, max_pages=number(key, value, 0, (1 << 64) - 1))
            case "algo":
                found = replace(found, algo=value)
            case "priority":
                priority = number(key, value, INT_MIN, INT_MAX)
                if not 1 <= priority < PRIORITIES:
                    raise ZramfsError(
                        errno.EINVAL, f"expected priority=1 to {PRIORITIES - 1}, got {priority}")
                found = replace(found, priority=priority)
    return found


