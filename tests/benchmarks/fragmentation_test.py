# SPDX-License-Identifier: Apache-2.0
"""scripts/fragmentation and benchmarks/compaction: short real runs, what they promise, and their end."""
from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import capabilities
from tests.support.paths import ROOT
from tests.support.whole import wait_until

sys.path.insert(0, str(ROOT))

pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install zramfs[report])")

from benchmarks import discard, fragmentation_tables  # noqa: E402
from benchmarks.disturbance import CpuClock  # noqa: E402
from benchmarks.load import Zone  # noqa: E402
from benchmarks.peers import Server  # noqa: E402

FRAGMENTATION = (sys.executable, str(ROOT / "scripts/fragmentation"))
COMPACTION = (sys.executable, str(ROOT / "benchmarks/compaction"))
# Seconds: an idle machine takes 40 for the longest of them.
BUSY = 600
pytestmark = pytest.mark.timeout(BUSY + 60)
MIB = 1 << 20
BLOCK = 2 * MIB


@dataclass(frozen=True)
class Run:
    output: Path
    screen: str
    results: dict

    @property
    def table(self) -> str:
        return (self.output / "table.txt").read_text()


def run(output: Path, *words: str) -> Run:
    done = subprocess.run([*words, "--output", output], capture_output=True, text=True, timeout=BUSY)
    assert done.returncode == 0, done.stdout + done.stderr
    return Run(output, done.stdout, json.loads((output / "results.json").read_text()))


# ---- scripts/fragmentation --------------------------------------------------------------------------
@pytest.fixture(scope="module")
def fragmented(tmp_path_factory: pytest.TempPathFactory) -> Run:
    capabilities.require("fuse", "loop", "ext4", "fstrim")
    return run(tmp_path_factory.mktemp("fragmentation") / "out", *FRAGMENTATION, "--size-mib", "32",
               "--wait", "120")


def settings(found: Run) -> dict[str, dict]:
    return {setting["name"]: setting for setting in found.results["settings"]}


def test_migration_gives_all_but_a_pageblock_back(fragmented: Run) -> None:
    asked = settings(fragmented)["asked"]
    after = asked["moments"]["after"]
    assert asked["whole_share"] >= 0.95 and asked["left_share"] >= 0.95
    # Object compaction before it leaves less than a pageblock's worth outside of whole ones.
    assert after["free"] * (1 - asked["whole_share"]) < BLOCK
    assert after["compaction"]["pages_migrated"] > 0


def test_the_compactor_does_it_by_itself(fragmented: Run) -> None:
    """Down to its threshold: with the default proactiveness 4 % of the pageblocks in use."""
    alone = settings(fragmented)["migration"]
    after = alone["moments"]["after"]
    assert after["compaction"]["proactiveness"] == 20
    assert after["free"] * (1 - alone["whole_share"]) < BLOCK + 0.04 * after["resident"] + BLOCK
    assert alone["left_share"] >= 0.85
    assert alone["seconds"] < 110, "it comes to rest"


def test_without_migration_the_memory_stays(fragmented: Run) -> None:
    found = settings(fragmented)
    for name in ("none", "objects"):
        assert found[name]["whole_share"] < 0.5
        assert found[name]["left_share"] < 0.5
        assert found[name]["moments"]["after"]["compaction"]["pages_migrated"] == 0
    assert found["none"]["moments"]["after"]["compaction"]["pages_compacted"] == 0
    assert found["objects"]["moments"]["after"]["compaction"]["pages_compacted"] > 0
    # Objects alone make as much memory free as all of it does.
    free = {name: setting["moments"]["after"]["free"] for name, setting in found.items()}
    assert free["none"] < free["objects"] == pytest.approx(free["asked"], rel=0.05)


def test_the_files_are_written_and_half_of_them_deleted(fragmented: Run) -> None:
    for setting in fragmented.results["settings"]:
        full, before = setting["moments"]["full"], setting["moments"]["before"]
        assert 8 * 32 * MIB // 4 < full["mem_used_total"] < 8 * 32 * MIB
        assert full["daemon_resident"] > full["mem_used_total"]
        assert before["mem_used_total"] < full["mem_used_total"]


