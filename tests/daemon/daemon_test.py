# SPDX-License-Identifier: Apache-2.0
"""The daemon of a device: how it starts and ends, and what it leaves."""
from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.child import TIMEOUT
from tests.support.scale import scaled
from tests.support.served import ServedDevice, served_device
from tests.support.whole import run, wait_until

pytestmark = pytest.mark.requires("fuse")

MIB = 1 << 20


@pytest.fixture
def served(tmp_path):
    with served_device(tmp_path / "dev") as child:
        yield child
        assert child.stop() == 0, child.log
        assert "Traceback" not in child.log


def test_killed_clients_do_not_stop_the_daemon(tmp_path):
    """A request whose caller was killed is withdrawn; a loop that reads it in blocking mode stands
    still, the interpreter with it, until somebody else asks something. So nobody does."""
    with served_device(tmp_path / "dev", beat=True) as child:
        directory = str(child.directory)
        for _ in range(scaled(60, 20)):
            client = os.fork()
            if client == 0:
                try:
                    while True:
                        with open(f"{directory}/zram/mem_limit", "wb", buffering=0) as file:
                            file.write(b"1M")
                        os.stat(f"{directory}/nothing{random.random()}") if random.random() < 0.1 else None
                finally:
                    os._exit(0)
            time.sleep(0.02 + random.random() * 0.01)
            os.kill(client, signal.SIGKILL)
            os.waitpid(client, 0)
            time.sleep(0.05)
            child.forget()
            child.hear(".")
        assert child.read("zram/initstate") == "0\n"
        assert child.stop() == 0, child.log
        assert child.mounts() == [] and "Traceback" not in child.log


def test_sigusr1_shows_the_stacks(served):
    served.process.send_signal(signal.SIGUSR1)
    until = time.monotonic() + TIMEOUT
    while "most recent call first" not in served.log:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert served.read("zram/initstate") == "0\n"


def test_sigusr1_never_ends_it_however_busy_its_threads_are(tmp_path):
    """Looks at threads that run, one by one: a signal that comes while one is pending is none."""
    looks = scaled(300, 100)
    with served_device(tmp_path / "dev", size=MIB, beat=True) as child, child.log_path.open() as log:
        said = ""
        for sent in range(looks):
            child.process.send_signal(signal.SIGUSR1)
            until = time.monotonic() + TIMEOUT
            # The main thread's stack is the last of each look.
            while said.count("in <module>\n") <= sent:
                assert child.process.poll() is None and time.monotonic() < until
                child.read("control")
                said += log.read()
        assert said.count("in <module>\n") == looks


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_it_in_order(tmp_path, number):
    with served_device(tmp_path / "dev", size=MIB) as child:
        child.process.send_signal(number)
        assert child.wait() == 0
        assert child.mounts() == [] and "TEARDOWN" in child.said
        assert number.name in child.log


def _unmount(path: Path) -> None:
    subprocess.run(["fusermount3", "-u", str(path)], check=True, timeout=TIMEOUT)


@pytest.mark.parametrize("which", ["tree", "lane"])
def test_unmounting_either_ends_both(tmp_path, which):
    with served_device(tmp_path / "dev", size=MIB) as child:
        _unmount(child.directory if which == "tree" else child.rundir / "disk")
        assert child.wait() == 0, child.log
        assert child.mounts() == [] and "TEARDOWN" in child.said
        assert "was unmounted" in child.log and "Traceback" not in child.log


@pytest.fixture
def connections(tmp_path):
    """The kernel's control files for FUSE connections, at a place that no other test unmounts."""
    own = tmp_path / "connections"
    own.mkdir()
    subprocess.run(["mount", "-t", "fusectl", "none", own], check=True, timeout=TIMEOUT)
    yield own
    subprocess.run(["umount", own], check=True, timeout=TIMEOUT)


def abort(connections: Path, path: Path) -> None:
    (connections / str(os.minor(path.stat().st_dev)) / "abort").write_text("1")


@pytest.mark.requires("root")
def test_an_aborted_lane_ends_it_too(tmp_path, connections):
    with served_device(tmp_path / "dev", size=MIB) as child:
        abort(connections, child.rundir / "disk")
        assert child.wait() == 2
        assert child.mounts() == [] and "TEARDOWN" in child.said
        assert "somebody aborted its connection" in child.log
        assert "Traceback" not in child.log


@pytest.mark.requires("root")
def test_an_aborted_tree_is_mounted_again_and_the_data_stays(tmp_path, connections):
    """The data does not depend on the tree, and what somebody changed of its modes stays too."""
    with served_device(tmp_path / "dev", size=MIB) as child:
        child.disk.write_bytes(b"data" * 1024)
        (child.directory / "zram/mm_stat").chmod(0o400)
        for _ in range(2):
            child.forget_log()
            held = os.open(child.directory / "zram/mm_stat", os.O_RDONLY)
            abort(connections, child.directory)
            wait_until(lambda: "the tree is mounted again" in child.new_log(), "mounted again")
            with pytest.raises(OSError, match="not connected|aborted"):
                os.read(held, 100)
            with contextlib.suppress(OSError):
                os.close(held)
            assert child.disk.read_bytes() == (b"data" * 1024).ljust(MIB, b"\0")
            assert (child.directory / "zram/mm_stat").stat().st_mode & 0o777 == 0o400
            assert len(child.mounts()) == 2
        assert child.stop() == 0, child.log
        assert child.mounts() == [] and "Traceback" not in child.log


