# SPDX-License-Identifier: Apache-2.0
"""benchmarks/run: a short real run, its results, its floors, and that it leaves nothing behind."""
from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import capabilities
from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT))

pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install zramfs[bench])")

from benchmarks import pages  # noqa: E402
from benchmarks.load import ROWS, Sample  # noqa: E402
from benchmarks.memory import Memory  # noqa: E402
from benchmarks.results import Cell, Results  # noqa: E402

RUN = (sys.executable, str(ROOT / "benchmarks/run"))
# Seconds: an idle machine takes 20.
BUSY = 600
pytestmark = pytest.mark.timeout(BUSY + 60)
MIB = 1 << 20
RUN_ROWS = {"seq-write-1", "rand-read-16"}
ASKED = {"zramfs-file", "zramfs-loop", "zram", "nbdkit-file", "empty-file", "empty-loop"}


@dataclass(frozen=True)
class ShortRun:
    output: Path
    screen: str
    results: dict


@pytest.fixture(scope="module")
def without_nbdkit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which every command is found but nbdkit and nbdfuse."""
    shadow = tmp_path_factory.mktemp("bin")
    for folder in (*os.environ["PATH"].split(":"), "/usr/sbin", "/sbin"):
        for program in Path(folder).glob("*"):
            link = shadow / program.name
            if program.name not in ("nbdkit", "nbdfuse") and not link.is_symlink():
                link.symlink_to(program)
    return os.environ | {"PATH": str(shadow)}


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory, without_nbdkit: dict[str, str]) -> ShortRun:
    capabilities.require("fuse", "fio", "mkfs.ext4")
    output = tmp_path_factory.mktemp("benchmark") / "out"
    done = subprocess.run(
        [*RUN, "--size", "8M", "--reps", "2", "--seconds", "0.2", "--rows", ",".join(RUN_ROWS),
         "--peers", "zramfs,zram,nbdkit-file,empty", "--output", output],
        env=without_nbdkit, capture_output=True, text=True, timeout=BUSY)
    assert done.returncode == 0, done.stdout + done.stderr
    return ShortRun(output, done.stdout, json.loads((output / "results.json").read_text()))


def test_every_peer_is_measured_or_named_as_left_out(short_run: ShortRun) -> None:
    results = short_run.results
    measured = {cell["peer"] for cell in results["cells"]}
    assert measured | (results["left_out"].keys() - {"memory"}) == ASKED
    assert not measured & results["left_out"].keys()
    assert {"zramfs-file", "empty-file"} <= measured
    assert results["left_out"]["nbdkit-file"] == "nbdkit is not installed (Debian: apt-get install nbdkit)"
    if not capabilities.missing("loop"):
        assert {"zramfs-loop", "empty-loop"} <= measured
    if not capabilities.missing("zram"):
        assert "zram" in measured
    for name, reason in results["left_out"].items():
        assert f"left out: {name}: {reason}" in short_run.screen


def test_rates_are_those_of_the_samples(short_run: ShortRun) -> None:
    cells = short_run.results["cells"]
    measured = {cell["peer"] for cell in cells}
    assert {(c["data"], c["row"], c["peer"]) for c in cells} == {
        (data, row, peer) for data in ("half", "real") for row in RUN_ROWS for peer in measured}
    for cell in cells:
        samples = cell["samples"]
        assert len(samples) == 2
        assert cell["bytes_per_second"] == pytest.approx(
            statistics.median(s["bytes"] / s["seconds"] for s in samples))
        assert cell["requests_per_second"] == pytest.approx(cell["bytes_per_second"] / cell["block"])
        for sample in samples:
            assert sample["bytes"] % cell["block"] == 0
            assert 0.15 < sample["seconds"] < 120
            # No CPU can be spent outside of the run: a bound on what is counted.
            assert 0 <= sample["server_cpu"] <= (os.cpu_count() or 1) * (sample["seconds"] + 2)
        # From the slowest that would still be a working device to memory's own speed.
        assert 1e6 < cell["bytes_per_second"] < 1e11


def test_ratios_hold_zramfs_against_the_same_mount(short_run: ShortRun) -> None:
    rates = {(c["data"], c["row"], c["peer"]): c["bytes_per_second"] for c in short_run.results["cells"]}
    ratios = short_run.results["ratios"]
    assert {r["peer"] for r in ratios} == {peer for _, _, peer in rates if peer.startswith("zramfs")}
    for r in ratios:
        assert r["against"] in ("zram", r["peer"].replace("zramfs", "empty"))
        own, other = (rates[r["data"], r["row"], peer] for peer in (r["peer"], r["against"]))
        assert r["ratio"] == pytest.approx(own / other)


def test_memory_is_compared_with_the_kernels(short_run: ShortRun) -> None:
    if reason := capabilities.missing("zram"):
        assert "memory" in short_run.results["left_out"]
        pytest.skip(reason)
    found = {m["data"]: m for m in short_run.results["memory"]}
    assert found.keys() == {"half", "real"}
    for m in found.values():
        assert m["stored"] == 8 * MIB
        assert m["kernel_tables"] == 8 * MIB // 4096 * 24
        assert 0.3 * m["stored"] < m["kernel_pool"] < 0.9 * m["stored"]
        # A whole pageblock more than needed and the lane's buffers weigh much on 8 MiB.
        assert 0.9 * m["kernel_pool"] < m["full"] - m["empty"] < m["kernel_pool"] + 12 * MIB
        assert m["ratio"] == pytest.approx((m["full"] - m["empty"]) / (m["kernel_pool"] + m["kernel_tables"]))


def test_the_table_and_the_picture_show_it_all(short_run: ShortRun) -> None:
    import matplotlib.image

    table = (short_run.output / "table.txt").read_text()
    assert set(table.splitlines()) <= {line.rstrip() for line in short_run.screen.splitlines()}
    for cell in short_run.results["cells"]:
        line = next(s for s in table.splitlines() if re.match(rf" *{cell['data']} +{cell['row']} ", s))
        unit = 1e6 if cell["row"].startswith("seq") else 1e3 * cell["block"]
        digits = 0 if cell["row"].startswith("seq") else 1
        assert f"{cell['bytes_per_second'] / unit:.{digits}f}" in line.split()
    assert len(re.findall(r"(?:NOT )?reached$|not measured$", table, re.MULTILINE)) == 5
    picture = matplotlib.image.imread(short_run.output / "plot.png")
    assert picture.shape[0] > 400 and picture.shape[1] > 400
    assert len({tuple(pixel) for row in picture[::7] for pixel in row[::7]}) > 5


def test_ctrl_c_takes_everything_down(tmp_path: Path) -> None:
    capabilities.require("fuse", "fio")
    with subprocess.Popen(
        [*RUN, "--size", "8M", "--data", "half", "--seconds", "60", "--no-memory", "--output",
         tmp_path / "out"],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
    ) as run:
        assert run.stderr is not None
        paths = []
        for line in run.stderr:
            if peer := re.fullmatch(r"[a-z-]+: (/.*)\n", line):
                paths.append(Path(peer.group(1)))
            if line.startswith("run 1 of"):
                break
        zrams = [path for path in paths if path.name.startswith("zram")]
        identities = [os.stat(f"/sys/block/{path.name}").st_ino for path in zrams]
        assert len(paths) >= 2
        time.sleep(0.3)
        # What the terminal does: the whole foreground group hears it, and impatient people do it twice.
        os.killpg(run.pid, signal.SIGINT)
        time.sleep(0.05)
        os.killpg(run.pid, signal.SIGINT)
        said = run.stderr.read()
        assert run.wait(60) == 128 + signal.SIGINT, said
    assert "SIGINT" in said
    assert not (tmp_path / "out" / "results.json").exists()
    for path, identity in zip(zrams, identities, strict=True):
        now = Path(f"/sys/block/{path.name}")
        # Another test may have got the number meanwhile; then it is another device.
        assert not now.exists() or now.stat().st_ino != identity
    mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    backings = [f.read_text() for f in Path("/sys/block").glob("loop*/loop/backing_file")]
    for path in paths:
        if path.is_relative_to("/dev"):
            continue
        assert f" {path} " not in mounts and f" {path.parent} " not in mounts
        assert not any(str(path) in backing for backing in backings)


def test_half_compressible_pages_are_neither_filled_nor_repeated() -> None:
    capabilities.require("fio")
    found = _pages_of(pages.image("half", 8 * MIB))
    assert len(set(found)) == len(found)
    assert not any(page == page[:8] * 512 for page in found)
    packed = sum(len(zlib.compress(page, 1)) for page in found) / (8 * MIB)
    assert 0.45 < packed < 0.65


def test_real_pages_are_a_sound_file_system() -> None:
    capabilities.require("mkfs.ext4", "e2fsck")
    image = pages.image("real", 8 * MIB)
    subprocess.run(["/usr/sbin/e2fsck", "-fn", image], check=True, capture_output=True, timeout=60)
    found = _pages_of(image)
    assert sum(page == page[:8] * 512 for page in found) < len(found) // 10


def _pages_of(image: Path) -> list[bytes]:
    data = image.read_bytes()
    assert len(data) == 8 * MIB
    return [data[i:i + 4096] for i in range(0, len(data), 4096)]


def _results(rates: dict[tuple[str, str], float], memory: list[Memory]) -> Results:
    rows = {row.name: row for row in ROWS}
    return Results({}, {}, memory=memory, cells=[
        Cell(rows[row], "half", peer, tuple(Sample(int(rate), 1.0, 0.1, 0.1) for _ in range(3)))
        for (row, peer), rate in rates.items()])


@pytest.mark.parametrize(("factor", "expected"), [(1.0, True), (0.9, False)])
def test_floors_judge_the_worst_row(factor: float, expected: bool) -> None:
    rates = {
        ("seq-write-1", "zram"): 1e9, ("seq-write-1", "zramfs-loop"): 2e9,
        ("seq-write-16", "zram"): 1e9, ("seq-write-16", "zramfs-loop"): 0.8e9 * factor,
        ("seq-read-1", "zram"): 1e9, ("seq-read-1", "zramfs-loop"): 0.5e9 * factor,
        ("rand-read-16", "empty-file"): 1e9, ("rand-read-16", "zramfs-file"): 0.7e9 * factor,
        # The empty server is no measure for another mount, nor for another depth.
        ("rand-read-16", "zramfs-loop"): 1e5, ("rand-read-1", "empty-file"): 1e9,
        ("rand-read-1", "zramfs-file"): 3e8 * factor, ("rand-read-1", "nbdkit-file"): 1e8,
    }
    memory = Memory("real", 4096 * 100, 1000, 1000 + int(42000 / factor), 37600, 2400, 1e9, 1e9)
    floors = _results(rates, [memory]).floors()
    assert [floor.reached for floor in floors] == [expected] * 5
    assert [floor.value for floor in floors] == pytest.approx(
        [0.8 * factor, 0.5 * factor, 0.7 * factor, 3.0 * factor, 1.05 / factor], rel=1e-3)
    assert floors[0].where == "seq-write-16, half, zramfs-loop"


def test_a_floor_without_a_measurement_is_neither_reached_nor_missed() -> None:
    assert [floor.reached for floor in _results({("seq-read-1", "zram"): 1e9}, []).floors()] == [None] * 5


def test_cpu_is_counted_per_gigabyte() -> None:
    results = _results({("seq-read-1", "zram"): 5e8, ("seq-read-1", "empty-file"): 5e8}, [])
    kernel, empty = results.cells
    assert empty.server_cpu == pytest.approx(0.2) and empty.cpu == pytest.approx(0.4)
    assert kernel.server_cpu is None and kernel.cpu == pytest.approx(0.4)


@pytest.mark.parametrize(("words", "said"), [
    (("--peers", "zfs"), "'zfs' is none of zramfs-file"),
    (("--rows", "seq,random"), "'random' is none of seq-write-1"),
    (("--size", "5000000"), "expected whole MiB, at least 8"),
    (("--size", "big"), "'big' is not a size"),
])
def test_bad_options_are_refused_with_what_was_expected(words: tuple[str, str], said: str) -> None:
    done = subprocess.run([*RUN, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())
