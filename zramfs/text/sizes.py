# SPDX-License-Identifier: Apache-2.0
"""Sizes as people write and read them: 512M, 1.5G, 50% in; 512M, 1.3G out, as util-linux prints them.
Times as people read them: 8.2 us, 1.3 ms."""
from __future__ import annotations

import errno
import os
import re

PAGE = 4096  # bytes of a page of a device
_UNITS = "KMGTP"
_PATTERN = r"(?P<whole>\d+)(?:\.(?P<rest>\d+))?\s*(?P<unit>[A-Za-z%]*)"
_EXPECTED = (
    "expected bytes (1073741824), a number with K, M, G, T or P (512M, 1.5G; powers of 1024, "
    "GiB is the same as G), or a share of the RAM (50%)"
)
# off_t: where the offsets of a file end.
_MAX = 2**63 - 1


def total_ram(file: str | os.PathLike[str] = "/proc/meminfo") -> int:
    """MemTotal of /proc/meminfo in bytes. Raises OSError, also for a file without it."""
    with open(file, "rb") as meminfo:
        for line in meminfo:
            if line.startswith(b"MemTotal:"):
                return int(line.split()[1]) * 1024
    raise OSError(errno.EINVAL, f"{file} has no MemTotal line, so no size can be a share of the RAM")


def parse_size(text: str, ram: int | None = None) -> int:
    """Bytes. A share of the RAM is rounded down to a page of 4096, everything else to a byte.

    ram: what 100% means, in bytes; None reads MemTotal. ValueError: a sentence about `text`.
    """
    match = re.fullmatch(_PATTERN, text.strip(), re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is not a size: {_EXPECTED}")
    # number / scale is what stands there, without a rounding.
    rest, unit = match["rest"] or "", match["unit"]
    number, scale = int(match["whole"] + rest), 10 ** len(rest)
    if unit == "%":
        if ram is None:
            ram = total_ram()
        size = ram * number // (100 * scale) & ~4095
    else:
        size = number * _factor(text, unit) // scale
    if size > _MAX:
        raise ValueError(f"{text!r} is too large: a device ends below 8 EiB, where the offsets of a file end")
    if size == 0 and number:
        raise ValueError(f"{text!r} is less than one byte: {_EXPECTED}")
    return size


def _factor(text: str, unit: str) -> int:
    prefix, rest = unit[:1].upper(), unit[1:].upper()
    if unit.upper() in ("", "B"):
        return 1
    if prefix in _UNITS and rest in ("", "IB"):
        return 1 << 10 * (_UNITS.index(prefix) + 1)
    if prefix in _UNITS and rest == "B":
        raise ValueError(
            f"{text!r} is ambiguous (1000 or 1024?): write {text.strip()[:-1]} for powers of 1024, "
            "or plain bytes"
        )
    raise ValueError(f"{text!r} has the unknown unit {unit!r}: {_EXPECTED}")


def format_size(size: int) -> str:
    """At most one decimal, one letter, as zramctl and lsblk show it: 0B, 512M, 1.3G."""
    power = max(0, (size.bit_length() - 1) // 10)
    if power == 0:
        return f"{size}B"
    unit = 1024**power
    whole, rest = divmod(size, unit)
    # Half a tenth rounds up. util-linux goes from 1023.96M to 1024M, not to 1G, and so does this.
    tenths = (rest * 20 + unit) // (2 * unit)
    if tenths == 10:
        whole, tenths = whole + 1, 0
    letter = (_UNITS + "E")[power - 1]
    return f"{whole}.{tenths}{letter}" if tenths else f"{whole}{letter}"


def format_time(seconds: float) -> str:
    """Two or three digits and a unit: 0, 8.2 us, 512 us, 1.3 ms, 17 s."""
    if not seconds:
        return "0"
    value, unit = seconds * 1e6, "us"
    for larger in ("ms", "s"):
        if value >= 999.5:
            value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if value >= 9.95 else f"{value:.1f} {unit}"