@pytest.mark.parametrize("name", ["zram/mm_stat", "disk"])
def test_users_are_named_and_cut_off(tmp_path, name):
    with served_device(tmp_path / "dev", size=MIB) as child:
        user = subprocess.Popen(
            ["bash", "-c", 'exec 7< "$1"; echo open; read -r; read -r -N 4 -u 7 word; echo "status $?"',
             "user", child.directory / name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        try:
            assert user.stdout.readline() == "open\n"
            assert child.stop() == 1
            assert child.mounts() == []
            where = child.directory if "zram" in name else child.rundir
            assert f"bash (pid {user.pid}) has {where}" in child.log
            # No answer would be worse than an error.
            assert "status 1" in user.communicate("\n", timeout=TIMEOUT)[0]
        finally:
            user.kill()
            user.communicate()


@pytest.mark.requires("loop")
def test_a_loop_device_that_still_stands_on_it_is_named(tmp_path):
    with served_device(tmp_path / "dev", size=MIB) as child:
        loop = run("losetup", "--find", "--show", child.disk).stdout.strip()
        try:
            assert child.stop() == 1
            assert child.mounts() == []
            assert "could not be unmounted" in child.log
        finally:
            subprocess.run(["losetup", "--detach", loop], check=True, timeout=TIMEOUT)


@pytest.mark.requires("root")
def test_a_mount_that_is_not_ours_stays(tmp_path):
    """Something was mounted over the tree: the daemon ends, and does not take that for its own."""
    with served_device(tmp_path / "dev", size=MIB) as child:
        subprocess.run(["mount", "-t", "tmpfs", "none", child.directory], check=True, timeout=TIMEOUT)
        try:
            assert child.stop() == 1
            assert [line.split()[2] for line in child.mounts()] == ["fuse.zramfs", "tmpfs"]
            assert "stays mounted, because tmpfs is mounted over it" in child.log
        finally:
            for _ in range(2):
                subprocess.run(["umount", child.directory], check=True, timeout=TIMEOUT)


@pytest.mark.requires("root")
def test_what_was_there_before_stays(tmp_path):
    """The tree stands on a mount point, and is gone before the daemon looks."""
    directory = tmp_path / "dev" / "tree"
    directory.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", directory], check=True, timeout=TIMEOUT)
    try:
        with served_device(tmp_path / "dev", size=MIB) as child:
            _unmount(child.directory)
            assert child.wait() == 0, child.log
            assert [line.split()[2] for line in child.mounts()] == ["tmpfs"]
    finally:
        subprocess.run(["umount", directory], check=True, timeout=TIMEOUT)


@pytest.mark.parametrize("config, words", [
    ({"algorithms": ["lzo"], "size": MIB}, ["lzo", "zstd"]),
    ({"size": 1 << 60}, ["disksize", str(1 << 60)]),
    ({"threads": 0, "size": MIB}, ["threads"]),
    ({"directory": "/nonexistent/zramfs"}, ["/nonexistent/zramfs"]),
    ({"rundir": "/nonexistent/zramfs"}, ["/nonexistent/zramfs"]),
    ({"ready": "raise OSError(16, 'the loop device is taken')"}, ["the loop device is taken"]),
])
def test_a_start_that_fails_leaves_nothing(tmp_path, config, words):
    child = ServedDevice(tmp_path, **config)
    try:
        assert child.wait() == 1
        assert child.mounts() == [] and "READY" not in child.said
        last = child.log.strip().splitlines()[-1]
        assert all(word in last for word in words), child.log
    finally:
        child.end()


def test_a_signal_during_the_start_leaves_nothing(tmp_path):
    for delay in (0.05, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5):
        place = tmp_path / str(delay)
        place.mkdir()
        child = ServedDevice(place, size=MIB)
        try:
            time.sleep(delay)
            child.process.terminate()
            child.wait()
            assert child.mounts() == [], child.log
        finally:
            child.end()


@pytest.mark.requires("root")
def test_an_ordinary_user_has_his_device_for_himself(tmp_path):
    if not os.stat(shutil.which("fusermount3")).st_mode & stat.S_ISUID:
        pytest.skip("fusermount3 is not setuid, so only root can mount")
    if os.stat("/dev/fuse").st_mode & 0o006 != 0o006:
        pytest.skip("/dev/fuse is not open to everybody, so only root can mount")
    for directory in (tmp_path, *tmp_path.parents):
        if directory != Path("/") and os.stat(directory).st_uid == 0 and directory != Path("/tmp"):
            directory.chmod(directory.stat().st_mode | 0o055)
    nobody = 65534
    with served_device(tmp_path / "dev", user=nobody, size=MIB) as child:
        def as_nobody(command: str) -> str:
            who = {"user": nobody, "group": nobody, "extra_groups": []}
            return run("bash", "-c", command, cwd="/", **who).stdout

        tree = child.directory
        assert as_nobody(f"cd {tree}; stat -c '%u %a' control zram/mm_stat disk; id -u").split() == [
            "65534", "600", "65534", "444", "65534", "777", "65534"]
        assert as_nobody(
            f"cd {tree}; echo 1M > zram/mem_limit; printf hello | dd of=disk conv=notrunc status=none; "
            "head -c 5 disk; cat zram/mm_stat"
        ).split()[0::4][:2] == ["hello", "1048576"]
        # Not even root gets in: the kernel asks nobody's server for nobody else.
        with pytest.raises(PermissionError):
            os.listdir(tree)
        assert child.stop() == 0, child.log
        assert child.mounts() == []
