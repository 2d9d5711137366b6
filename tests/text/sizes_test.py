# SPDX-License-Identifier: Apache-2.0
"""Sizes in and out, against golden values and against util-linux on a real device."""
from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zramfs.text.sizes import format_size, format_time, parse_size, total_ram

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4096", 4096),
        ("0", 0),
        ("12B", 12),
        ("512M", 512 << 20),
        ("512m", 512 << 20),
        ("7 KiB", 7 << 10),
        ("4G", 4 * GIB),
        ("1.5G", GIB * 3 // 2),
        ("1.5GiB", GIB * 3 // 2),
        ("0.1G", 107374182),  # 107374182.4
        ("2T", 2 << 40),
        ("1P", 1 << 50),
        (" 1G\n", GIB),
        ("50%", 50_000_003_072 & ~4095),
        ("12.5%", 12_500_000_768 & ~4095),
        ("150%", 150_000_009_216 & ~4095),
    ],
)
def test_parse(text: str, expected: int) -> None:
    assert parse_size(text, ram=100_000_006_144) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not a size"),
        ("G", "is not a size"),
        ("-1G", "is not a size"),
        ("1e3", "is not a size"),
        ("1.5.5", "is not a size"),
        (".5G", "is not a size"),
        ("٣G", "is not a size"),  # a digit to str.isdigit, and to nobody who types a size
        ("12X", "unknown unit 'X'"),
        ("12GiBs", "unknown unit 'GiBs'"),
        ("5GB", "ambiguous (1000 or 1024?): write 5G"),
        ("0.0001", "less than one byte"),
        ("0.00000001%", "less than one byte"),
        ("8192P", "too large"),
        ("9223372036854775808", "too large"),
    ],
)
def test_parse_says_what_is_wrong(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match="^'") as caught:
        parse_size(text, ram=100_000_006_144)
    assert reason in str(caught.value)
    assert repr(text) in str(caught.value)


def test_percent_is_of_the_machine() -> None:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert total_ram() == pytest.approx(pages, rel=0.02)
    assert parse_size("50%") == total_ram() // 2 & ~4095


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0B"),
        (1, "1B"),
        (1023, "1023B"),
        (1024, "1K"),
        (1 << 20, "1M"),
        (512 << 20, "512M"),
        (1395864371, "1.3G"),
        (1536, "1.5K"),
        (1024 + 51, "1K"),  # .0498
        (1024 + 52, "1.1K"),  # .0508
        ((1 << 20) - 1, "1024K"),  # util-linux rounds up within the unit
        (1 << 60, "1E"),
    ],
)
def test_format(size: int, expected: str) -> None:
    assert format_size(size) == expected


@given(st.integers(0, 2**60))
def test_format_is_within_half_a_tenth(size: int) -> None:
    text = format_size(size)
    back = parse_size(text) if not text.endswith("E") else size
    unit = 1024 ** max(0, (size.bit_length() - 1) // 10)
    assert abs(back - size) <= unit / 20 + 1


@pytest.mark.requires("loop", "lsblk")
@pytest.mark.parametrize("sectors", [3, 1025, 2726298, 2097151, 2097152])
def test_format_as_lsblk(tmp_path: Path, sectors: int) -> None:
    file = tmp_path / "sparse"
    file.touch()
    os.truncate(file, sectors * 512)
    device = subprocess.run(
        ["losetup", "--find", "--show", file], capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()
    try:
        shown = subprocess.run(
            ["lsblk", "--noheadings", "--nodeps", "--output", "SIZE", device],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout.strip()
    finally:
        subprocess.run(["losetup", "--detach", device], check=True, timeout=60)
    assert format_size(sectors * 512) == shown


@pytest.mark.parametrize("seconds, text", [
    (0, "0"), (80e-9, "0.1 us"), (8.24e-6, "8.2 us"), (9.96e-6, "10 us"), (512e-6, "512 us"),
    (999.4e-6, "999 us"), (999.6e-6, "1.0 ms"), (0.0024, "2.4 ms"), (0.9996, "1.0 s"), (17.2, "17 s"),
    (4000, "4000 s"),
])
def test_times(seconds: float, text: str) -> None:
    assert format_time(seconds) == text
