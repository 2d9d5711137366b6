# SPDX-License-Identifier: Apache-2.0
"""What a file or a device holds before it is overwritten."""
from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.whole import MIB, loop, run
from zramfs.host import signatures


def sparse(path: Path, size: int = 8 * MIB) -> Path:
    path.touch()
    os.truncate(path, size)
    return path


def test_a_file_that_nobody_has_written_to_is_free(tmp_path: Path) -> None:
    assert signatures.held_by(sparse(tmp_path / "sparse")) is None
    with open(tmp_path / "allocated", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, MIB)
    assert signatures.held_by(tmp_path / "allocated") is None
    (tmp_path / "zeros").write_bytes(bytes(MIB))
    assert signatures.held_by(tmp_path / "zeros") is None
    (tmp_path / "empty").touch()
    assert signatures.held_by(tmp_path / "empty") is None


def test_a_file_with_data_is_not(tmp_path: Path) -> None:
    assert signatures.held_by(Path("/etc/passwd")) == "data that zramfs has not put there"
    late = sparse(tmp_path / "late")
    with open(late, "r+b") as file:
        file.seek(5 * MIB)
        file.write(b"text")
    assert signatures.held_by(late) == "data that zramfs has not put there"


@pytest.mark.requires("ext4")
def test_signatures_are_named(tmp_path: Path) -> None:
    image = sparse(tmp_path / "image")
    run("mkfs.ext4", "-q", image)
    assert signatures.held_by(image) == "a signature of ext4"
    run("mkswap", sparse(tmp_path / "swap"))
    assert signatures.held_by(tmp_path / "swap") == "a signature of swap"


@pytest.mark.requires("root", "loop", "ext4")
def test_a_block_device_is_looked_at_too(tmp_path: Path) -> None:
    image = sparse(tmp_path / "image")
    with loop(image) as device:
        assert signatures.held_by(Path(device)) is None
        run("mkfs.ext4", "-q", device)
        assert signatures.held_by(Path(device)) == "a signature of ext4"


def test_what_was_marked_is_free_whatever_a_crash_left_in_it(tmp_path: Path) -> None:
    file = tmp_path / "store"
    file.write_bytes(os.urandom(MIB))
    try:
        os.setxattr(file, "user.try", b"1")
    except OSError as error:
        pytest.skip(f"the file system of {tmp_path} has no attributes: {error.strerror}")
    assert signatures.held_by(file) == "data that zramfs has not put there"
    signatures.mark(file)
    assert signatures.held_by(file) is None
