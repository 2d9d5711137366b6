# SPDX-License-Identifier: Apache-2.0
"""benchmarks/cases: both cases in small, and that they leave nothing behind."""
from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from tests.support.child import process_state
from tests.support.paths import ROOT
from tests.support.whole import run

sys.path.insert(0, str(ROOT))

from benchmarks import cases, cases_main  # noqa: E402
from benchmarks.packing import AUTO, Packing  # noqa: E402
from benchmarks.program import Program  # noqa: E402
from benchmarks.tools import BenchmarkError, Interrupt  # noqa: E402

MIB = 1 << 20
PACKED = "zramfs, packed at rest"

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def place(tmp_path: Path) -> dict[str, str]:
    """An environment with run directories and a cache of its own."""
    return {**os.environ, "ZRAMFS_RUN_DIR": str(tmp_path / "run"), "TMPDIR": str(tmp_path),
            "ZRAMFS_BENCHMARK_CACHE": str(tmp_path / "cache")}


@pytest.mark.requires("root", "fuse", "loop", "ext4")
def test_a_tree_is_built_packed_and_read_back_from_a_new_mount(tmp_path: Path, place: dict[str, str]) -> None:
    run(sys.executable, ROOT / "benchmarks/cases", "--cases", "tree", "--tree", "8M", "--ways", PACKED,
        "--reps", "1", "--output", tmp_path / "out", timeout=200, env=place)
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert not results["left_out"]
    (found,) = results["outcomes"]
    assert (found["case"], found["way"]) == ("tree", PACKED)
    # The tree, and what was compiled of it. At this size the fixed parts of the daemon are a tenth.
    assert found["rest"]["stored"] > 10 * MIB
    assert 0 < found["rest"]["resident"] < 0.7 * found["rest"]["stored"]
    # 5000 pages, each by zstd 9: seconds of a core.
    assert found["packing"] > 0.1
    assert found["fill"] > 0 and found["use"] > 0 and found["client"] > 0
    assert PACKED in (tmp_path / "out/table.txt").read_text()
    assert not list(tmp_path.glob("zramfs-benchmark-*")) and not list((tmp_path / "run").glob("*"))


@pytest.mark.requires("root", "fuse", "loop", "swap", "memcg")
def test_a_program_that_is_larger_than_its_group_lives_on_packed_swap(
        tmp_path: Path, place: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    packing = Packing(AUTO, dense=True)
    way = cases.Way("packed", "zramfs", packing.options, packing=packing)
    with Interrupt() as interrupt:
        # The program verifies every page before it ends.
        found = cases.swap(way, 32 * MIB, 16 * MIB, 20000, interrupt)
    assert found.rest.stored > 12 * MIB
    assert found.rest.resident < found.rest.stored
    assert found.server > 0 and found.packing > 0
    assert not list((tmp_path / "run").glob("*"))


def test_swap_of_the_machine_is_a_reason_to_measure_nothing(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "swaps").write_text("Filename Type Size Used Priority\n/dev/sda2 partition 8 0 -2\n")
    monkeypatch.setattr(cases_main, "SWAPS", tmp_path / "swaps")
    monkeypatch.setattr(cases_main, "need", lambda program, package: program)
    with pytest.raises(BenchmarkError, match="expected a machine without swap, found /dev/sda2; end it with"):
        cases_main._expect_no_swap()


def test_a_machine_with_few_sources_says_how_much_there_is(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/few.c").write_bytes(b"int a;\n" * (MIB // 4))
    (tmp_path / "tree/picture.png").write_bytes(bytes(9 * MIB))
    monkeypatch.setenv("ZRAMFS_BENCHMARK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cases, "TREE_PLACES", (tmp_path / "tree",))
    with pytest.raises(BenchmarkError, match="expected 8 MiB of sources, found 1; choose --tree 1M or less"):
        cases.tree_archive(8 * MIB)


def _program(text: str) -> Program:
    return Program(sys.executable, "-c", text)


def test_a_program_says_words_and_waits_between_them() -> None:
    text = "print('one 1.5', flush=True); input(); print('two 2')"
    with Interrupt() as interrupt, _program(text) as program:
        assert program.wait_word("one", interrupt) == 1.5
        program.go()
        assert program.wait_word("two", interrupt) == 2


@pytest.mark.parametrize(("text", "said"), [
    ("import sys; sys.exit('no room')", "ended before 'one': no room"),
    ("print('two 2')", "to say 'one' and seconds, got b'two 2'"),
])
def test_a_program_that_does_otherwise_is_an_error_with_its_words(text: str, said: str) -> None:
    with Interrupt() as interrupt, _program(text) as program, pytest.raises(BenchmarkError, match=said):
        program.wait_word("one", interrupt)


def test_a_program_ends_with_all_that_it_has_started() -> None:
    text = ("import subprocess; child = subprocess.Popen(['sleep', '100']); "
            "print('one', child.pid, flush=True); child.wait()")
    with Interrupt() as interrupt, _program(text) as program:
        child = int(program.wait_word("one", interrupt))
    # Killed, and gone or about to be taken by init.
    while _is_alive(child):
        time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    try:
        return process_state(pid) not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_program_that_is_gone_says_so_at_the_next_word() -> None:
    with Interrupt() as interrupt, _program("print('one 1', flush=True)") as program:
        program.wait_word("one", interrupt)
        program._child.wait()
        program.go()
        with pytest.raises(BenchmarkError, match="ended before 'two'"):
            program.wait_word("two", interrupt)