def test_the_tables_show_the_figures_and_the_series(fragmented: Run) -> None:
    assert set(fragmented.table.splitlines()) <= {line.rstrip() for line in fragmented.screen.splitlines()}
    found = re.finditer(r"^ (\S.*?)  +([\d].*)$", fragmented.table, re.M)
    rows = {match[1]: match[2].split() for match in found}
    for name, orders in fragmentation_tables.SERIES.items():
        assert rows[name][:10] == [str(blocks) for blocks in orders[:10]]
    for setting in fragmented.results["settings"]:
        for when in ("before", "after"):
            row = rows[f"{setting['text']}: {when}"]
            assert row[:10] == [str(blocks) for blocks in setting["moments"][when]["orders"]]
    assert re.search(r"no compaction .* % +no$", fragmented.table, re.M)
    assert re.search(r"migration, asked .* % +yes$", fragmented.table, re.M)
    assert "…" not in fragmented.table


def test_the_shares_of_the_series_are_those_of_its_reference() -> None:
    """The kernel's migration series gives 49 % and 71 % from order 4 on, 1.5 % and 10 % from order 7 on."""
    shares = [
        [round(100 * fragmentation_tables.share_from(orders, least), 1) for least in (4, 7)]
        for orders in fragmentation_tables.SERIES.values()
    ]
    assert shares == [[49.2, 1.5], [70.9, 10.0]]


def test_the_picture_has_both_settings(fragmented: Run) -> None:
    import matplotlib.image

    assert matplotlib.image.imread(fragmented.output / "report.png").shape[1] > 1500
    page = (fragmented.output / "report.html").read_text()
    assert "<th>no compaction</th><th>with migration</th>" in page


# ---- benchmarks/compaction --------------------------------------------------------------------------
@pytest.fixture(scope="module")
def compacted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    capabilities.require("fuse", "fio")
    return run(tmp_path_factory.mktemp("compaction") / "out", *COMPACTION, "--size", "96M", "--data", "half",
               "--reps", "1", "--seconds", "0.5")


def test_a_quarter_of_the_memory_comes_back_unasked(compacted: Run) -> None:
    courses = {course["peer"]: course for course in compacted.results["returned"]}
    shares = {
        peer: [1 - point["resident"] / course["full"]["resident"] for point in course["points"]]
        for peer, course in courses.items()
    }
    for peer, course in courses.items():
        assert [point["seconds"] for point in course["points"]] == [0, 1, 2, 5, 10, None]
        assert [row["share"] for row in course["returned"]] == pytest.approx(shares[peer])
        assert course["full"]["used"] > 0.4 * course["stored"]
    assert shares["zramfs"][-2] >= 0.25
    if capabilities.missing("zram"):
        assert compacted.results["left_out"].keys() == {"zram"}
    else:
        # Of half compressible pages the kernel gives next to nothing back before it is told to. Of what comes
        # seconds later nobody knows: whoever drops the caches of the machine has it compact as well.
        assert shares["zram"][0] < 0.15 < 0.25 < shares["zram"][-1]
        last = {peer: course["points"][-1]["used"] for peer, course in courses.items()}
        assert last["zramfs"] == pytest.approx(last["zram"], rel=0.05)


def test_the_compactor_worked_in_every_second_run_and_only_then(compacted: Run) -> None:
    rows = compacted.results["disturbance"]
    assert [row["row"] for row in rows] == ["rand-read-1", "rand-read-16", "seq-read-1", "seq-write-1"]
    for row in rows:
        assert sorted(run["proactiveness"] for run in row["runs"]) == [0, 100]
        medians = {}
        for value in (0, 100):
            runs = [run for run in row["runs"] if run["proactiveness"] == value]
            medians[value] = {key: statistics.median(run[key] for run in runs) for key in ("rate", "p99")}
            for found in runs:
                assert (found["compacted"] > 0) == (value == 100), row["row"]
                assert 0 < found["p50"] <= found["p99"]
                assert 0 <= found["elsewhere"] <= 1
        assert row["p99_ratio"] == pytest.approx(medians[100]["p99"] / medians[0]["p99"])
        assert row["loss"] == pytest.approx(1 - medians[100]["rate"] / medians[0]["rate"])


def test_a_dense_pool_costs_nothing(compacted: Run) -> None:
    idle = compacted.results["idle"]
    assert idle["slices"] == 0
    # The look at memory/compaction at the end, and a tick of the clock.
    assert idle["cpu"] <= 0.03
    assert idle["seconds"] > 4


