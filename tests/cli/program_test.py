# SPDX-License-Identifier: Apache-2.0
"""The program ends faster than the interpreter would, and nobody can tell."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import python_environment

# As the command line ends that the interpreter takes apart.
SLOW = ("-m", "zramfs.cli")
FAST = ("-m", "zramfs")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """With no device."""
    return {**python_environment(), "ZRAMFS_RUN_DIR": str(tmp_path)}


@pytest.mark.parametrize("words", [
    ["status", "--json"], ["--version"], ["status", "--help"], ["status", "--nonsense"], ["stop", "/nowhere"],
    [],
], ids=str)
def test_it_says_the_same_and_ends_with_the_same_status(
    environment: dict[str, str], words: list[str]
) -> None:
    slow, fast = (
        subprocess.run([sys.executable, *how, *words], env=environment, capture_output=True, timeout=60)
        for how in (SLOW, FAST))
    assert (fast.returncode, fast.stdout, fast.stderr) == (slow.returncode, slow.stdout, slow.stderr)
    assert fast.stdout or fast.stderr


@pytest.mark.parametrize("place", ["/dev/full", "a pipe that nobody reads"])
def test_output_that_cannot_be_written_is_a_failure(environment: dict[str, str], place: str) -> None:
    if place == "/dev/full":
        out = os.open(place, os.O_WRONLY)
    else:
        read_end, out = os.pipe()
        os.close(read_end)
    try:
        done = subprocess.run(
            [sys.executable, *FAST, "status", "--json"], env=environment, stdout=out, stderr=subprocess.PIPE,
            timeout=60)
    finally:
        os.close(out)
    assert done.returncode == 1 and b"Traceback" not in done.stderr, done.stderr


def test_what_is_registered_for_the_end_runs_before_it(environment: dict[str, str]) -> None:
    code = ("import atexit, sys\n"
            "from zramfs.__main__ import end\n"
            "atexit.register(print, 'registered')\n"
            "print('written', end=' ')\n"
            "end(3)\n")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (3, b"written registered\n", b"")
