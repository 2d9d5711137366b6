# SPDX-License-Identifier: Apache-2.0
"""How scripts/test divides the tests among processes, and what it leaves to CI."""
from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from tests import conftest
from tests.support import scale, shares
from tests.support.paths import ROOT

BUSY = 500  # seconds, for what takes 5 on idle cores


def item(file: str, name: str = "test", *requires: str) -> SimpleNamespace:
    """As pytest has it, as far as shares look."""
    marks = [SimpleNamespace(args=requires)]
    return SimpleNamespace(nodeid=f"tests/{file}::{name}", iter_markers=lambda kind: marks)


def anybody(item: SimpleNamespace) -> int:
    return 0


def test_a_file_is_taken_once_and_whole(tmp_path: Path) -> None:
    items = [item("a/x_test.py", "1"), item("a/y_test.py"), item("a/x_test.py", "2"), item("b/x_test.py")]
    one, other = (shares.claimed(items, tmp_path, anybody) for _ in range(2))
    assert next(one) == [items[0], items[2]]
    assert list(other) == [[items[1]], [items[3]]]
    assert list(one) == []


@pytest.mark.timeout(2 * BUSY)
def test_shares_run_every_test_once(tmp_path: Path) -> None:
    """Real ones, on the files of two directories."""
    (tmp_path / "claims").mkdir()
    places = [ROOT / "tests" / name for name in ("text", "packaging/imports_test.py")]
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *places]
    running = [
        subprocess.Popen([*words, f"--share={number}", "--claims", tmp_path / "claims",
                          f"--junit-xml={tmp_path / str(number)}"],
                         cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for number in (1, 2, 3)]
    said = [each.communicate(timeout=BUSY)[0] for each in running]
    assert [each.returncode for each in running] == [0, 0, 0], said
    ran = Counter(
        (case.get("classname"), case.get("name"))
        for number in (1, 2, 3) for case in ElementTree.parse(tmp_path / str(number)).iter("testcase"))
    assert set(ran.values()) == {1}
    collected = subprocess.run(
        [*words, "--collect-only"], cwd=ROOT, capture_output=True, text=True, timeout=BUSY)
    assert len(ran) == sum("::" in line for line in collected.stdout.splitlines()) > 100


def test_a_share_that_ends_early_leaves_the_other_files(tmp_path: Path) -> None:
    items = [item("a/x_test.py"), item("b/x_test.py"), item("c/x_test.py")]
    next(shares.claimed(items, tmp_path, anybody))
    assert [group[0] for group in shares.claimed(items, tmp_path, anybody)] == items[1:]


def test_the_tests_of_a_file_that_one_share_must_run_leave_the_others_of_it_to_any(tmp_path: Path) -> None:
    [file, *_] = conftest.SWAP
    items = [item(file, "1"), item(file, "2", "fuse", "swap"), item(file, "3"), item(file, "4", "memcg")]
    first = [each for each in items if conftest._only_share(each) in (0, 1)]
    third = [each for each in items if conftest._only_share(each) in (0, 3)]
    assert list(shares.claimed(third, tmp_path, conftest._only_share)) == [[items[0], items[2]]]
    assert list(shares.claimed(first, tmp_path, conftest._only_share)) == [[items[1], items[3]]]


def test_tests_that_must_not_meet_have_one_share() -> None:
    for file in conftest.SWAP:
        assert conftest._only_share(item(file, "test", "root", "swap")) == 1
    for place in conftest.CACHES:
        file, _, test = place.partition("::")
        assert conftest._only_share(item(file, test + "[x]", "root")) == 2
    assert conftest._only_share(item("text/plain_test.py", "test", "swap")) == 0


def test_what_drops_the_caches_of_the_machine_is_for_the_second_share() -> None:
    found = 0
    for path in (ROOT / "tests").glob("*/*_test.py"):
        for function in path.read_text().split("\ndef ")[1:]:
            name = function.partition("(")[0]
            if name.startswith("test_") and re.search(r"\n +(\w+\.)?drop_caches\(", function):
                assert conftest._only_share(item(f"{path.parent.name}/{path.name}", name)) == 2, name
                found += 1
    assert found >= 4


@pytest.mark.parametrize(
    "place", [*sorted(conftest.SWAP), *conftest.CACHES, conftest.LONGEST, *conftest.FRESH])
def test_what_the_shares_name_is_there(place: str) -> None:
    file, _, test = place.partition("::")
    path = ROOT / "tests" / file
    assert f"\ndef {test}" in path.read_text() if test else path.exists()


@pytest.mark.parametrize(("name", "value", "expected"), [
    ("CI", "true", 60), (scale.ENVIRONMENT, "1", 60), ("CI", "", 20), ("NOTHING", "", 20)])
def test_all_of_it_is_done_in_ci_and_on_request(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: int
) -> None:
    for each in ("CI", scale.ENVIRONMENT):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, value)
    assert scale.scaled(60, 20) == expected