def test_floors_are_judged_by_the_worst(compacted: Run) -> None:
    floors = compacted.results["floors"]
    rows = compacted.results["disturbance"]
    assert [floor["value"] for floor in floors] == pytest.approx([
        next(c for c in compacted.results["returned"] if c["peer"] == "zramfs")["returned"][-2]["share"],
        max(row["p99_ratio"] for row in rows if "rand" in row["row"]),
        max(row["loss"] for row in rows if "seq" in row["row"]),
    ])
    assert len(re.findall(r"(?:NOT )?reached$", compacted.table, re.M)) == 3
    assert set(compacted.table.splitlines()) <= {line.rstrip() for line in compacted.screen.splitlines()}
    assert "…" not in compacted.table


def test_what_others_take_of_the_cpus_is_told_apart(tmp_path: Path) -> None:
    """The work of a child is ours; that of a process whose parent has gone is not."""
    ended = tmp_path / "ended"
    spin = f"import time\nwhile time.process_time() < 1: pass\nopen({str(ended)!r}, 'x')"
    looked = []
    clock = CpuClock(Server("zramfs", Path("none"), (os.getpid(),)))
    looked.append(clock._look())
    subprocess.run([sys.executable, "-c", spin], timeout=60, check=True)
    looked.append(clock._look())
    ended.unlink()
    subprocess.run(["setsid", "--fork", sys.executable, "-c", spin], timeout=60, check=True)
    wait_until(ended.exists, "the other process has done its work", 60)
    looked.append(clock._look())
    assert 0 < clock.elsewhere() <= 1
    own, other = (
        [now - then for now, then in zip(after, before, strict=True)]
        for before, after in zip(looked, looked[1:], strict=False)
    )
    for total, busy, _ in (own, other):
        assert 0.9 < busy <= total
    assert own[2] > 0.9 > 0.5 > other[2]


def test_discards_are_random_pages_of_the_zone_in_runs() -> None:
    zone = Zone("half", Path("none"), 8 * MIB, 16 * MIB)
    pages = discard.random_pages(zone, 0.3, 1)
    assert pages == sorted(set(pages)) and len(pages) == int(4096 * 0.3)
    assert pages[0] >= 2048 and pages[-1] < 2048 + 4096
    assert pages == discard.random_pages(zone, 0.3, 1) != discard.random_pages(zone, 0.3, 2)
    runs = list(discard.runs(pages))
    assert [page for first, count in runs for page in range(first, first + count)] == pages
    ends, begins = [sum(one) for one in runs[:-1]], [first for first, _ in runs[1:]]
    assert all(end < begin for end, begin in zip(ends, begins, strict=True))
    assert list(discard.runs([])) == []


# ---- how they end -----------------------------------------------------------------------------------
@pytest.mark.requires("fuse", "loop", "ext4", "fstrim", "fio")
@pytest.mark.parametrize(("words", "line"), [
    ((*FRAGMENTATION, "--size-mib", "32"), "no compaction: writing"),
    ((*COMPACTION, "--size", "64M", "--data", "half", "--seconds", "20", "--parts", "disturbance"),
     "run 1 of"),
], ids=["fragmentation", "compaction"])
def test_ctrl_c_takes_everything_down(tmp_path: Path, words: tuple[str, ...], line: str) -> None:
    """That nothing is left is seen to by conftest.py, after the last test of this file."""
    with subprocess.Popen(
        [*words, "--output", tmp_path / "out"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        start_new_session=True,
    ) as child:
        assert child.stderr is not None
        assert any(said.startswith(line) for said in child.stderr)
        time.sleep(1)
        # What the terminal does: the whole foreground group hears it, and impatient people do it twice.
        os.killpg(child.pid, signal.SIGINT)
        time.sleep(0.05)
        os.killpg(child.pid, signal.SIGINT)
        said = child.stderr.read()
        assert child.wait(60) == 128 + signal.SIGINT, said
    assert "SIGINT: ended before the results were complete; everything is taken down" in said
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(("words", "said"), [
    ((*FRAGMENTATION, "--size-mib", "1"), "1 is not in the range x>=4"),
    ((*FRAGMENTATION, "--wait", "0"), "0.0 is not in the range x>=2.0"),
    ((*COMPACTION, "--parts", "idle"), "'idle' is none of returned disturbance"),
    ((*COMPACTION, "--size", "5000000"), "expected whole MiB, at least 8"),
])
def test_bad_options_are_refused_with_what_was_expected(words: tuple[str, ...], said: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())
