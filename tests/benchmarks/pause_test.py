# SPDX-License-Identifier: Apache-2.0
"""benchmarks/pause: a short real run, and that it leaves nothing behind."""
from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.whole import run

pytestmark = [pytest.mark.requires("fuse"), pytest.mark.timeout(240)]


def test_each_kill_is_a_pause_of_known_parts_and_nothing_is_left(tmp_path: Path) -> None:
    words = [sys.executable, ROOT / "benchmarks/pause", "--size", "8M", "--kills", "2"]
    run(*words, "--output", tmp_path / "out", timeout=200, env={
        **os.environ, "ZRAMFS_RUN_DIR": str(tmp_path / "run"), "TMPDIR": str(tmp_path)})
    found = json.loads((tmp_path / "out/results.json").read_text())
    (kills,) = found["kills"].values()
    assert len(kills) == 2 and found["size"] == 8 << 20
    for kill in kills:
        assert kill["pause"] > 0 and kill["serves"] > kill["recovered"] > 0 and kill["gone"] > 0
    assert "until the turn of the next daemon" in (tmp_path / "out/table.txt").read_text()
    assert not list(tmp_path.glob("zramfs-pause-*")) and not list((tmp_path / "run").glob("*"))
