# SPDX-License-Identifier: Apache-2.0
"""What an automatic policy is, as configuration and control write it. policies.py does what it says."""
from __future__ import annotations

import re
from dataclasses import dataclass

from zramfs.text.kernel_numbers import printable
from zramfs.text.sizes import format_size, parse_size

_UNITS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_MAX_AGE = 10 * 365 * 86400


@dataclass(frozen=True)
class Recompress:
    """Pages idle for `idle` seconds, with a secondary algorithm: that of this name, or None = the first."""

    idle: int
    algo: str | None = None

    kind = "recompress"

    def __str__(self) -> str:
        return f"recompress idle={format_age(self.idle)}" + (f" algo={self.algo}" if self.algo else "")


@dataclass(frozen=True)
class Writeback:
    """Pages idle for `idle` seconds, at most `limit` bytes in any 24 hours; None = no limit."""

    idle: int
    limit: int | None = None

    kind = "writeback"

    def __str__(self) -> str:
        limit = "" if self.limit is None else f" limit={format_size(self.limit)}"
        return f"writeback idle={format_age(self.idle)}{limit}"


@dataclass(frozen=True)
class Units:
    """Pages idle for `idle` seconds join units, with zstd of this level; None = the device's."""

    idle: int
    level: int | None = None

    kind = "units"

    def __str__(self) -> str:
        return f"units idle={format_age(self.idle)}" + ("" if self.level is None else f" level={self.level}")


Policy = Recompress | Writeback | Units
# And what each takes besides idle=.
_KEYS = {Recompress.kind: "algo", Writeback.kind: "limit", Units.kind: "level"}
KINDS = tuple(_KEYS)
EXPECTED = ("recompress idle=AGE [algo=NAME], writeback idle=AGE [limit=SIZE], units idle=AGE "
            "[level=NUMBER], or one of them with off")


def parse_policy(text: str) -> tuple[str, Policy | None]:
    """(kind, policy), None for off. ValueError with a sentence."""
    words = text.split()
    if not words or words[0] not in KINDS:
        raise ValueError(f"expected {EXPECTED}; got {printable(text.encode())}")
    kind, pairs = words[0], words[1:]
    if pairs == ["off"]:
        return kind, None
    values: dict[str, str] = {}
    known = ("idle", _KEYS[kind])
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in known or not value or key in values:
            raise ValueError(f"expected {EXPECTED}; got {printable(pair.encode())}")
        values[key] = value
    if "idle" not in values:
        raise ValueError(f"expected {EXPECTED}; idle= is missing in {printable(text.encode())}")
    idle = parse_age(values["idle"])
    if kind == Recompress.kind:
        return kind, Recompress(idle, values.get("algo"))
    if kind == Units.kind:
        return kind, Units(idle, parse_unit_level(values["level"]) if "level" in values else None)
    return kind, Writeback(idle, parse_size(values["limit"]) if "limit" in values else None)


def parse_unit_level(text: str) -> int:
    """Of zstd. ValueError with a sentence."""
    if not re.fullmatch(r"-?[0-9]{1,4}", text) or not -7 <= int(text) <= 22 or int(text) == 0:
        raise ValueError(
            f"expected a level of zstd, from -7 to 22 but 0, got {printable(text.encode())}")
    return int(text)


def parse_age(text: str) -> int:
    """Seconds: 600, 90s, 10min, 2h, 7d. ValueError with a sentence."""
    match = re.fullmatch(r"([0-9]{1,9})([a-z]*)", text)
    if not match or match[2] not in _UNITS:
        raise ValueError(
            f"expected an age such as 600 (seconds), 10min, 2h or 7d, got {printable(text.encode())}"
        )
    age = int(match[1]) * _UNITS[match[2]]
    if not 1 <= age <= _MAX_AGE:
        raise ValueError(f"expected an age from 1 second to ten years, got {text}")
    return age


def format_age(seconds: int) -> str:
    for unit in ("d", "h", "min"):
        if seconds % _UNITS[unit] == 0:
            return f"{seconds // _UNITS[unit]}{unit}"
    return f"{seconds}s"
