# SPDX-License-Identifier: Apache-2.0
"""What the command line says about itself."""
from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.commands import failure
from tests.support.whole import zramfs
from zramfs.cli import zramfs as group


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No devices, and a narrow terminal."""
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("COLUMNS", "80")


def test_no_sentence_is_cut_off() -> None:
    text = zramfs("--help").stdout
    assert "..." not in re.sub(r"\[ARGS\]\.\.\.|size=1G,\.\.\.", "", text), text
    assert all(len(line) <= 80 for line in text.splitlines())
    plain = " ".join(text.split())
    for name, command in group.commands.items():
        if not command.hidden:
            assert f" {name} " in plain
            assert command.short_help and command.short_help in plain, name
            assert not command.short_help.endswith("..."), name


def test_help_is_a_command() -> None:
    assert zramfs("help").stdout == zramfs("--help").stdout
    assert zramfs("help", "control").stdout == zramfs("control", "--help").stdout
    assert "no such command: 'contrl'; did you mean control?" in failure("help", "contrl", code=2)


def test_list_is_status() -> None:
    assert zramfs("list", "--json").stdout == zramfs("status", "--json").stdout == '{\n   "zramfs": []\n}\n'
    assert "\n  list " not in zramfs("--help").stdout


def test_an_unknown_command_is_answered_with_the_nearest() -> None:
    assert "no such command: 'staus'; did you mean status?" in failure("staus", code=2)
    assert "expected one of create, ramdisk, " in failure("frobnicate", code=2)
