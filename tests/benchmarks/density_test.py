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

from benchmarks import corpora, density, in_use, load, memory, peers, simulated  # noqa: E402
from benchmarks.load import Zone  # noqa: E402
from benchmarks.packing import pack  # noqa: E402
from benchmarks.tools import BenchmarkError, Interrupt  # noqa: E402
from zramfs.codecs.codec import Codec  # noqa: E402

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
         "--ways", "zram zstd", "--ways", "zramfs, density max", "--output", tmp_path],
        capture_output=True, text=True, timeout=300, env=os.environ,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    if "zram lz4" in found["left_out"]:
        pytest.skip(found["left_out"]["zram lz4"])
    cells = {cell["way"]: cell for cell in found["density"]}
    lz4, plain, zstd, packed = cells
    assert (lz4, plain, packed) == ("zram lz4", "zramfs lz4", "zramfs, density max")
    # Measured, or worked out where the kernel has no zstd.
    assert zstd in ("zram zstd", "zram zstd, simulated")
    assert all(cell["bytes"] == 8 * MIB and cell["cpu"] > 0 for cell in cells.values())
    # The same codec and the same size classes; buffers and workspaces weigh on so small a device.
    pool = cells["zram lz4"]["resident"]
    assert pool < cells["zramfs lz4"]["resident"] < 1.5 * pool
    assert cells[zstd]["share"] < cells["zram lz4"]["share"]
    # At this size the fixed parts of the daemon weigh as much as what is won.
    assert cells[packed]["cpu"] > cells[plain]["cpu"]
    table = (tmp_path / "table.txt").read_text()
    assert f"{cells['zramfs lz4']['share']:.3f}" in table and "text" not in table


@pytest.mark.requires("fuse")
def test_pages_in_use_stay_out_of_units_and_all_others_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    zone = Zone("process", corpora.corpus("process", 8 * MIB), 0, 8 * MIB)
    units: dict[str, str] = {}

    def packed(server: peers.Server, *arguments: object) -> None:
        pack(server, *arguments)  # type: ignore[arg-type]
        assert server.tree is not None
        units.update(line.split() for line in (server.tree / "memory/units").read_text().splitlines())

    monkeypatch.setattr(density, "pack", packed)
    with Interrupt() as interrupt:
        found = density.measure("zramfs, density auto, 20% in use", zone, interrupt)
    # 409 of 2048 pages are in use.
    assert 0.7 * 2048 < int(units["pages"]) <= 2048 - 409
    assert 0 < found.resident < found.bytes == 8 * MIB
    assert found.as_json()["share"] == found.resident / (8 * MIB)
    # A device that serves other requests meanwhile has no CPU time of its own.
    assert found.cpu is found.page_us is None


@pytest.mark.requires("root", "zram")
def test_the_simulated_pool_is_what_the_kernel_says_of_lz4() -> None:
    zone = Zone("process", corpora.corpus("process", 8 * MIB), 0, 8 * MIB)
    with Interrupt() as interrupt:
        worked_out = simulated.kernel_zram(zone.image, zone.size, "lz4", interrupt)
        with peers.serve("zram", zone.size, "lz4") as server:
            load.fill(peers.Peer("zram", server, server.path), zone, interrupt)
            used, stored = memory.mm_stat(server)
    # liblz4 and the kernel's lz4 are of different versions.
    assert abs(worked_out.pool / used - 1) < 0.02
    assert worked_out.tables == stored // PAGE * memory.KERNEL_TABLE_BYTES


def test_zstd_is_worked_out_with_the_frames_that_the_kernel_writes(tmp_path: Path) -> None:
    image = tmp_path / "image"
    # A page of one word, one that does not compress, and one that does.
    image.write_bytes(b"12345678" * 512 + os.urandom(PAGE) + b"zramfs! ".join([b"text"] * 342)[:PAGE])
    with Interrupt() as interrupt:
        found = simulated.kernel_zram(image, 3 * PAGE, "zstd", interrupt)
    assert found.tables == 3 * memory.KERNEL_TABLE_BYTES
    # A frame for the second, a zspage of its class for the third, nothing for the first.
    assert 2 * PAGE <= found.pool <= 9 * PAGE and found.cpu > 0
    zstandard = pytest.importorskip("zstandard")
    page = image.read_bytes()[2 * PAGE:]
    frame = zstandard.ZstdCompressor(level=3, write_content_size=True, write_checksum=False).compress(page)
    packed = Codec("zstd").compress(page)
    assert packed is not None and len(frame) == len(packed) + simulated.FRAME_BYTES["zstd"]


@pytest.mark.requires("fuse")
def test_the_pages_in_use_are_used_once_a_round_and_the_others_never(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    image = corpora.corpus("process", 8 * MIB)
    disk.write_bytes(bytes(8 * MIB))
    with in_use.in_use(disk, Zone("process", image, 0, 8 * MIB), 0.2) as use:
        use.wait_rounds(1)
        assert use.rounds >= 2
    data, source = disk.read_bytes(), image.read_bytes()
    written = {at for at in range(0, 8 * MIB, PAGE) if any(data[at:at + PAGE])}
    # Half of the 409 pages in a round, and others in the next.
    assert 204 <= len(written) <= 409
    known = {source[at:at + PAGE] for at in range(0, 8 * MIB, PAGE)}
    assert all(data[at:at + PAGE] in known for at in written)


@pytest.mark.requires("fuse")
def test_a_request_that_fails_ends_the_measurement(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(MIB))
    zone = Zone("process", corpora.corpus("process", 8 * MIB), 0, 8 * MIB)
    with pytest.raises(BenchmarkError, match="a request of the pages in use failed"), \
            in_use.in_use(tmp_path / "none", zone, 0.2) as use:
        use.wait_rounds(1)
