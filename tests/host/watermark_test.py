# SPDX-License-Identifier: Apache-2.0
"""vm.min_free_kbytes: raised for the first user, restored after the last, whoever ends first or dies."""
from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from zramfs.errors import ZramfsError
from zramfs.host import process, watermark

MIB = 1 << 20
NEEDED = watermark.needed


@pytest.fixture(autouse=True)
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in place of the kernel's: other runs on this machine raise that too. On a machine that needs
    no more than it has."""
    file = tmp_path / "min_free_kbytes"
    file.write_text("20000\n")
    monkeypatch.setattr(watermark, "SETTING", file)
    monkeypatch.setattr(watermark, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(watermark, "needed", lambda: 0)
    return file


def users(tmp_path: Path, *names: str) -> list[Path]:
    paths = [tmp_path / name for name in names]
    for path in paths:
        path.mkdir()
    return paths


def test_what_machines_need() -> None:
    sizes = (100 * MIB, 351 * MIB, 1024 * MIB, 2048 * MIB, 8 << 30, 1 << 40)
    assert [NEEDED(size) // MIB for size in sizes] == [10, 16, 16, 32, 64, 64]


def test_raised_and_restored(tmp_path: Path, setting: Path) -> None:
    [a] = users(tmp_path, "a")
    said = watermark.raise_to(a, 30 * MIB)
    assert said == "raised vm.min_free_kbytes from 20000 to 30720; `zramfs stop` restores it"
    assert setting.read_text() == "30720"
    watermark.release(a)
    assert setting.read_text() == "20000"
    assert not watermark.RECORD.exists()
    watermark.release(a)


def test_enough_is_left_alone(tmp_path: Path, setting: Path) -> None:
    [a] = users(tmp_path, "a")
    assert watermark.raise_to(a, 10 * MIB) is None
    assert setting.read_text() == "20000\n"
    watermark.release(a)
    assert setting.read_text() == "20000\n"


def test_less_than_what_is_needed_is_said_aloud(
    tmp_path: Path, setting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watermark, "needed", lambda: 32 * MIB)
    a, b, c = users(tmp_path, "a", "b", "c")
    lack = "vm.min_free_kbytes is below the 32768 that a machine of this size may need"
    assert watermark.raise_to(a, 1 * MIB) == lack
    assert setting.read_text() == "20000\n"
    said = watermark.raise_to(b, 30 * MIB)
    assert said == f"raised vm.min_free_kbytes from 20000 to 30720; `zramfs stop` restores it; {lack}"
    assert watermark.raise_to(c, 32 * MIB) == (
        "raised vm.min_free_kbytes from 30720 to 32768; `zramfs stop` restores it")


@pytest.mark.parametrize("order", ["abc", "cba", "bca"])
def test_several_have_what_the_greediest_needs(tmp_path: Path, setting: Path, order: str) -> None:
    needs = {"a": 30 * MIB, "b": 10 * MIB, "c": 40 * MIB}
    paths = dict(zip(needs, users(tmp_path, *needs), strict=True))
    for name, path in paths.items():
        watermark.raise_to(path, needs[name])
    assert setting.read_text() == "40960"
    left = dict(needs)
    for name in order:
        del left[name]
        watermark.release(paths[name])
        assert int(setting.read_text()) == max([20000, *(need // 1024 for need in left.values())])


def test_one_that_died_is_forgotten(tmp_path: Path, setting: Path) -> None:
    a, b = users(tmp_path, "a", "b")
    watermark.raise_to(a, 40 * MIB)
    a.rmdir()
    watermark.raise_to(b, 30 * MIB)
    watermark.release(b)
    assert setting.read_text() == "20000"


def test_what_somebody_else_has_set_since_stays(tmp_path: Path, setting: Path) -> None:
    [a] = users(tmp_path, "a")
    watermark.raise_to(a, 30 * MIB)
    setting.write_text("50000")
    watermark.release(a)
    assert setting.read_text() == "50000"
    assert not watermark.RECORD.exists()


HERE = process.boot_id()


@pytest.mark.parametrize("text", [
    "", "{", "[]", '{"boot_id": "another", "users": {"/x": 1}, "before": 1}', f'{{"boot_id": "{HERE}"}}',
    f'{{"boot_id": "{HERE}", "users": ["/x"], "before": 1}}',
])
def test_a_record_that_says_nothing_is_replaced(tmp_path: Path, setting: Path, text: str) -> None:
    [a] = users(tmp_path, "a")
    watermark.RECORD.write_text(text)
    watermark.raise_to(a, 30 * MIB)
    assert json.loads(watermark.RECORD.read_text())["before"] == 20000
    assert watermark.users() == [str(a)]
    watermark.release(a)
    assert setting.read_text() == "20000"


def test_a_setting_that_cannot_be_written_is_an_error_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [a] = users(tmp_path, "a")
    monkeypatch.setattr(watermark, "SETTING", Path("/proc/uptime"))
    monkeypatch.setattr(watermark, "_current", lambda: 1)
    with pytest.raises(
            ZramfsError, match="swap needs vm.min_free_kbytes of 30720, and /proc/uptime can't be"):
        watermark.raise_to(a, 30 * MIB)


def test_a_record_is_never_empty_or_cut_off_and_a_raised_setting_is_always_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon can be killed at any call."""
    seen = []

    def look(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: object) -> object:
            done = real(*arguments)
            if watermark.RECORD.exists() and watermark.RECORD.stat().st_size:
                record = json.loads(watermark.RECORD.read_text())
                seen.append(int(watermark.SETTING.read_text()) in (20000, *record["ours"]))
            return done

        monkeypatch.setattr(os, name, call)

    one, other = users(tmp_path, "one", "a-much-longer-name-than-the-first")
    for name in ("pwrite", "ftruncate", "unlink", "close"):
        look(name)
    watermark.raise_to(one, 40 * MIB)
    watermark.raise_to(other, 50 * MIB)
    watermark.release(other)
    watermark.release(one)
    assert len(seen) >= 5 and all(seen)
    assert watermark.SETTING.read_text() == "20000"
