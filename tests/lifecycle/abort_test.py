# SPDX-License-Identifier: Apache-2.0
"""zramfs abort: whoever waits for a device that does not answer is freed, with fusectl mounted or not."""
from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.apart import apart
from tests.support.child import stands_still
from tests.support.commands import failure, kill_daemon, nothing_left, state_of
from tests.support.users import NOBODY, fuse_for_everybody, zramfs_as_nobody
from tests.support.whole import MIB, ZRAMFS, device, run, wait_until, zramfs
from zramfs.host import fuse_connections, mounts
from zramfs.lifecycle import rundir

pytestmark = [pytest.mark.requires("root", "fuse", "unshare"), pytest.mark.timeout(240)]
# A read past the page cache, whose error is its exit status.
READ = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
print("there", flush=True)
sys.stdin.readline()
try:
    os.readv(fd, [mmap.mmap(-1, 4096)])
except OSError as error:
    sys.exit(error.errno)
"""


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


@contextlib.contextmanager
def stuck(directory: Path, disk: Path) -> Iterator[tuple[int, subprocess.Popen]]:
    """The pid of a daemon that is stopped, and a process that waits for it. In the end both are freed."""
    pid = state_of(directory).pid
    lane = mounts.mount_at(disk)
    with subprocess.Popen([sys.executable, "-c", READ, disk], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as reader:
        try:
            assert reader.stdout.readline() == "there\n"
            os.kill(pid, signal.SIGSTOP)
            wait_until(lambda: stands_still(pid), "all its threads stand still")
            reader.stdin.write("\n")
            reader.stdin.flush()
            wait_until(lambda: "fuse" in Path(f"/proc/{reader.pid}/stack").read_text(), "the reader waits")
            yield pid, reader
        finally:
            with contextlib.suppress(OSError):
                fuse_connections.abort_connection(lane)
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGCONT)
            reader.kill()


@pytest.mark.parametrize("setup", [
    "umount {place} 2>/dev/null", "mountpoint -q {place} || mount -t fusectl fusectl {place}",
], ids=["no-fusectl", "fusectl"])
def test_a_reader_of_a_device_that_hangs_is_freed(tmp_path: Path, base: Path, setup: str) -> None:
    directory = tmp_path / "device"
    # In a namespace of its own, where nobody else mounts or unmounts, and which holds nobody else's mounts.
    tell = "sed -n 's/.* - fusectl .*/fusectl is mounted/p' /proc/self/mountinfo"
    command = f'{setup.format(place=fuse_connections.PLACE)}; {tell}; "$@" || exit; echo after; {tell}'
    prefix = apart("sh", "-c", command, "sh")
    zramfs("create", directory, "--size", "1M", "--name", "z")
    try:
        with stuck(directory, base / "z/disk") as (pid, reader):
            done = run(*prefix, *ZRAMFS, "abort", "z", timeout=60, env=dict(os.environ))
            assert f"aborted {base}/z/disk (connection " in done.stderr
            assert f", {directory} (connection " in done.stderr
            assert reader.wait(60) in (errno.ECONNABORTED, errno.ENOTCONN, errno.EIO)
            os.kill(pid, signal.SIGCONT)
            wait_until(lambda: not rundir.find("z").is_served(), "the daemon has ended")
        before, _, after = done.stdout.partition("after\n")
        assert before == after
        assert before or "mount -t" not in setup
    finally:
        zramfs("stop", "z")
    nothing_left(directory, base)


def test_a_device_whose_daemon_is_dead_needs_no_abort(tmp_path: Path) -> None:
    with device(tmp_path / "device", MIB) as made:
        kill_daemon(state_of(made.directory))
        said = failure("abort", made.directory)
        assert "is dead, so nobody waits for it any more" in said and "`zramfs stop" in said
    assert "no zramfs device of yours is on" in failure("abort", tmp_path / "device")


@pytest.mark.requires("setpriv")
def test_root_aborts_the_device_of_another_user_and_he_no_other(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("ZRAMFS_RUN_DIR")
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    his = home / "his"
    his.mkdir()
    os.chown(his, NOBODY, NOBODY)
    with fuse_for_everybody(home) as prefix, device(tmp_path / "mine", MIB) as mine:
        command = zramfs_as_nobody(prefix)
        run(*command, "create", his / "device", "--size", "1M", cwd="/")
        try:
            assert run(*command, "abort", mine.directory, cwd="/", check=False).returncode == 1
            assert mine.read("zram/initstate") == "1\n"
            done = zramfs("abort", his / "device")
            assert done.stderr.count("(connection ") == 2
        finally:
            run(*command, "stop", his / "device", cwd="/", check=False)
        assert mounts.mount_at(his / "device") is None
