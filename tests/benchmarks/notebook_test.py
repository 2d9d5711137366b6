# SPDX-License-Identifier: Apache-2.0
"""The notebook of docs/: its cells run, say what stands in it, and show what its text claims."""
from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT, python_environment

pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install zramfs[report])")

from benchmarks import notebook  # noqa: E402

FILE = ROOT / "docs/allocator.ipynb"


@pytest.fixture(scope="module")
def kept() -> dict:
    return json.loads(FILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def found(kept: dict) -> list[notebook.Outputs]:
    return notebook.run_cells(kept)


def test_every_cell_says_what_stands_in_the_notebook(kept: dict, found: list[notebook.Outputs]) -> None:
    assert notebook.texts(found) == notebook.texts(notebook.kept(kept))
    assert len(found) >= 5


def test_the_pictures_are_there_and_the_file_stays_small(kept: dict, found: list[notebook.Outputs]) -> None:
    for outputs in (found, notebook.kept(kept)):
        pictures = [each["data"]["image/png"] for cell in outputs for each in cell
                    if "image/png" in each.get("data", {})]
        assert len(pictures) == 2
        assert all(base64.b64decode(each).startswith(b"\x89PNG") for each in pictures)
    assert FILE.stat().st_size < 100_000


def test_migration_gives_back_what_object_compaction_cannot(found: list[notebook.Outputs]) -> None:
    """The claim of the page, from what its cells print."""
    said = "".join(notebook.texts(found))
    rows = re.findall(r"(\d+) frames; +(\d+) pageblocks, (\d+) MiB", said)
    frames, blocks, resident = (list(map(int, column)) for column in zip(*rows, strict=True))
    assert frames[0] > frames[1] > 2 * frames[2] and frames[2] == frames[3]
    assert blocks[0] == blocks[1] == blocks[2] > 3 * blocks[3]
    assert resident == [2 * each for each in blocks]


def test_a_cell_that_fails_ends_the_run_and_one_that_differs_is_named(tmp_path: Path) -> None:
    def page(source: str, said: str) -> Path:
        output = {"output_type": "stream", "name": "stdout", "text": [said]}
        cell = {"cell_type": "code", "execution_count": 1, "metadata": {}, "source": [source],
                "outputs": [output]}
        path = tmp_path / "page.ipynb"
        path.write_text(json.dumps({"cells": [cell]}))
        return path

    def check(path: Path, *options: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, ROOT / "scripts/notebook", *options, path], capture_output=True, text=True,
            timeout=200, env=python_environment())
        return done.returncode, done.stdout + done.stderr

    assert check(page("print(1)", "1\n"), "--check") == (0, "1 cells agree\n")
    other = page("print(1)", "2\n")
    assert check(other, "--check") == (1, "cells that say something else: [1]\n")
    assert check(other)[0] == 0
    assert notebook.texts(notebook.kept(json.loads(other.read_text()))) == ["1\n"]
    status, said = check(page("1 / 0", ""), "--check")
    assert status == 1 and "ZeroDivisionError" in said
