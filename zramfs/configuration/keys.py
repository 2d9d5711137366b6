# SPDX-License-Identifier: Apache-2.0
"""The keys of the configuration files, and how the value of each is read.

Keys that zram-generator.conf has too mean what they mean there; docs/configuration.md has them all.
"""
from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zramfs.codecs.spec import PRIORITIES, expect_level, level_of
from zramfs.host.rights import parse_group, parse_mode, parse_user
from zramfs.lifecycle import mount_points, ramdisk, swap
from zramfs.model.config import ALGORITHMS, MAX_THREADS, SECONDARY, Algorithm
from zramfs.model.density import parse_density
from zramfs.model.policy import Policy, parse_age, parse_policy

from .expression import evaluate_expression

# Algorithms of zram that zramfs does not have, and what stands in for them: fast, and about as dense.
REPLACED = {"lzo": "lz4", "lzo-rle": "lz4"}
# swapon's words in the options of fstab and zram-generator.conf, as `zramfs swap --discard` has them.
SWAP_OPTIONS = {"discard": "both", "discard=once": "once", "discard=pages": "pages", "": "none"}


# Each parser returns the value, or raises ValueError that says what was expected.


def _expression(text: str) -> str:
    """Checked with any amount of RAM. Its value on this machine is worked out when all lines are known."""
    try:
        evaluate_expression(text, {"ram": 4096.0})
    except ValueError as error:
        raise ValueError(f"{error}; sizes are in MiB (4096 is 4 GiB), and ram is the machine's") from None
    return text


def _whole(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,9}", text) or not least <= int(text) <= most:
            raise ValueError(f"expected a whole number from {least} to {most}, got {text!r}")
        return int(text)
    return parse


def _limit_or_none(text: str) -> int | None:
    if text == "none":
        return None
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise ValueError(f"expected a whole number of MiB or none, got {text!r}")
    return int(text)


def _path(text: str) -> Path:
    if not text.startswith("/") or ".." in text.split("/"):
        raise ValueError(f"expected an absolute path without .., got {text!r}")
    return Path(os.path.normpath("/" + text.lstrip("/")))


def _place(text: str) -> Path:
    path = _path(text)
    if reason := mount_points.hides(path):
        raise ValueError(reason)
    return path


def _fs_type(text: str) -> str:
    known = [*sorted(ramdisk.MKFS), "swap"]
    if text not in known:
        raise ValueError(f"expected one of {', '.join(known)}, got {text!r}")
    return text


def _options(text: str) -> str:
    if any(character.isspace() for character in text):
        raise ValueError(f"expected options with commas and without blanks between, got {text!r}")
    return text


_BOOLEANS = {"yes": True, "true": True, "on": True, "1": True,
             "no": False, "false": False, "off": False, "0": False}


def _boolean(text: str) -> bool:
    if text.lower() not in _BOOLEANS:
        raise ValueError(f"expected yes or no, got {text!r}")
    return _BOOLEANS[text.lower()]


_ALGORITHM = re.compile(r"(?P<name>[A-Za-z0-9_-]+)(?:\((?P<inside>[^()\s]*)\))?")


def _algorithms(text: str) -> tuple[Algorithm, ...]:
    found: list[Algorithm] = []
    for word in text.split():
        match = _ALGORITHM.fullmatch(word)
        if match is None:
            more = "; what to recompress is said by policy = recompress ..." if word.startswith("(") else ""
            raise ValueError(
                "expected names with parameters, such as `lz4 zstd(level=3)`, without blanks inside the "
                f"parentheses, got {word!r}{more}"
            )
        if match["name"] in REPLACED:
            algorithm = Algorithm(REPLACED[match["name"]])
            if algorithm in found:
                continue
        else:
            algorithm = _with_parameters(match["name"], match["inside"] or "")
        if found and algorithm.name not in SECONDARY:
            known = ", ".join(SECONDARY)
            raise ValueError(f"{algorithm.name} makes nothing smaller: expected one of {known}")
        found.append(algorithm)
    if len(found) > PRIORITIES:
        raise ValueError(f"expected at most {PRIORITIES} algorithms, got {len(found)}")
    return tuple(found)


def _replaced_algorithms(text: str) -> str | None:
    names = [match["name"] for word in text.split() if (match := _ALGORITHM.fullmatch(word))]
    replaced = [name for name in names if name in REPLACED]
    return ", ".join(f"there is no {name} here, so {REPLACED[name]} is taken" for name in replaced) or None


def _with_parameters(name: str, inside: str) -> Algorithm:
    """Raises ValueError for a name or level that no device has. A dictionary is read when the device
    starts."""
    if name not in ALGORITHMS:
        raise ValueError(f"expected one of {', '.join(ALGORITHMS)}, got {name!r}")
    level = dictionary = None
    for part in filter(None, inside.split(",")):
        key, _, value = part.partition("=")
        if key == "level" and re.fullmatch(r"-?[0-9]{1,9}", value):
            level = int(value)
        elif key == "dict" and value.startswith("/") and name != "none":
            dictionary = Path(value)
        else:
            raise ValueError(f"expected level=NUMBER or dict=/PATH for {name}, got {part!r}")
    algorithm = Algorithm(name, level, dictionary)
    if (wanted := level_of(algorithm)) is not None:
        expect_level(name, wanted)
    return algorithm


def _policy(text: str) -> Policy | None:
    return parse_policy(text)[1]


@dataclass(frozen=True)
class Key:
    """kinds: of devices for which it means something. warning: a sentence about a value that is taken for
    something else, None for one that is taken as it stands."""

    parse: Callable[[str], Any]
    kinds: tuple[str, ...] = ("swap", "ramdisk", "device")
    warning: Callable[[str], str | None] = lambda _text: None


KEYS: dict[str, Key] = {
    "host-memory-limit": Key(_limit_or_none),
    "zram-size": Key(_expression),
    "zram-resident-limit": Key(_expression),
    "keep-free": Key(_expression),
    "lock": Key(_boolean, ("ramdisk", "device")),
    "standby": Key(_boolean, ("ramdisk", "device")),
    "compression-algorithm": Key(_algorithms, warning=_replaced_algorithms),
    "policy": Key(_policy),
    "density": Key(parse_density),
    "writeback-device": Key(_path),
    "swap-priority": Key(_whole(-1, swap.MAX_PRIORITY), ("swap",)),
    "reserve": Key(_expression, ("swap",)),
    "min-free": Key(_expression, ("swap",)),
    "mount-point": Key(_place),
    "fs-type": Key(_fs_type),
    "options": Key(_options, ("swap", "ramdisk")),
    "directory": Key(_place),
    "allow-other": Key(_boolean, ("device",)),
    "mode": Key(parse_mode, ("ramdisk", "device")),
    "owner": Key(parse_user, ("ramdisk", "device")),
    "group": Key(parse_group, ("ramdisk", "device")),
    "threads": Key(_whole(1, MAX_THREADS)),
    "proactiveness": Key(_whole(0, 100)),
    "wipe": Key(_boolean),
    "keep": Key(_path, ("ramdisk",)),
    "keep-every": Key(parse_age, ("ramdisk",)),
}
ALIASES = {"memory-limit": "host-memory-limit"}
# Of zram-generator.conf, and what to write instead.
OBSOLETE = {
    "zram-fraction": "write zram-size = ram * FRACTION",
    "max-zram-size": "write zram-size = min(ram * FRACTION, MIB)",
}
