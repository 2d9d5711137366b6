# SPDX-License-Identifier: Apache-2.0
"""benchmarks/density: its corpora, and a short real run."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import lz4.block
import pytest

from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks import corpora  # noqa: E402
from benchmarks.tools import BenchmarkError  # noqa: E402

RUN = (sys.executable, str(ROOT / "benchmarks/density"))
MIB = 1 << 20
PAGE = 4096


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """A cache of our own for the images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZRAMFS_BENCHMARK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize("name", ["process", "text"])
def test_a_corpus_is_made_once_of_different_pages_that_compress(name: str):
    path = corpora.corpus(name, 8 * MIB)
    made = path.stat()
    data = path.read_bytes()
    pages = {data[at:at + PAGE] for at in range(0, len(data), PAGE)}
    assert len(data) == 8 * MIB and len(pages) > 0.8 * len(data) / PAGE
    packed = sum(len(lz4.block.compress(page, store_size=False)) for page in pages)
    assert 0.1 < packed / (len(pages) * PAGE) < 0.8
    assert corpora.corpus(name, 8 * MIB).stat().st_ino == made.st_ino


def test_a_corpus_that_the_machine_does_not_have_says_how_much_there_is(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "few.txt").write_bytes(b"text\n" * MIB)
    (tmp_path / "picture.png").write_bytes(bytes(8 * MIB))
    monkeypatch.setattr(corpora, "TEXT_PLACES", (tmp_path,))
    with pytest.raises(BenchmarkError, match="expected 7 MiB of text, got 1; choose --size 1M or less"):
        corpora.corpus("text", 7 * MIB)


@pytest.mark.requires("root", "fuse", "zram")
def test_a_short_run_measures_every_way_on_the_same_data(tmp_path: Path):
    ran = subprocess.run(
        [*RUN, "--size", "8M", "--data", "process", "--ways", "zram lz4", "--ways", "zramfs lz4",
         "--ways", "zramfs zstd:3", "--output", tmp_path],
        capture_output=True, text=True, timeout=200, env=os.environ,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    if "zram lz4" in found["left_out"]:
        pytest.skip(found["left_out"]["zram lz4"])
    cells = {cell["way"]: cell for cell in found["density"]}
    assert list(cells) == ["zram lz4", "zramfs lz4", "zramfs zstd:3"]
    assert all(cell["bytes"] == 8 * MIB and cell["cpu"] > 0 for cell in cells.values())
    # The same codec and the same size classes; buffers and workspaces weigh on so small a device.
    pool = cells["zram lz4"]["resident"]
    assert pool < cells["zramfs lz4"]["resident"] < 1.5 * pool
    assert cells["zramfs zstd:3"]["share"] < cells["zramfs lz4"]["share"]
    table = (tmp_path / "table.txt").read_text()
    assert f"{cells['zramfs lz4']['share']:.3f}" in table and "text" not in table
