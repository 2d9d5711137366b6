# SPDX-License-Identifier: Apache-2.0
"""zramfs report on real devices."""
from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support.child import stopped
from tests.support.whole import MIB, PAGE, Device, device, opened, punch_hole, zramfs
from zramfs.host import paths
from zramfs.lifecycle import rundir
from zramfs.views import sample

pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install zramfs[report])")
pytestmark = [pytest.mark.requires("fuse")]

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run directories of this test alone."""
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))


def failure(*words: object, code: int = 1) -> str:
    done = zramfs(*words, check=False)
    assert (done.returncode, done.stdout) == (code, ""), done
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


def fragment(made: Device) -> None:
    """Half compressible pages, then holes in them, and nobody who compacts."""
    made.write("memory/proactiveness", "0")
    with opened(made.disk) as fd:
        for page in range(4000):
            os.pwrite(fd, os.urandom(PAGE // 2).ljust(PAGE, b"z"), page * PAGE)
        for page in range(0, 4000, 2):
            punch_hole(fd, page * PAGE, PAGE)


def test_before_and_after_compaction(tmp_path: Path) -> None:
    place = tmp_path / "a $1 <b>"
    with device(place, 32 * MIB) as made:
        fragment(made)
        assert zramfs("report", place, "--output", tmp_path / "old.png").stdout == ""
        assert (tmp_path / "old.png").read_bytes().startswith(PNG)
        old = sample.from_json((tmp_path / "old.json").read_text(), "old.json")
        assert old.directory == str(place)
        assert old.name == paths.escape(place)
        # At rest the tree says the same after the report as it did in it.
        again = sample.parse_sample(sample.texts(place), old.name, old.directory)
        assert again.to_json() == old.to_json().replace(old.taken, again.taken)

        made.write("control", "compact")
        zramfs("report", place, "--output", tmp_path / "new.html", "--before", tmp_path / "old.json",
               "--data", tmp_path / "figures")
        new = sample.from_json((tmp_path / "figures").read_text(), "figures")
        assert not (tmp_path / "new.json").exists()
        page = (tmp_path / "new.html").read_text()
        assert f"<tr><td>pageblocks in use</td><td>{old.in_use}</td><td>{new.in_use}</td></tr>" in page
        assert new.in_use < old.in_use
        assert new.whole_share > 0.5 > (old.whole_share or 0)
        assert f"on {tmp_path}/a $1 &lt;b&gt;</title>" in page


@pytest.mark.requires("loop", "ext4")
def test_a_ram_disk_is_reported_by_its_mount_point(tmp_path: Path) -> None:
    place = tmp_path / "disk"
    zramfs("ramdisk", place, "--size", "64M")
    try:
        zramfs("report", place, "--output", tmp_path / "x.png")
        found = json.loads((tmp_path / "x.json").read_text())
        assert found["name"] == paths.escape(place)
        assert found["mm_stat"]["orig_data_size"] > 0
    finally:
        zramfs("stop", place)


def test_what_a_report_refuses(tmp_path: Path) -> None:
    place, png = tmp_path / "z", tmp_path / "x.png"
    said = failure("report", place, "--output", png)
    assert f"no zramfs device of yours is on {place}" in said
    with device(place, None) as made:
        assert f"{place} has no pool yet" in failure("report", place, "--output", png)
        made.write("zram/disksize", str(MIB))
        for words, reason in (
            (["--output", tmp_path / "x.jpg"], "expected --output to end with .png or .html, got"),
            (["--output", png, "--data", png], "--output and --data both name"),
            (["--output", png, "--before", tmp_path / "x.json"], "would be overwritten by the present ones"),
            ([], "Missing option '--output'"),
        ):
            assert reason in failure("report", place, *words, code=2)
        (tmp_path / "old.json").write_text("{}")
        said = failure("report", place, "--output", png, "--before", tmp_path / "old.json")
        assert "to be the JSON that `zramfs report` writes beside its picture" in said
        said = failure("report", place, "--output", png, "--before", tmp_path / "none.json")
        assert f"{tmp_path}/none.json: No such file or directory" in said
        said = failure("report", place, "--output", tmp_path / "nowhere/x.png")
        assert f"{tmp_path}/nowhere/x.png: No such file or directory" in said
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["old.json"]


def test_a_device_that_hangs_does_not_hang_its_report(tmp_path: Path) -> None:
    place = tmp_path / "z"
    with device(place, MIB):
        state = rundir.find(str(place)).read()
        with stopped(state.pid):
            said = failure("report", place, "--output", tmp_path / "x.png")
        assert f"{place} has not answered for 5 s" in said
    assert not (tmp_path / "x.png").exists()
