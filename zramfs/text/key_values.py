# SPDX-License-Identifier: Apache-2.0
"""Lists of KEY=VALUE as the kernel's next_arg() splits them, for recompress, algorithm_params,
recomp_algorithm and writeback.

Words are separated by white space, which double quotes protect: dict="/a b" and "dict=/a b" are both
the value /a b. The first = of a word ends its key, except at the word's beginning. Which keys mean
something is the caller's business; the kernel ignores the others.
"""
from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from zramfs.errors import ZramfsError

from .kernel_numbers import decimal, printable

_SPACE = " \t\n\v\f\r"
_WORD = re.compile(rf'(?:[^"{_SPACE}]|"[^"]*(?:"|\Z))+')


def text_of(data: bytes) -> str:
    """What a write brought, up to the first NUL, as one line. Bytes that are not UTF-8 stay what they
    are (surrogate escapes), because a path may have them."""
    text = data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    return text.translate({ord(c): " " for c in _SPACE}).strip()


def words(text: str) -> Iterator[tuple[str, str | None]]:
    """(key, value) of each word; value None where the word has no =."""
    for match in _WORD.finditer(text):
        word = match[0]
        quoted = word.startswith('"')
        if quoted:
            word = word[1:]
        at = word.find("=", 1)
        key, value = (word, None) if at < 0 else (word[:at], word[at + 1:])
        if value is None:
            key = key.removesuffix('"') if quoted else key
        elif value.startswith('"') and len(value) > 1:
            value = value[1:].removesuffix('"')
        elif value == '"' or quoted:
            value = value.removesuffix('"')
        yield key, value


def pairs(text: str) -> list[tuple[str, str]]:
    """The same where every word needs a value: ZramfsError(EINVAL) for one that has none."""
    found = []
    for key, value in words(text):
        if not value:
            raise ZramfsError(
                errno.EINVAL, f"expected KEY=VALUE, separated by blanks, got {shown(key)} without a value"
            )
        found.append((key, value))
    return found


def number(key: str, value: str, lowest: int, highest: int, out_of_range: int = errno.ERANGE) -> int:
    """A decimal number as kstrtoint() reads it, or kstrtouint() where lowest is not negative: that takes
    no minus sign. ZramfsError: EINVAL for anything else, out_of_range outside lowest to highest."""
    found = decimal(value.encode("utf-8", "surrogateescape"))
    if found is None or (lowest >= 0 and value.startswith("-")):
        raise ZramfsError(errno.EINVAL, f"{key} takes a decimal number, not {shown(value)}")
    if not lowest <= found <= highest:
        raise ZramfsError(
            out_of_range, f"{key} takes a number from {lowest} to {highest}, not {shown(value)}")
    return found


def shown(text: str) -> str:
    """Text from outside, made fit for a message: quoted, escaped, cut."""
    return printable(text.encode("utf-8", "surrogateescape"))
