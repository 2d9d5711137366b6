# SPDX-License-Identifier: Apache-2.0
"""Twins of the kernel's number parsers, for the attributes that must answer like its own.

They take what write(2) brought, as bytes. The kernel hands its parsers a C string, so everything
from the first NUL byte on is ignored here as well.
"""
from __future__ import annotations

import errno
import re

from zramfs.errors import ZramfsError

PAGE_SIZE = 4096
U64_MAX = (1 << 64) - 1
SHIFTS = {b"K": 10, b"M": 20, b"G": 30, b"T": 40, b"P": 50, b"E": 60}

_DECIMAL = re.compile(rb"(?P<sign>[+-]?)0*(?P<digits>[0-9]+)")
_NUMBER = re.compile(rb"0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*")


def c_string(data: bytes) -> bytes:
    return data.split(b"\0", 1)[0]


def memparse(data: bytes) -> tuple[int, int]:
    """(value, bytes consumed) of a size such as 4096, 0x1000, 010000, 4K or 4kjunk.

    The suffix K M G T P E, in either case, multiplies by a power of 1024. What follows is ignored.
    The value wraps at 64 bits. Without a digit it is 0, and a suffix alone is still consumed: a
    caller that tells `no number` by `nothing consumed` takes a lone K for 0.
    """
    text = c_string(data)
    value = used = 0
    if match := _NUMBER.match(text):
        digits = match[0]
        used = len(digits)
        if digits[:2] in (b"0x", b"0X"):
            value = int(digits[2:], 16)
        else:
            value = int(digits, 8 if digits[:1] == b"0" else 10)
    if shift := SHIFTS.get(text[used : used + 1].upper()):
        value <<= shift
        used += 1
    return value & U64_MAX, used


def decimal(text: bytes) -> int | None:
    """The value of a decimal number with a sign or without, and at most one newline behind it; None for
    anything else. A number that 64 bits cannot hold is one as well, with any text behind it."""
    match = _DECIMAL.match(text)
    if match is None:
        return None
    # 21 digits are more than 64 bits, and no more than Python reads quickly.
    value = int(match["digits"][:21])
    if value <= U64_MAX and text[match.end():] not in (b"", b"\n"):
        return None
    return -value if match["sign"] == b"-" else value


def kstrtoull(data: bytes, limit: int = U64_MAX) -> int:
    """A decimal number, a leading + allowed, one newline at its end allowed, nothing else.

    Raises ZramfsError: EINVAL for anything else, ERANGE above `limit`.
    """
    text = c_string(data)
    value = decimal(text)
    if value is None or text.startswith(b"-"):
        raise ZramfsError(errno.EINVAL, f"expected a decimal number, got {printable(text)}")
    if value > limit:
        raise ZramfsError(errno.ERANGE, f"expected a number of at most {limit}, got {printable(text)}")
    return value


def page_align(size: int) -> int:
    """`size` in bytes, rounded up to whole pages; wraps at 64 bits as the kernel's does."""
    return (size + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1) & U64_MAX


def printable(data: bytes, most: int = 60) -> str:
    """`data` for a message: quoted, escaped, cut to `most` bytes."""
    shown = data[:most].decode("utf-8", "backslashreplace")
    return repr(shown) + ("..." if len(data) > most else "")
