# SPDX-License-Identifier: Apache-2.0
"""Another version that does not hold under a device in use, and files that are replaced under it."""
from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.lifecycle.upgrade_test import keeper_of, load, log_of
from tests.support.child import has_ended
from tests.support.killer import kill_daemon, state
from tests.support.versions import Version
from tests.support.whole import MIB, device, opened, stop, wait_until
from zramfs import __version__
from zramfs.keeper.client import PROGRAM

pytestmark = [pytest.mark.requires("fuse"), pytest.mark.timeout(300)]

# What the daemon of another version does wrong, and where in it.
FAULTS = {
    "before it serves": ("        lane.start()\n        took =", "        os._exit(9)\n        took ="),
    "when it serves": ("        self.succession.begin(self.device, True)\n        log.info(",
                       "        self.succession.begin(self.device, True)\n"
                       "        os.kill(os.getpid(), signal.SIGSEGV)\n        log.info("),
}


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.mark.parametrize(("fault", "options"), [
    ("before it serves", ()), ("before it serves", ("--standby",)), ("when it serves", ()),
], ids=["before", "before-standby", "after"])
def test_a_version_that_takes_over_and_does_not_hold_is_followed_by_the_old_one(
    tmp_path: Path, fault: str, options: tuple[str, ...]
) -> None:
    other = Version.copy(tmp_path / "other")
    other.change("zramfs/daemon/daemon.py", *FAULTS[fault])
    with device(tmp_path / "z", 16 * MIB, *options) as z, load(z.disk, 4 * MIB) as running:
        z.write("control", "mem_limit=12M")
        before = state(z.directory)
        done = other.run("upgrade", z.directory, timeout=150)
        assert done.returncode == 1 and done.stdout == ""
        now = state(z.directory)
        assert now.release == __version__ and now.pid != before.pid and now.keeper_pid == before.keeper_pid
        told = (f"{z.directory}: not upgraded: 9.9.9 took over from process {before.pid}, and did not hold; "
                f"{__version__} (pid {now.pid}) serves again, with the same data")
        assert told in done.stderr
        assert keeper_of(now) == str(PROGRAM)
        assert log_of(z.directory).count("this version does not hold: the one before takes over again") == 1
        count = running.count
        wait_until(lambda: running.count > count + 100 or running.failure, "requests after it", 60)
        wait_until(lambda: os.path.exists(z.directory / "control"), "the tree", 60)
        assert z.mm_stat()["mem_limit"] == 12 * MIB
        # As if nothing had been tried: also what happens when the daemon dies.
        if options:
            wait_until(lambda: state(z.directory).standby_pid != 0, "a standby of the old version", 60)
        kill_daemon(z.directory)
        assert state(z.directory).release == __version__


def test_a_daemon_that_dies_while_its_files_are_replaced_is_followed_by_one_of_the_new_version(
    tmp_path: Path,
) -> None:
    """As between the unpacking of a package and its last script: a file is lacking, and then all are new."""
    place, directory = tmp_path / "installed", tmp_path / "z"
    old, new = (Version.copy(tmp_path / release, release) for release in ("0.0.9", "9.9.9"))
    place.symlink_to(old.place)
    assert Version(old.release, place).run("create", directory, "--size", "16M").returncode == 0
    try:
        with opened(directory / "disk") as fd:
            os.pwrite(fd, b"kept" * 1024, MIB)
            before = state(directory)
            (old.place / "zramfs/lifecycle/serve.py").unlink()
            os.kill(before.pid, signal.SIGKILL)
            wait_until(lambda: log_of(directory).count("ended with status") >= 2, "two that do not start", 60)
            (tmp_path / "link").symlink_to(new.place)
            (tmp_path / "link").replace(place)
            wait_until(lambda: state(directory).release == new.release, "another daemon", 60)
            assert state(directory).keeper_pid == before.keeper_pid
            assert os.pread(fd, 4096, MIB) == b"kept" * 1024
            # The second death: a new daemon with the old keeper has another one.
            kill_daemon(directory)
            assert state(directory).release == new.release
            # The last script of the package.
            wait_until(lambda: os.path.exists(directory / "control"), "the tree", 60)
            done = Version(new.release, place).run("upgrade", directory)
            assert (done.returncode, done.stderr) == (0, "")
            assert state(directory).keeper_pid == before.keeper_pid
            assert keeper_of(state(directory)) == str(new.keeper)
            assert os.pread(fd, 4096, MIB) == b"kept" * 1024
    finally:
        stop(directory)
    assert has_ended(before.keeper_pid)
