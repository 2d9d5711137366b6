# SPDX-License-Identifier: Apache-2.0
"""KEY=VALUE lists: against what the kernel's next_arg() does, restated character by character."""
from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zramfs.errors import ZramfsError
from zramfs.text.key_values import number, pairs, text_of, words

SPACE = " \t\n\v\f\r"


def next_arg(text: str) -> tuple[str, str | None, str]:
    """One word and the rest, in the steps that the kernel's function takes."""
    chars = list(text)
    start = quoted = in_quote = equals = 0
    if chars[0] == '"':
        start = quoted = in_quote = 1
    i = start
    while i < len(chars):
        if chars[i] in SPACE and not in_quote:
            break
        if not equals and chars[i] == "=" and i > start:
            equals = i
        if chars[i] == '"':
            in_quote = not in_quote
        i += 1
    end = i
    key, value = "".join(chars[start:end]), None
    if equals:
        key, value = "".join(chars[start:equals]), "".join(chars[equals + 1:end])
        if value.startswith('"'):
            value = value[1:]
            if value.endswith('"') or value == "" and end - 1 == equals + 1:
                value = value[:-1]
                quoted = 0
    if quoted and end > start and chars[end - 1] == '"':
        if value is None:
            key = key.removesuffix('"')
        else:
            value = value.removesuffix('"')
    return key, value, "".join(chars[end:]).lstrip(SPACE)


@given(st.text(alphabet='ab="  \t\n', max_size=24))
def test_words_are_the_kernels(text: str) -> None:
    expected, rest = [], text.lstrip(SPACE)
    while rest:
        key, value, rest = next_arg(rest)
        expected.append((key, value))
    assert list(words(text)) == expected


@pytest.mark.parametrize("text, found", [
    ("algo=zstd priority=2", [("algo", "zstd"), ("priority", "2")]),
    ("  algo=zstd\n", [("algo", "zstd")]),
    ('dict="/a b/c" level=3', [("dict", "/a b/c"), ("level", "3")]),
    ('"dict=/a b" level=3', [("dict", "/a b"), ("level", "3")]),
    ("a==b", [("a", "=b")]),
    ("type=idle\ttype=huge", [("type", "idle"), ("type", "huge")]),
    ("", []),
])
def test_pairs(text: str, found: list[tuple[str, str]]) -> None:
    assert pairs(text) == found


@pytest.mark.parametrize("text", [
    "idle", "algo=", "algo=zstd priority", '=', '=x', '""', 'a=""', 'algo= zstd',
])
def test_a_key_without_a_value(text: str) -> None:
    with pytest.raises(ZramfsError) as failure:
        pairs(text)
    assert failure.value.errno == errno.EINVAL and "expected KEY=VALUE" in str(failure.value)


@pytest.mark.parametrize("value, expected", [
    ("7", 7), ("+7", 7), ("-3", -3), ("007", 7), ("10", 10), ("11", errno.ERANGE), ("-4", errno.ERANGE),
    ("9" * 5000, errno.ERANGE), ("9" * 30 + "x", errno.ERANGE), ("-" + "9" * 30, errno.ERANGE),
    ("0" * 5000 + "7", 7), ("", errno.EINVAL), ("0x7", errno.EINVAL),
    ("7k", errno.EINVAL), (" 7", errno.EINVAL), ("7 ", errno.EINVAL), ("1_0", errno.EINVAL),
    ("\u0663", errno.EINVAL), ("--7", errno.EINVAL), ("\udcff", errno.EINVAL),
])
def test_number(value: str, expected: int) -> None:
    try:
        assert number("level", value, -3, 10) == expected
    except ZramfsError as error:
        assert error.errno == expected and str(error).startswith("level takes a ")
        str(error).encode()  # what a stranger sent can be logged


@pytest.mark.parametrize("value", ["-1", "-0", "-99999999999999999999"])
def test_an_unsigned_number_takes_no_minus(value: str) -> None:
    with pytest.raises(ZramfsError) as failure:
        number("max_pages", value, 0, (1 << 64) - 1)
    assert failure.value.errno == errno.EINVAL


def test_text_of_what_a_write_brought() -> None:
    assert text_of(b"algo=zstd\npriority=1\n") == "algo=zstd priority=1"
    assert text_of(b"a=b\0c=d") == "a=b"
    assert text_of(b"dict=/\xff").encode("utf-8", "surrogateescape") == b"dict=/\xff"
