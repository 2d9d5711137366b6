# SPDX-License-Identifier: Apache-2.0
"""What check-config says about the file or device that is written back to."""
from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.whole import zramfs
from zramfs.host import signatures


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration file of a device z that is written back to tmp_path/back."""
    monkeypatch.setenv("ZRAMFS_ROOT", str(tmp_path))
    file = tmp_path / "etc/zramfs/z.conf"
    file.parent.mkdir(parents=True)
    file.write_text(f"directory = {tmp_path}/z\nzram-size = 16\nwriteback-device = {tmp_path}/back\n")
    return file


def said(file: Path, code: int) -> str:
    done = zramfs("check-config", check=False)
    assert done.returncode == code, done
    assert ("wrong, so it would not be set up" in done.stdout) == bool(code)
    return done.stderr.removeprefix(f"{file}:3: ").rstrip("\n")


@pytest.mark.parametrize("text", [b"root:x:0:0:root:/root:/bin/bash\n" * 400, "Grüße\n".encode() * 2000])
def test_a_file_with_text_is_no_backing_file(configured: Path, tmp_path: Path, text: bytes) -> None:
    back = tmp_path / "back"
    back.write_bytes(text)
    sentence = (f"expected a block device, or a file that is there for this alone; {back} holds data "
                "that zramfs has not put there, which write-back would destroy")
    assert said(configured, 1) == f"writeback-device: {sentence}"
    done = zramfs("up", check=False)
    assert done.returncode == 1 and sentence in done.stderr
    assert back.read_bytes() == text and not (tmp_path / "z").exists()


def test_a_file_that_is_too_short_or_no_file_is_none(configured: Path, tmp_path: Path) -> None:
    back = tmp_path / "back"
    back.write_bytes(b"\0" * 4095)
    assert f"{back} has 4095 bytes, so it is no backing file: expected at least 4096" in said(configured, 1)
    back.unlink()
    os.mkfifo(back)
    neither = f"writeback-device: expected a block device or a regular file, and {back} is neither"
    assert said(configured, 1) == neither
    back.unlink()
    back.mkdir()
    assert said(configured, 1) == neither


def test_a_file_for_write_back_is_taken(configured: Path, tmp_path: Path) -> None:
    back = tmp_path / "back"
    assert said(configured, 0) == "", "it may come later"
    back.write_bytes(b"\0" * 8192)
    back.chmod(0o600)
    assert said(configured, 0) == ""
    back.write_bytes(os.urandom(8192))
    signatures.mark(back)
    assert said(configured, 0) == "", "used before"
    back.chmod(0o644)
    sentence = f"{back} has the mode 0644, so other users reach what is written back; `chmod 600 {back}`"
    assert said(configured, 0) == f"warning: writeback-device: {sentence}"
