# SPDX-License-Identifier: Apache-2.0
"""Wheels for other distributions, and other machines: only with --clean-room, because they take minutes, and
pip's index and Debian's mirror."""
from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT

pytestmark = [pytest.mark.clean_room, pytest.mark.timeout(3000)]


def said(*command: object) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=ROOT, capture_output=True, text=True, timeout=2900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_wheel_with_its_libraries_works_in_a_fresh_environment(tmp_path: Path) -> None:
    said("scripts/wheels", "--output", tmp_path, sys.executable)
    [wheel] = tmp_path.glob("*.whl")
    assert re.search(r"-cp3(\d+)-cp3\1-manylinux_2_\d+_x86_64\.whl$", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    for library in ("liblz4", "libzstd"):
        assert any(name.startswith(f"zramfs.libs/{library}") for name in names), library
    assert "allocator, codecs, store" in (tmp_path / "wheels.log").read_text()


@pytest.mark.requires("aarch64-linux-gnu-gcc", "qemu-aarch64-static")
def test_allocator_codecs_and_store_run_on_aarch64() -> None:
    assert "on aarch64: allocator, codecs, store\n" in said("scripts/cross", "aarch64")


@pytest.mark.requires("musl-gcc")
def test_allocator_codecs_and_store_compile_against_musl() -> None:
    assert "all of it compiles against musl" in said("scripts/cross", "musl")
