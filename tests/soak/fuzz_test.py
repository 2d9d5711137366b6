# SPDX-License-Identifier: Apache-2.0
"""Short runs of the fuzzer on every target, from a fixed seed; with --soak they go on."""
from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import SUPPORT
from tests.support.scale import scaled

FUZZ = SUPPORT / "fuzz.py"
# About a second each, or a quarter of it, beside the start.
RUNS = {target: scaled(runs, runs // 4) for target, runs in {
    "numbers": 20000, "size": 20000, "attribute": 20000, "command": 20000, "keys": 10000,
    "size_expression": 10000, "configuration": 500, "foreign_configuration": 300,
    "compressed": 20000, "requests": 300,
}.items()}


def fuzz(target: str, corpus: Path, *options: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    corpus.mkdir()
    return subprocess.run(
        [sys.executable, FUZZ, target, "-seed=20", "-max_len=1000", "-len_control=10",
         f"-artifact_prefix={corpus.parent}/", *options, corpus],
        capture_output=True, text=True, errors="replace", timeout=timeout, cwd=corpus.parent, check=False,
    )


@pytest.mark.soak
@pytest.mark.parametrize("target", RUNS)
def test_nothing_unexpected_comes_of_any_bytes(
    target: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("atheris")
    seconds = int(60 * request.config.getoption("soak")) // len(RUNS)
    how = f"-max_total_time={seconds}" if seconds else f"-runs={RUNS[target]}"
    done = fuzz(target, tmp_path / "corpus", how, timeout=200 + 2 * seconds)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    runs = re.search(r"Done (\d+) runs", done.stderr)
    assert runs and int(runs[1]) >= (1 if seconds else RUNS[target])
    assert list(tmp_path.glob("crash-*")) == []


def test_the_fuzzer_finds_what_is_unexpected(tmp_path: Path) -> None:
    """A parser that raises something else than it may, behind a comparison that chance does not pass."""
    pytest.importorskip("atheris")
    broken = tmp_path / "fuzz.py"
    text = FUZZ.read_text().replace(
        "    try:\n        assert 0 <= sizes.parse_size(",
        "    if text.startswith('50%%'):\n        raise KeyError(text)\n"
        "    try:\n        assert 0 <= sizes.parse_size(",
    ).replace("Path(__file__)", f"Path({str(FUZZ)!r})")
    broken.write_text(text)
    (tmp_path / "corpus").mkdir()
    done = subprocess.run(
        [sys.executable, broken, "size", "-seed=20", "-runs=500000", f"-artifact_prefix={tmp_path}/",
         tmp_path / "corpus"],
        capture_output=True, text=True, errors="replace", timeout=200, check=False,
    )
    assert done.returncode != 0 and "KeyError" in done.stdout + done.stderr
    [crash] = tmp_path.glob("crash-*")
    assert crash.read_bytes().startswith(b"50%%")
