# SPDX-License-Identifier: Apache-2.0
"""What the machine's files say about how short memory is."""
from __future__ import annotations

from pathlib import Path

import pytest

from zramfs.host.pressure import available_share, memory_stall


@pytest.mark.parametrize(("text", "stall"), [
    ("some avg10=0.00 avg60=1.00 avg300=2.00 total=5\nfull avg10=9.00 avg60=0.00 avg300=0.00 total=0\n", 0.0),
    ("some avg10=12.34 avg60=0.00 avg300=0.00 total=1\n", 12.34), ("full avg10=9.00\n", 0.0), ("", 0.0),
    ("some avg10=much\n", 0.0), ("some avg10=1.2.3\n", 0.0), ("\udcff", 0.0),
])
def test_memory_stall(text: str, stall: float, tmp_path: Path) -> None:
    file = tmp_path / "memory"
    file.write_bytes(text.encode(errors="surrogateescape"))
    assert memory_stall(file) == stall


@pytest.mark.parametrize(("text", "share"), [
    ("MemTotal:       1000 kB\nMemFree:         900 kB\nMemAvailable:    250 kB\n", 0.25),
    ("MemTotal:       1000 kB\n", 0.0), ("MemAvailable: 5 kB\n", 0.0),
    ("MemTotal: 0 kB\nMemAvailable: 5 kB\n", 0.0), ("", 0.0), ("\udcff", 0.0),
])
def test_available_share(text: str, share: float, tmp_path: Path) -> None:
    file = tmp_path / "meminfo"
    file.write_bytes(text.encode(errors="surrogateescape"))
    assert available_share(file) == share


def test_files_that_are_not_there(tmp_path: Path) -> None:
    assert memory_stall(tmp_path / "none") == available_share(tmp_path / "none") == 0.0


def test_this_machine() -> None:
    assert 0.0 <= memory_stall() <= 100.0 and 0.0 < available_share() < 1.0
