# SPDX-License-Identifier: Apache-2.0
"""The tables of `zramfs status`, apart from what stands in them."""
from __future__ import annotations

import pytest

from zramfs.cli.output import print_table


def table(capsys: pytest.CaptureFixture[str], *rows: list[str], **more: bool) -> list[str]:
    print_table(["NAME", "SIZE"], rows, [False, True], [0, 5], **{"show_headings": True, **more})
    return capsys.readouterr().out.splitlines()


def test_numbers_are_to_the_right_and_no_column_is_narrower_than_its_heading(
    capsys: pytest.CaptureFixture[str],
):
    assert table(capsys, ["a", "1G"]) == ["NAME  SIZE", "a       1G"]
    assert table(capsys, ["a", "1G"], show_headings=False) == ["a       1G"]
    assert table(capsys, ["longer", "1234567"], ["b", ""]) == ["NAME      SIZE", "longer 1234567", "b"]


def test_a_character_of_east_asia_takes_two_columns(capsys: pytest.CaptureFixture[str]):
    assert table(capsys, ["日本語", "1G"], ["äöü", "2G"]) == ["NAME    SIZE", "日本語    1G", "äöü       2G"]


def test_a_terminal_never_sees_a_control_character_of_a_path(capsys: pytest.CaptureFixture[str]):
    shown = "a\\x1b[31mb\\x0a\\x9bc"
    assert table(capsys, ["a\x1b[31mb\n\x9bc", "1G"]) == [f"{'NAME':<19}  SIZE", f"{shown}    1G"]
