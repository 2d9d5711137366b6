# SPDX-License-Identifier: Apache-2.0
"""A daemon that has failed: what it leaves to be read, who names it, and who clears it away."""
from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import zramfs.cli.status  # noqa: F401
from tests.support.child import TIMEOUT
from tests.support.commands import nothing_left, rows
from tests.support.whole import device, wait_until, zramfs
from zramfs.lifecycle import rundir
from zramfs.lifecycle.rundir import Rundir

pytestmark = [pytest.mark.requires("fuse", "root"), pytest.mark.timeout(240)]


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture
def connections(tmp_path: Path) -> Iterator[Path]:
    """The kernel's control files for FUSE connections."""
    own = tmp_path / "connections"
    own.mkdir()
    subprocess.run(["mount", "-t", "fusectl", "none", own], check=True, timeout=TIMEOUT)
    yield own
    subprocess.run(["umount", own], check=True, timeout=TIMEOUT)


def fail(directory: Path, connections: Path) -> Rundir:
    """Aborts the lane's connection under the device."""
    zramfs("create", directory, "--size", "1M")
    found = rundir.find(str(directory))
    state = found.read()
    (connections / str(os.minor(os.stat(state.disk).st_dev)) / "abort").write_text("1")
    wait_until(lambda: not state.alive(), "the daemon has ended", 40)
    wait_until(lambda: not found.is_served(), "and its keeper, which has the lock", 40)
    return found


def test_the_log_of_a_failed_device_stays_until_stop(tmp_path: Path, base: Path, connections: Path) -> None:
    directory = tmp_path / "place/dev"
    directory.parent.mkdir()
    failed = fail(directory, connections)
    assert "the lane has ended: somebody aborted its connection" in failed.log.read_text()
    assert sorted(os.listdir(failed.path)) == ["log", "state.json"]
    assert not directory.exists()  # made by create, and empty
    shown = zramfs("status", directory, check=False)
    assert shown.returncode == 1
    assert f"its daemon has failed, and its data is lost; {failed.log} says why" in shown.stderr
    assert rows(directory, "-o", "STATE", code=1) == [{"state": "failed"}]
    said = zramfs("stop", directory).stderr
    assert "had failed, and its data is lost; the end of its log:\n" in said
    assert "somebody aborted its connection" in said
    nothing_left(directory, base)


def test_the_next_start_clears_a_failed_device_away(tmp_path: Path, base: Path, connections: Path) -> None:
    directory = tmp_path / "place/dev"
    directory.parent.mkdir()
    fail(directory, connections)
    said = zramfs("create", directory, "--size", "2M").stderr
    assert f"cleaned up {directory}: its daemon" in said and "somebody aborted its connection" in said
    assert rows(directory, "-o", "STATE") == [{"state": "ready"}]
    zramfs("stop", directory)
    nothing_left(directory, base)


def test_a_device_that_ends_in_order_leaves_no_log(tmp_path: Path, base: Path) -> None:
    directory = tmp_path / "place/dev"
    directory.parent.mkdir()
    zramfs("create", directory, "--size", "1M")
    zramfs("stop", directory)
    nothing_left(directory, base)


def test_a_lane_that_hangs_does_not_look_healthy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tree answers all the same, from another thread."""
    status = sys.modules["zramfs.cli.status"]  # the package has a command of the same name
    with device(tmp_path / "dev", "1M"):
        found = rundir.find(str(tmp_path / "dev"))
        monkeypatch.setattr(status, "_ask_lane", lambda disk: time.sleep(60))
        row = status._row(found)
        status._ask([row], status.FILES)
        assert (row.health, row.files["zram/disksize"]) == ("hangs", f"{1 << 20}\n")
        assert status._advice(row) == f"the lane of its daemon (pid {row.state.pid}) has not answered for 2 s"
